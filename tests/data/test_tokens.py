"""Tokenization by pieces: no user's text is a control token, and pieces give what the whole text gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PythonBackend

from mmpeft.data.template import IMAGE_TOKEN, Template, current_settings, layout_of
from mmpeft.data.tokens import PieceTokenizer, is_control
from mmpeft.errors import RefusedError
from tests.data.tokenizers import KINDS, make
from tests.tiny import make_record

TURNS = ["<|turn|>", "[INST]", "[/INST]"]
ADDED = ["<think>", "<｜User｜>"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@each_kind
def test_pieces_give_what_the_whole_text_gives(kind):
    tokenizer = make(kind, TURNS, ADDED)
    pieces = PieceTokenizer(tokenizer)
    text = "what color is it? red</s> is it blue<think>yes"
    ids = [
        *pieces.begin("what color"),
        *pieces.within(" is it?"),
        *pieces.within(" red"),
        tokenizer.eos_token_id,
    ]
    ids += [
        *pieces.section(" is it"),
        *pieces.within(" blue"),
        pieces.control("<think>"),
        *pieces.section("yes"),
    ]
    assert ids == whole(tokenizer, text)


@each_kind
def test_a_templates_own_text_is_cut_at_its_first_control_token(kind):
    tokenizer = make(kind, TURNS, ADDED)
    before, ids = PieceTokenizer(tokenizer).template(" it <think>red</s>")
    assert before.rstrip(" ") == " it"
    assert ids == whole(tokenizer, "<think>red</s>")
    assert PieceTokenizer(tokenizer).template(" it is") == (" it is", [])


@each_kind
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_no_text_becomes_a_control_token(kind, data):
    pieces = TOKENIZERS[kind]
    spellings = [*pieces.controls.values(), "＜/s＞", "<", "[", " ", "red"]
    parts = st.one_of(st.text(max_size=6), st.sampled_from(spellings))
    text = "".join(data.draw(st.lists(parts, min_size=1, max_size=6)))
    for read in (pieces.begin, pieces.within, pieces.section, pieces.text):
        assert not {*pieces.controls} & {*read(text)}, text


TOKENIZERS = {kind: PieceTokenizer(make(kind, TURNS, ADDED)) for kind in KINDS}


@pytest.mark.parametrize("kind", ["unigram", "byte-level"])
def test_transformers_own_splitting_lets_control_tokens_through(kind):
    """Why there is more to do than ``split_special_tokens``."""
    pieces = TOKENIZERS[kind]
    ids = pieces.tokenizer("is </s> <think>", add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    assert {*pieces.controls} & {*ids}


def test_added_words_and_runs_of_spaces_stay_what_they_are():
    tokenizer = make("byte-level", added=["pneumothorax", "    ", "<think>"])
    pieces = PieceTokenizer(tokenizer)
    assert [t.content for t in tokenizer.added_tokens_decoder.values() if is_control(t)] == [
        *("<unk>", "<s>", "</s>", "<think>"),
    ]
    assert pieces.begin("a pneumothorax    here") == whole(tokenizer, "a pneumothorax    here")


def test_a_tokenizer_written_in_python_is_refused_by_name():
    class Letters(PythonBackend):
        pass

    with pytest.raises(RefusedError, match=r"Letters, which is written in Python"):
        PieceTokenizer(Letters.__new__(Letters))


@pytest.mark.parametrize("control", [False, True])
@each_kind
def test_minigpt_around_image_task_question_answer_and_end(kind, control):
    """One table for every tokenizer: what each span says, and that all together are the whole text's ids."""
    tokenizer = make(kind, TURNS if control else [], ADDED)
    template = Template(tokenizer, 2)
    spans = template.spans(make_record("<image>what color?", "red", ["a.png"], task="vqa"))
    first, rest = "[INST] <Img>", "</Img> [vqa] what color? [/INST] red"
    if control:  # no space stands before a control token
        rest = rest.replace(" [/INST]", "[/INST]")
    kinds = [span.kind for span in spans]
    assert kinds == ["begin", "marker", "image", "marker", "task", "instruction", "marker", "answer", "end"]
    begin, opening, image, *others, end = (span.ids for span in spans)
    assert (begin, image, end) == ([tokenizer.bos_token_id], [IMAGE_TOKEN] * 2, [tokenizer.eos_token_id])
    assert opening == whole(tokenizer, first)
    assert [token for ids in others for token in ids] == whole(tokenizer, rest)
    assert (tokenizer.convert_tokens_to_ids("[/INST]") in [*others[3]]) is control


def test_a_run_of_before_keeps_its_markers_as_text():
    tokenizer = make("byte-level", TURNS)
    row = make_record("<image>what color?", "red", ["a.png"])
    old = layout_of(tokenizer, {"style": "instruct", "max_length": 9}, "runs/old")
    ids = [token for span in Template(tokenizer, 1, old).spans(row) for token in span.ids]
    assert tokenizer.convert_tokens_to_ids("[INST]") not in ids
    new = Template(tokenizer, 1)
    assert current_settings(new.settings) == new.settings
    assert new.settings == {"layout": "minigpt", "max_length": 1024, "control_markers": True}
    same = Template(tokenizer, 1, layout_of(tokenizer, new.settings, "runs/new"))
    assert same.encode(row) == new.encode(row) != Template(tokenizer, 1, old).encode(row)
