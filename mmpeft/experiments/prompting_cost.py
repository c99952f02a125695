"""What answers and a training take: operations that are counted while they run, and time."""

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from mmpeft.data.encoding import encode_images
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.loader import PackedLoader
from mmpeft.data.plan import PackingConfig
from mmpeft.data.records import Record
from mmpeft.data.template import Template
from mmpeft.errors import RefusedError
from mmpeft.experiments.flops import Operations, count_operations
from mmpeft.experiments.prompting import FewShotPrompt
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.training.batches import make_loader
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.finetune import Finetune, Settings
from mmpeft.training.objectives import ChoiceLosses

GIGA = 1e9
STEPS_COUNTED = 8
"""Training batches whose mean stands for all."""


def answer(prompt: FewShotPrompt, record: Record, kept: bool) -> Tensor:
    """(choices,) scores, the images encoded now: all, or the question's own where the examples are kept."""
    if kept:
        return prompt.kept_scores(prompt.encode(record), prompt.features(record["images"]))
    return prompt.scores(record)


def cost(prompt: FewShotPrompt, records: Sequence[Record], kept: bool) -> dict[str, float]:
    """GFLOP of an answer, mean over the questions, and its milliseconds, their median."""
    products, seconds = [], []
    for record in records:
        products.append(count_operations(lambda asked=record: answer(prompt, asked, kept)).products)
        started = time.perf_counter()
        answer(prompt, record, kept)
        seconds.append(time.perf_counter() - started)
    return {"gflop": statistics.mean(products) / GIGA, "ms": 1000 * statistics.median(seconds)}


def operations(prompt: FewShotPrompt, record: Record) -> Operations:
    """Of one answer, encoder included."""
    return count_operations(lambda: answer(prompt, record, False))


def encoding_of(model: MultimodalModel, images: Sequence[str | bytes]) -> Operations:
    """Of the vision encoder; none without images."""
    return count_operations(lambda: encode_images(model.vision_encoder, images)) if images else Operations()


def training_cost(run: str, model: MultimodalModel, template: Template, adapter: str) -> dict[str, Any]:
    """GFLOP of the finetune's training: forward and backward of its batches, and the encoder once over each image.
    Validation is no part of it. {"note": why} where the run's config does not tell."""
    try:
        settings = yaml.safe_load((Path(run) / "config.yaml").read_text())
        trainer, own = settings["trainer"], settings["model"]
        if own.get("adapters"):
            return {"note": f"{run} is a joint run, of which one finetune cannot be told apart"}
        packing = PackingConfig(**settings["data"]["packing"])
        data = VisionLanguageData(**settings["data"] | {"packing": packing})
        losses = ChoiceLosses(**own.get("choice_losses", {"unlikelihood": 0.0, "length_normalised": 0.0}))
        finetune = Finetune(adapter, None, Settings(choice_losses=losses))
        data.read("fit", {adapter: finetune})
    except (RefusedError, OSError) as error:
        return {"note": f"{run}/config.yaml: {error}"}
    features = partial(encode_images, model.vision_encoder)
    loader = make_loader(
        *({adapter: finetune}, "train", template, features, packing, {adapter: adapter}, data.seed),
        skipped=Notes() if data.skips_late else None,
    )
    assert isinstance(loader, PackedLoader), "a single finetune without steps of its own"
    batches = _number_of_batches(trainer, loader)
    if not batches:
        return {"note": f"{run}/config.yaml has neither trainer.max_steps nor trainer.max_epochs"}
    images = {image for record in finetune.records["train"] for image in record["images"]}
    vision = encoding_of(model, list(images)[:1])
    each = _batch_operations(model, loader, own["train_projector"]) / GIGA
    total = batches * each + len(images) * vision.products / GIGA
    return {"gflop": total, "batches": batches, "gflop_of_a_batch": each, "images": len(images)}


def _number_of_batches(trainer: dict[str, Any], loader: PackedLoader) -> int:
    """Of the whole training; 0 where the settings do not tell."""
    batches = (trainer["max_steps"] or -1) * trainer["accumulate_grad_batches"]
    if batches < 0:
        batches = (trainer["max_epochs"] or 0) * len(loader)
    return batches


def _batch_operations(model: MultimodalModel, loader: PackedLoader, train_projector: bool) -> float:
    """Operations of forward and backward, mean over some batches."""
    model.projector.requires_grad_(train_projector)
    model.train()  # gradient checkpointing, where it is on, computes the forward twice

    def train(batch: Any) -> None:
        model.token_losses(batch.to(model.device)).nll.sum().backward()

    some = [loader.batch(number) for number in range(min(STEPS_COUNTED, len(loader)))]
    counted = [count_operations(lambda batch=batch: train(batch)) for batch in some]
    model.eval().zero_grad()
    return statistics.mean(batch.products for batch in counted)
