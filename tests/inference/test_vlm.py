"""ask, caption and rank: one or many, an adapter per item, and the same answer however an image is given."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmpeft.data.batch import collate
from mmpeft.data.encoding import encode_images
from mmpeft.data.images import ImageError
from mmpeft.data.packing import pack
from mmpeft.errors import RefusedError

QUESTION = "what color is it?"
CHOICES = ["red", "blue", "a green square"]


def test_one_question_gives_one_answer_and_a_list_a_list(vlm, images):
    one = vlm.ask(images[0], QUESTION, max_new_tokens=6)
    assert isinstance(one, str)
    assert vlm.ask([images[0]], [QUESTION], max_new_tokens=6) == [one]
    assert vlm.ask(images[0], [QUESTION, QUESTION], max_new_tokens=6) == [one, one]
    assert vlm.ask([images[0]] * 3, QUESTION, max_new_tokens=6) == [one] * 3


def test_many_questions_have_the_answers_of_single_ones(vlm, images):
    questions = [QUESTION, "is it red?", "what is it?", "how many squares are there?"] * 3
    given = [images[0], images[1], None, (images[2], images[3])] * 3
    vlm.batch_size = 5
    together = vlm.ask(given, questions, max_new_tokens=6)
    vlm.batch_size = 32
    assert together == vlm.ask(given, questions, max_new_tokens=6)
    assert together == [vlm.ask(i, q, max_new_tokens=6) for i, q in zip(given, questions, strict=True)]
    assert len(set(together)) > 1


def test_each_item_is_answered_by_its_own_adapter(vlm, images):
    names = ["default", "base", "other", "tfew", "default", None]
    together = vlm.ask(images[0], [QUESTION] * 6, names, max_new_tokens=6)
    assert together == [vlm.ask(images[0], QUESTION, name, max_new_tokens=6) for name in names]
    assert len(set(together[:4])) == 4
    assert together[5] == together[0], "None is the run's first"


@pytest.mark.parametrize("call", ["ask", "rank"])
def test_an_unknown_adapter_is_refused_before_anything_is_computed(vlm, images, call, monkeypatch):
    monkeypatch.setattr(vlm.model, "hidden_states", None)
    arguments = (CHOICES, "nobody") if call == "rank" else ("nobody",)
    with pytest.raises(KeyError, match="no finetune 'nobody'; there are: default, other, tfew, base"):
        getattr(vlm, call)(images[0], QUESTION, *arguments)


def test_an_image_may_be_a_path_bytes_or_a_pil_image(vlm, images):
    path = images[5]
    forms = [path, Path(path), Path(path).read_bytes(), Image.open(path)]
    assert len({vlm.ask(form, QUESTION, max_new_tokens=6) for form in forms}) == 1
    together = vlm.ask(forms, QUESTION, max_new_tokens=6)
    assert together == [together[0]] * 4


def test_a_tuple_is_several_images_of_one_question(vlm, images):
    pair = (images[0], images[1])
    answer = vlm.ask(pair, "same?", max_new_tokens=8)
    assert isinstance(answer, str)
    assert vlm.ask(pair, "<image><image>same?", max_new_tokens=8) == answer
    assert vlm.ask([pair, (images[1], images[0])], "same?", max_new_tokens=8)[0] == answer


def test_answers_take_at_most_max_new_tokens(vlm, images, monkeypatch):
    monkeypatch.setattr(vlm.template, "decode", list)
    assert len(vlm.ask(images[0], QUESTION, max_new_tokens=1)) <= 1
    assert len(vlm.ask(images[0], QUESTION, max_new_tokens=9)) <= 9


def test_caption_asks_for_a_caption(vlm, images):
    expected = vlm.ask(images[0], "Describe this image.", task="caption", max_new_tokens=6)
    assert vlm.caption(images[0], max_new_tokens=6) == expected
    assert vlm.caption(images[:2], max_new_tokens=6)[0] == expected


@torch.no_grad()
def score(vlm, image, choice, adapter):
    """Mean log-probability of the choice's tokens and the end token, from Hugging Face's own forward."""
    model, template = vlm.model, vlm.template
    record = {
        "id": "1",
        "images": [image],
        "turns": [("<image>" + QUESTION, None)],
        "task": "vqa",
        "where": "",
    }
    prompt = template.encode_prompt(record)
    tokens = [*template.tokenizer(f" {choice}")["input_ids"], template.tokenizer.eos_token_id]
    batch = collate([pack([prompt])], encode_images(model.vision_encoder, [image]), [None])
    embeds = model._embed(batch, slice(None))
    table = model.language_model.get_input_embeddings()
    embeds = torch.cat([embeds, table(torch.tensor([tokens]))], dim=1)
    model.bank.route([adapter])
    logits = model.language_model(inputs_embeds=embeds).logits[0].log_softmax(-1)
    start = len(prompt.ids) - 1
    return float(sum(logits[start + n, token] for n, token in enumerate(tokens)) / len(tokens))


@pytest.mark.parametrize("adapter", ["default", "base", "tfew"])
def test_rank_is_the_mean_log_probability_best_first(vlm, images, adapter):
    ranked = vlm.rank(images[0], QUESTION, CHOICES, adapter)
    expected = {c: score(vlm, images[0], c, None if adapter == "base" else adapter) for c in CHOICES}
    assert dict(ranked) == pytest.approx(expected, abs=1e-4)
    assert [value for _, value in ranked] == sorted(dict(ranked).values(), reverse=True)


def test_ranking_many_equals_ranking_each(vlm, images):
    names = ["default", "other", "base", "tfew"] * 3
    together = vlm.rank(images, QUESTION, CHOICES, names)
    for image, name, ranked in zip(images, names, together, strict=True):
        alone = vlm.rank(image, QUESTION, CHOICES, name)
        assert [choice for choice, _ in alone] == [choice for choice, _ in ranked]
        assert [value for _, value in alone] == pytest.approx([value for _, value in ranked], abs=1e-4)


def test_choices_of_different_length_do_not_disturb_each_other(vlm, images):
    both = dict(vlm.rank(images[0], QUESTION, ["red", "blue"]))
    with_long = dict(vlm.rank(images[0], QUESTION, ["red", "blue", "a green square " * 5]))
    assert with_long["red"] == pytest.approx(both["red"], abs=1e-4)
    assert all(math.isfinite(value) for value in with_long.values())


@pytest.mark.parametrize("choices", [["red"], ["red", "red"], ["red", "  "], []])
def test_choices_that_cannot_be_ranked_are_refused(vlm, images, choices):
    with pytest.raises(ValueError, match="at least two different, non-empty answers"):
        vlm.rank(images[0], QUESTION, choices)


def test_lists_of_different_length_are_refused(vlm, images):
    with pytest.raises(ValueError, match="2 images, 3 questions"):
        vlm.ask(images[:2], [QUESTION] * 3)


def test_markers_must_match_the_images(vlm, images):
    with pytest.raises(ValueError, match="the question has 2 <image> but 1 images"):
        vlm.ask(images[0], "<image><image>same?")


def test_an_image_that_cannot_be_read_is_refused_by_name(vlm, tmp_path):
    path = tmp_path / "none.png"
    with pytest.raises(ImageError, match=r"none.png.*does not exist"):
        vlm.ask(str(path), QUESTION)
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"none.png"):
        vlm.ask(str(path), QUESTION)


def test_a_question_beyond_max_length_is_refused(vlm, images):
    with pytest.raises(ValueError, match="more than max_length"):
        vlm.ask(images[0], "red " * 2000)


@pytest.mark.parametrize("text", ["<|im_end|>", "[/INST] yes [INST]", "🙂", "a\0b"])
def test_odd_text_is_answered_like_any_other(vlm, images, text):
    assert isinstance(vlm.ask(images[0], text, max_new_tokens=2), str)


@pytest.mark.parametrize("empty", ["", " \n"])
@pytest.mark.parametrize("image", [0, None])
def test_an_empty_question_is_refused_alone(vlm, images, image, empty):
    image = None if image is None else images[image]
    with pytest.raises(RefusedError, match="the question is empty; write one"):
        vlm.ask(image, empty)
    with pytest.raises(RefusedError, match="the question is empty"):
        vlm.rank(image, empty, CHOICES)
    with pytest.raises(RefusedError, match="question 1 is empty"):
        vlm.rank(image, [QUESTION, empty], CHOICES)
    with pytest.raises(RefusedError, match="the question is empty"):
        next(vlm.stream(image, empty))
    requests, _ = vlm.requests(image, [QUESTION, empty])
    asked, refused = vlm.answer(requests)
    assert asked.error is None
    assert refused.error.startswith("question 1 is empty")


def test_an_image_alone_may_be_asked_about(vlm, images):
    assert isinstance(vlm.ask(images[0], "<image>", max_new_tokens=2), str)


def test_an_empty_list_gives_an_empty_list(vlm):
    assert vlm.ask([], []) == []
