"""k-shot prompting: the examples are read, and keeping them changes nothing."""

import pytest
import torch

from mmpeft.adapters import IA3Config, PromptConfig
from mmpeft.data.sources import DataError, load_records
from mmpeft.data.template import Template
from mmpeft.experiments.prompting import FewShotPrompt
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig
from mmpeft.models.vision import VisionConfig
from tests.tiny import COLOURS

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model(tiny_base, randomise):
    torch.manual_seed(0)
    language = LanguageConfig(str(tiny_base / "language"), dtype="float32")
    vision = VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=32, crop=False)
    model = build_model(language, vision)
    model.bank.add("tfew", IA3Config())
    model.bank.add("prompt", PromptConfig(3))
    for name in model.bank.names:
        randomise(model.bank, name)
    return model.eval()


@pytest.fixture(scope="module")
def template(tiny_tokenizer, model):
    return Template(tiny_tokenizer, model.vision_encoder.num_tokens)


@pytest.fixture(scope="module")
def records(tiny_data):
    """Two questions about different images, then examples of all colours."""
    held_out, train = (load_records(tiny_data / f"{split}.jsonl", task="vqa") for split in ("test", "train"))
    colours = [r | {"choices": list(COLOURS)} for r in [*held_out, *train] if r["id"].endswith("-0")]
    return colours[:2], colours[2:7]


def scores(prompt, record):
    return prompt.scores(record)


@pytest.mark.parametrize("adapter", [None, "tfew", "prompt"])
def test_kept_examples_give_the_same_scores(model, template, records, adapter):
    asked, examples = records
    prompt = FewShotPrompt(model, template, examples, adapter)
    prompt.keep_examples("vqa", prompt.features(prompt.images))
    for record in [*asked, asked[0]]:  # the one after another must not read it
        kept = prompt.kept_scores(prompt.encode(record), prompt.features(record["images"]))
        torch.testing.assert_close(kept, scores(prompt, record), **CLOSE)


def test_examples_are_earlier_turns_with_their_images_and_answers(model, template, records):
    asked, examples = records
    prompt = FewShotPrompt(model, template, examples[:2])
    written = template.encode(
        asked[0]
        | {
            "turns": [record["turns"][0] for record in (*examples[:2], asked[0])],
            "images": [record["images"][0] for record in (*examples[:2], asked[0])],
        }
    )
    question = prompt.encode(asked[0])
    right = question.conversations[question.right]
    assert (right.ids, right.images) == (written.ids, written.images)
    turned = [record | {"turns": [(record["turns"][0][0], "blue")]} for record in examples[:2]]
    swapped = [record | {"images": examples[3]["images"]} for record in examples[:2]]
    for others in (turned, swapped, examples[1::-1], []):
        assert not torch.allclose(
            scores(FewShotPrompt(model, template, others), asked[0]), scores(prompt, asked[0]), **CLOSE
        )


def test_examples_and_question_share_one_system_turn(model, template, records):
    asked, examples = ([record | {"system": "be sure"} for record in own] for own in records)
    prompt = FewShotPrompt(model, template, examples[:2])
    prompt.keep_examples("vqa", prompt.features(prompt.images))
    kept = prompt.kept_scores(prompt.encode(asked[0]), prompt.features(asked[0]["images"]))
    torch.testing.assert_close(kept, scores(prompt, asked[0]), **CLOSE)
    with pytest.raises(DataError, match="another system turn than the examples"):
        prompt.encode(records[0][0])
    with pytest.raises(DataError, match="another system turn than the examples"):
        FewShotPrompt(model, template, [*examples[:1], *records[1][:1]]).encode(asked[0])


def test_an_image_that_comes_twice_is_encoded_once(model, template, records, monkeypatch):
    seen = []
    monkeypatch.setattr("mmpeft.data.encoding.load_image", lambda image, _: seen.append(image))
    monkeypatch.setattr(
        "mmpeft.data.encoding.encode",
        lambda _, pixels: torch.arange(float(len(pixels)))[:, None, None],
    )
    monkeypatch.setattr(type(model.vision_encoder), "transform", lambda *_: None)
    one, two = (record["images"][0] for record in records[0])
    features = FewShotPrompt(model, template).features([one, two, one])
    assert (seen, features.flatten().tolist()) == ([one, two], [0, 1, 0])


def test_a_question_not_behind_the_kept_examples_is_refused(model, template, records):
    asked, examples = records
    prompt = FewShotPrompt(model, template, examples[:1])
    other = prompt.encode(asked[0] | {"task": "caption"})
    for task in (None, "vqa"):
        if task:
            prompt.keep_examples(task, prompt.features(prompt.images))
        with pytest.raises(ValueError, match=r"call keep_examples\(\) .* 'caption'"):
            prompt.kept_scores(other, prompt.features(asked[0]["images"]))


def test_a_prompt_that_is_too_long_is_refused(model, tiny_tokenizer, records):
    asked, examples = records
    short = Template(tiny_tokenizer, model.vision_encoder.num_tokens, max_length=60)
    with pytest.raises(DataError, match="more than max_length = 60"):
        FewShotPrompt(model, short, examples).encode(asked[0])
