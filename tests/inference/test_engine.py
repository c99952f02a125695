"""The engine: every request has its own answer or its own error, whatever it is asked beside."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpeft.data.features import FeatureCache
from mmpeft.data.loader import make_batch
from mmpeft.errors import RefusedError
from mmpeft.inference.decoding import Sampling, generate
from mmpeft.inference.engine import Engine
from mmpeft.inference.requests import Request
from tests.tiny import make_record

SHORT = Sampling(6)


@pytest.fixture
def counted(vlm, monkeypatch, tmp_path):
    """The engine with an empty cache, and the images that its encoder gets."""
    encoder, seen = vlm.model.vision_encoder, []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda pixels: seen.extend(pixels) or forward(pixels))
    monkeypatch.setattr(vlm.engine, "features", FeatureCache(tmp_path, encoder))
    return vlm.engine, seen


def ask(image, question="what color is it?", **fields):
    record = make_record(question=f"<image>{question}", answer=None, images=[image], task="vqa")
    return Request(record, **({"sampling": SHORT} | fields))


def alone(engine, requests):
    return [engine.answer([request])[0] for request in requests]


def mixed(images):
    """Written and ranked requests of all finetunes and the base, about shared and other images."""
    ranked = ask(images[0])
    ranked = replace(ranked, rank=True, record=ranked.record | {"choices": ["red", "blue", "a green square"]})
    return [
        ask(images[0], adapter="default"),
        ranked,
        ask(images[1], "is it red?", adapter="tfew"),
        ask(images[0], "is it red?", adapter="default"),
        replace(ranked, adapter="other"),
        ask(images[2], adapter=None, sampling=Sampling(2)),
        ask(images[0], adapter="other"),
        Request(make_record(question="is red a color?", answer=None), "default", sampling=SHORT),
    ]


def test_every_request_is_answered_as_alone_in_its_place(vlm, images):
    requests = mixed(images)
    for together, own in zip(vlm.engine.answer(requests), alone(vlm.engine, requests), strict=True):
        assert (together.text, together.finish_reason) == (own.text, own.finish_reason)
        if own.scores is not None:
            assert together.scores == pytest.approx(own.scores, abs=1e-5)


def test_what_is_wrong_with_a_request_is_its_own_error(vlm, images, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no image")
    good = mixed(images)
    bad = {
        1: (ask(str(tmp_path / "none.png")), "none.png.*does not exist"),
        3: (ask(str(tmp_path / "torn.png")), "torn.png"),
        4: (ask(images[0], adapter="nobody"), "no finetune 'nobody'"),
        6: (ask(images[1], "red " * 3000), "more than max_length"),
        9: (replace(ask(images[0]), rank=True), "has no choices to rank"),
    }
    requests = list(good)
    for place, (request, _) in bad.items():
        requests.insert(place, request)
    found = vlm.engine.answer(requests)
    for place, (_, message) in bad.items():
        assert found[place].finish_reason == "error"
        assert found[place].text == ""
        with pytest.raises(RefusedError, match=message):
            raise found[place].refusal
    answered = [completion for place, completion in enumerate(found) if place not in bad]
    assert [c.text for c in answered] == [c.text for c in vlm.engine.answer(good)]
    assert all(completion.error is None for completion in answered)


def test_what_the_model_refuses_of_a_batch_is_the_error_of_its_row(vlm, images, monkeypatch):
    """As a row beyond a sliding window would be."""
    requests = [ask(images[0]), ask(images[1], "is it red? " * 8), ask(images[2])]
    want = vlm.engine.answer(requests)
    inputs = vlm.model.inputs

    def window(batch, *rest):
        if batch.input_ids.shape[1] > 40:
            raise RefusedError("rows of so many tokens exceed the window")
        return inputs(batch, *rest)

    monkeypatch.setattr(vlm.model, "inputs", window)
    found = vlm.engine.answer(requests)
    assert [found[0].text, found[2].text] == [want[0].text, want[2].text]
    assert found[1].error == "rows of so many tokens exceed the window"


def test_an_image_is_encoded_once_whoever_asks_about_it(counted, images):
    engine, seen = counted
    content = (images[0], Path(images[0]).read_bytes(), images[1])
    engine.answer([ask(image, adapter=name) for image in content for name in ("default", "tfew", None)])
    assert len(seen) == 2
    engine.answer([ask(images[0], "and now?")])
    assert len(seen) == 2


def test_what_a_training_has_encoded_is_not_encoded_again(counted, images):
    engine, seen = counted
    engine.features.build(images)
    encoded = len(seen)
    engine.features = FeatureCache(engine.features.directory.parent, engine.features.encoder)
    engine.answer([ask(image) for image in images])
    assert len(seen) == encoded


def test_lengths_are_each_requests_own(vlm, images):
    long = vlm.engine.answer([ask(images[0], sampling=Sampling(12), adapter="other")])[0]
    assert long.finish_reason == "length", "the finetune was made not to end so soon"
    sizes = (1, 5, 12, 3)
    found = vlm.engine.answer([ask(images[0], sampling=Sampling(size), adapter="other") for size in sizes])
    assert all(long.text.startswith(own.text) for own in found)
    assert [own.finish_reason for own in found] == ["length"] * 4


def test_a_stop_string_ends_the_answer_before_it(vlm, images):
    whole = vlm.engine.answer([ask(images[0], sampling=Sampling(12), adapter="other")])[0].text
    stop = whole[len(whole) // 2 :][:3]
    found = vlm.engine.answer([ask(images[0], sampling=Sampling(12, stop=(stop, "!!")), adapter="other")])[0]
    assert found.text == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"


def test_a_seed_gives_the_same_text_beside_others(vlm, images):
    def drawn(seed):
        return ask(images[0], adapter="other", sampling=Sampling(8, temperature=1.5, seed=seed))

    first, second, again = vlm.engine.answer([drawn(1), drawn(2), drawn(1)])
    assert first.text == again.text != second.text
    assert alone(vlm.engine, [drawn(1)])[0].text == first.text


@pytest.mark.parametrize("stop", [(), (" ",)])
def test_the_pieces_of_a_stream_are_the_answer(vlm, images, stop):
    request = ask(images[0], adapter="other", sampling=Sampling(12, stop=stop))
    whole = vlm.engine.answer([request])[0].text
    pieces = list(vlm.engine.tokens(request))
    assert "".join(pieces) == whole
    assert len(pieces) > 2 or stop


def test_a_stream_never_tells_the_beginning_of_a_stop_string(vlm, images):
    request = ask(images[0], adapter="other", sampling=Sampling(12))
    whole = vlm.engine.answer([request])[0].text
    stop = whole[-6:]
    told = "".join(vlm.engine.tokens(replace(request, sampling=Sampling(12, stop=(stop,)))))
    assert told == whole[: whole.index(stop)]


def test_a_true_answer_is_as_likely_as_the_model_reads_it(vlm, images):
    record = make_record(
        question="<image>what color is it?", answer="a blue one", images=[images[0]], task="vqa"
    )
    request = Request(record, "tfew", sampling=SHORT, read_truth=True)
    found = vlm.engine.answer([ask(images[0], adapter="tfew"), request])
    ranked = vlm.rank(images[0], "what color is it?", ["a blue one", "red"], "tfew")
    mean = dict(ranked)["a blue one"]
    assert found[1].log_likelihood / found[1].num_tokens == pytest.approx(mean, abs=1e-5)
    assert found[0].log_likelihood is None


@torch.no_grad()
def test_no_requests_have_no_answers(vlm):
    assert vlm.engine.answer([]) == []


def test_streams_that_take_turns_are_each_as_alone(vlm, images):
    """Each decoder's rows are routed anew when another one has stepped in between."""
    asked = [ask(images[0], adapter=name, sampling=Sampling(8)) for name in ("other", "tfew", None)]
    want = [vlm.engine.answer([request])[0].text for request in asked]
    streams, told = [vlm.engine.tokens(request) for request in asked], ["", "", ""]
    for _ in range(9):
        for number, stream in enumerate(streams):
            told[number] += next(stream, "")
    assert told == want


