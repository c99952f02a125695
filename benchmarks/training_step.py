"""Questions per second of one training step: ours, and the usual recipe on the same model and questions.

The usual recipe is peft's LoRA with one row per question, full logits and Hugging Face's own loss; its vision
features are given to it for free. Cases alternate in one process; one JSON line per case with medians.

    python benchmarks/training_step.py --repeats 5
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import auto_cli
from timing import alternate, report

from mmpeft.adapters import LoraConfig
from mmpeft.data.batch import Batch, collate
from mmpeft.data.features import FeatureCache
from mmpeft.data.packing import pack
from mmpeft.data.sources import load_records
from mmpeft.data.template import Template
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_language_model, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.vision import VisionConfig
from mmpeft.paths import home, resolve

TARGETS = ["q_proj", "v_proj"]
VISION = VisionConfig(weights="embedded/efficientnet-lite0/model.safetensors", image_size=96, fit="squash")


def training_step(repeats: int = 5, images: int = 4, seed: int = 0) -> None:
    """Times forward and backward.

    Args:
        repeats: rounds over all cases.
        images: images per step; each comes with all its questions.
        seed: which images.
    """
    language = LanguageConfig()
    model = build_model(language, VISION)
    model.bank.add("ours", LoraConfig(target_modules=TARGETS))
    template = Template(load_tokenizer(language.name), model.vision_encoder.num_tokens)
    packed, unpacked = batches(model, template, images, seed)
    peft_model = peft_lora(language)
    cases: dict[str, Callable[[], Any]] = {
        "mmpeft, questions of an image in one row": lambda: ours(model, packed),
        "mmpeft, a row per question": lambda: ours(model, unpacked),
        "peft, a row per question, full logits": lambda: theirs(peft_model, model, unpacked),
    }
    questions = len(unpacked.input_ids)
    seconds = alternate(cases, repeats)
    usual = seconds["peft, a row per question, full logits"]
    for name, median in seconds.items():
        report(
            case=name,
            seconds=round(median, 3),
            questions_per_second=round(questions / median, 1),
            times_peft=round(usual / median, 2),
        )


def batches(model: MultimodalModel, template: Template, images: int, seed: int) -> tuple[Batch, Batch]:
    """The same questions packed by image, and one per row."""
    records = load_records(resolve("embedded/easy-vqa/train.jsonl"))
    by_image: dict[str, list[Any]] = {}
    for record in records:
        by_image.setdefault(str(record["images"][0]), []).append(template.encode(dict(record)))
    chosen = [by_image[key] for key in random.Random(seed).sample(sorted(by_image), images)]
    features = FeatureCache(home() / "features", model.vision_encoder)
    packed, single = [pack(group) for group in chosen], [pack([one]) for group in chosen for one in group]
    return tuple(  # pyright: ignore[reportReturnType]
        collate(rows, features([image for row in rows for image in row.images]), ["ours"] * len(rows))
        for rows in (packed, single)
    )


def peft_lora(language: LanguageConfig) -> Any:
    """peft's default LoRA on the same base."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    config = PeftLoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    return get_peft_model(load_language_model(language), config)  # pyright: ignore[reportArgumentType]


def ours(model: MultimodalModel, batch: Batch) -> None:
    model.token_losses(batch).nll.mean().backward()
    model.zero_grad()


def theirs(peft_model: Any, model: MultimodalModel, batch: Batch) -> None:
    embeds = model._embed(batch, slice(None))
    mask = (batch.segments >= 0).long()
    # Hugging Face shifts labels itself: label t is what position t - 1 predicts.
    labels = torch.cat([torch.full_like(batch.targets[:, :1], -100), batch.targets[:, :-1]], dim=1)
    peft_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.positions, labels=labels
    ).loss.backward()
    peft_model.zero_grad()
    model.zero_grad()


if __name__ == "__main__":
    auto_cli(training_step)
