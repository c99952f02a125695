"""Forgetting with images: of answers behind their images, as the language model's own forward has it."""

import json
import math

import pytest
import torch

import mmpeft
from mmpeft.cli import main
from mmpeft.data.batch import collate
from mmpeft.data.encoding import encode_images
from mmpeft.data.formats import DataError
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.packing import pack
from mmpeft.data.sources import load_records
from mmpeft.data.template import IGNORE_INDEX
from mmpeft.evaluation.evaluate import Evaluation, EvaluationConfig
from mmpeft.evaluation.forgetting import measure_image_forgetting
from mmpeft.models.vision import NoVision
from tests.tiny import write_jsonl


@pytest.fixture(scope="module")
def vlm(tiny_run, randomise):
    """The tiny run, its finetune far from the base."""
    vlm = mmpeft.load(str(tiny_run), device="cpu")
    randomise(vlm.model.bank, "default")
    return vlm


@pytest.fixture(scope="module")
def records(tiny_data):
    return list(load_records(tiny_data / "captions.jsonl"))


@torch.no_grad()
def log_probabilities(vlm, record, adapter):
    """(answer tokens, vocabulary), and the tokens, by the language model's own forward of one record."""
    model, encoded = vlm.model, vlm.template.encode(record)
    model.bank.route([adapter])
    batch = collate([pack([encoded])], encode_images(model.vision_encoder, record["images"]), [adapter])
    logits = model.language_model(inputs_embeds=model._embed(batch, slice(None))).logits[0]
    targets = torch.tensor(encoded.targets)
    return logits.log_softmax(-1)[targets != IGNORE_INDEX], targets[targets != IGNORE_INDEX]


def test_it_is_that_of_the_language_models_own_forward(vlm, records):
    found = measure_image_forgetting(vlm.engine, records, "default", batch_size=3)
    both = [(log_probabilities(vlm, own, None), log_probabilities(vlm, own, "default")) for own in records]
    base, finetune = (torch.cat([own[which][0] for own in both]) for which in (0, 1))
    targets = torch.cat([own[0][1] for own in both])
    for expected, perplexity in ((base, found.base_perplexity), (finetune, found.perplexity)):
        loss = torch.nn.functional.nll_loss(expected, targets)
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    same = (base.argmax(-1) == finetune.argmax(-1)).float().mean()
    divergence = torch.nn.functional.kl_div(finetune, base, log_target=True, reduction="none").sum(-1).mean()
    assert found.agreement == pytest.approx(float(same))
    assert found.divergence == pytest.approx(float(divergence), rel=1e-3)
    assert found.num_tokens == len(targets)
    assert found.divergence > 0.01
    again = measure_image_forgetting(vlm.engine, records[::-1], "default", batch_size=100)
    assert vars(again) == pytest.approx(vars(found), rel=1e-4)


def test_the_image_counts(vlm, records):
    """Other images, other numbers: the answers are read behind them."""
    images = [own["images"] for own in records]
    others = [own | {"images": image} for own, image in zip(records, images[1:] + images[:1], strict=True)]
    found, changed = (measure_image_forgetting(vlm.engine, own, "default") for own in (records, others))
    assert found.perplexity != pytest.approx(changed.perplexity, rel=1e-6)


@pytest.mark.parametrize("given", [True, False])
def test_a_test_measures_it_beside_plain_text(tiny_config, tiny_run, tiny_data, tmp_path, given):
    words = [f"--test.held_text={tiny_data / 'text.jsonl'}", f"--output={tmp_path}", "--data.limit=1"]
    words += [f"--test.held_images={tiny_data / 'captions.jsonl'}"] * given
    main(["test", "--config", str(tiny_config), "--forgetting", *words])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["forgetting/kl"] > 0
    kinds = {"perplexity_base", "perplexity", "same_token", "kl"}
    assert all(f"forgetting_of_images/{kind}" in metrics for kind in kinds) == given


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": []}, "has no image; test.held_images are questions about images"),
        ({"turns": [("<image>what?", "red " * 2000)]}, "is longer than max_length = 1024, so that a part"),
    ],
)
def test_records_that_would_be_read_in_part_or_without_an_image_are_refused(vlm, records, change, told):
    held = [records[0], records[1] | change]
    with pytest.raises(DataError, match=f"captions.jsonl:2.* {told}"):
        measure_image_forgetting(vlm.engine, held, "default")


def test_a_model_without_an_encoder_is_not_asked_about_images(vlm, records, monkeypatch):
    monkeypatch.setattr(vlm.model, "vision_encoder", NoVision())
    with pytest.raises(DataError, match="the run has no vision encoder"):
        measure_image_forgetting(vlm.engine, records, "default")


@pytest.mark.parametrize(
    ("content", "told"), [(None, "does not exist"), (b"\x89PNG no more", "no image of a known")]
)
def test_held_images_are_refused_before_questions_are_answered(
    tiny_config, tiny_data, tmp_path, monkeypatch, content, told
):
    monkeypatch.setattr(Evaluation, "run", lambda *_: pytest.fail("a question was answered"))
    held = write_jsonl(tmp_path / "held.jsonl", [{"image": "no.png", "question": "what?", "answer": "red"}])
    if content is not None:
        (tmp_path / "no.png").write_bytes(content)
    words = [f"--test.held_text={tiny_data / 'text.jsonl'}", f"--test.held_images={held}"]
    with pytest.raises(SystemExit, match=rf"test.held_images has .*\n.*held.jsonl:1 .*no.png.*{told}"):
        main(["test", "--config", str(tiny_config), "--forgetting", *words, f"--output={tmp_path / 'out'}"])


def test_images_of_our_own_go_with_the_text_of_our_own(tiny_data, monkeypatch):
    monkeypatch.setattr("mmpeft.evaluation.evaluate.HELD_IMAGES", str(tiny_data / "captions.jsonl"))
    columns = Columns({"question": "asked"})  # of the user's data, which ours do not have
    assert len(EvaluationConfig().held_records(columns, reads_images=True)) == 8
    assert EvaluationConfig().held_records(columns, reads_images=False) == []
    assert EvaluationConfig(held_text="own.jsonl").held_records(columns, reads_images=True) == []