def test_a_file_that_changed_is_read_again(vlm, images, tmp_path):
    path = tmp_path / "now.png"
    keys = []
    for image in images[:2]:
        path.write_bytes(Path(image).read_bytes())
        keys.append(vlm.engine.features.key(str(path)))
    assert keys == [vlm.engine.features.key(image) for image in images[:2]]


def test_an_image_whose_features_cannot_be_kept_is_its_own_error(counted, images, monkeypatch):
    engine, _ = counted
    encoder = engine.model.vision_encoder
    transform = encoder.transform_image
    torn = []

    def overflowing(image):
        torn.append(image)
        return transform(image) * (torch.inf if len(torn) == 2 else 1)

    monkeypatch.setattr(encoder, "transform_image", overflowing)
    found = engine.answer([ask(image) for image in images[:3]])
    assert [own.finish_reason == "error" for own in found] == [False, True, False]
    assert "65504" in found[1].error


@pytest.mark.parametrize("choices", [[1, 2], ["red"], ["red", "red"], "red", ["red", " "]])
def test_choices_that_cannot_be_ranked_are_their_requests_error(vlm, images, choices):
    bad = ask(images[0])
    bad = replace(bad, rank=True, record=bad.record | {"choices": choices})
    found = vlm.engine.answer([bad, ask(images[0])])
    assert "at least two different, non-empty answers" in found[0].error
    assert found[1].error is None


def test_questions_that_do_not_fit_into_one_row_are_asked_one_by_one(vlm, images, monkeypatch):
    requests = [ask(images[0], f"is it {colour}?") for colour in ("red", "blue", "green")]
    want = alone(vlm.engine, requests)
    inputs = vlm.model.inputs

    def window(batch, *rest):
        if len(batch.conversations.rows) > 1:
            raise RefusedError("rows of so many tokens exceed the window")
        return inputs(batch, *rest)

    monkeypatch.setattr(vlm.model, "inputs", window)
    assert [own.text for own in vlm.engine.answer(requests)] == [own.text for own in want]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "5"},
        {"temperature": "0.5"},
        {"top_k": 2.5},
        {"seed": None},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_sampling_settings_of_another_kind_are_refused(settings):
    with pytest.raises(RefusedError, match=next(iter(settings))):
        Sampling(**settings)


def test_one_stop_string_is_not_read_as_its_letters():
    assert Sampling(stop="grey").stop == ("grey",)


def test_a_stream_is_of_one_question(vlm, images):
    with pytest.raises(RefusedError, match="a stream is of one question"):
        vlm.stream(images[:2], ["what?", "where?"])


@pytest.mark.parametrize("control", [True, False])
def test_every_control_token_at_which_the_model_would_stop_ends_an_answer(vlm, images, monkeypatch, control):
    tokenizer = vlm.engine.template.tokenizer
    end = tokenizer.bos_token_id if control else tokenizer("red")["input_ids"][0]
    monkeypatch.setattr(
        vlm.model.language_model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end]
    )
    logits = vlm.model.logits
    monkeypatch.setattr(
        vlm.model,
        "logits",
        lambda hidden, adapters: logits(hidden, adapters).index_fill(-1, torch.tensor(end), 1e4),
    )
    (answer,) = vlm.engine.answer([ask(images[0], adapter="default")])
    assert answer.finish_reason == ("stop" if control else "length")


@pytest.mark.parametrize("share", [False, True])
def test_a_written_answer_is_as_likely_as_the_model_reads_it(vlm, images, share):
    """Beside others, that end before and after it, and the end token counted where it was written."""
    template, model = vlm.template, vlm.model
    engine = Engine(model, template, vlm.engine.features, share=share, likely=True)
    lengths = (1, 3, 9, 40)
    requests = [
        ask(image, adapter=name, sampling=Sampling(length))
        for name in ("default", "tfew", None)
        for image, length in zip(images, lengths, strict=False)
    ]
    plain = vlm.engine.answer(requests)
    for request, found, own in zip(requests, engine.answer(requests), plain, strict=True):
        assert (found.text, found.finish_reason, own.log_probability) == (own.text, own.finish_reason, None)
        prompt = engine.encode(request)
        features = lambda _, own=request: vlm.engine.features(own.record["images"])  # noqa: E731
        row = make_batch([prompt], [[0]], features, [request.adapter])
        (end,) = {template.tokenizer.eos_token_id}
        ((ids,),) = generate(model, row, end, sampling=[request.sampling])
        written = ids if found.finish_reason == "length" else [*ids, end]
        whole = replace(prompt, ids=[*prompt.ids, *written[:-1]], targets=[*prompt.targets[:-1], *written])
        losses = model.token_losses(make_batch([whole], [[0]], features, [request.adapter]))
        assert found.log_probability == pytest.approx(-float(losses.nll.sum()), rel=1e-5)
