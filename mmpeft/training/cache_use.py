"""Which images' features a run writes to disk: those that it sees often enough."""

from collections.abc import Mapping
from typing import Any

from mmpeft.data.feature_cache.encoder_folder import tell
from mmpeft.data.features import IN_THE_STEP, FeatureCache
from mmpeft.data.sequences import Chained
from mmpeft.data.store import first_of_image_sets
from mmpeft.training.batches import total_steps
from mmpeft.training.datamodule import VisionLanguageData, all_records
from mmpeft.training.finetune import Finetune, Split

LEAST_EPOCHS = 2
"""Of which every one but the first reads what the first wrote."""


def fill_cache(
    features: FeatureCache,
    data: VisionLanguageData,
    finetunes: Mapping[str, Finetune],
    trainer: Any,
    stage: str,
) -> None:
    """Encodes images that are not on disk yet, as `data.cache.build` says. Why others are left to the step is said.

    A test and a validation are taken for seen again: the next checkpoint or finetune is asked the same.

    Raises:
        RefusedError: an image of a fit cannot be read.
    """
    if data.cache.build == "never":
        return
    seen: dict[str, list[Any]] = {}
    for name, finetune in finetunes.items():
        own: list[Split] = [split for split in finetune.records if split != "train"]
        epochs = _epochs(finetune, data, trainer) if stage == "fit" else LEAST_EPOCHS
        if data.cache.build == "always" or epochs >= LEAST_EPOCHS:
            own.append("train")
        elif any(record["images"] for record in first_of_image_sets(finetune.records.get("train", []))):
            tell(
                f"the training images of {name} are not written: they are seen in {epochs:.2g} epochs, and from "
                f"{LEAST_EPOCHS} on it pays. {IN_THE_STEP}; data.cache.build=always writes them for other runs"
            )
        seen[name] = own
    records = Chained([all_records([finetunes[name]], *own) for name, own in seen.items() if own])
    images = (image for record in first_of_image_sets(records) for image in record["images"])
    features.build(images, skip_unreadable=stage in ("test", "predict"))


def _epochs(finetune: Finetune, data: VisionLanguageData, trainer: Any) -> float:
    """How often a finetune sees its training data, as its loader will count batches."""
    examples = len(finetune.records.get("train", []))
    batches: Any = range(max(1, round(examples / data.packing.batch_size)))  # its length is all that counts
    return total_steps(finetune, batches, trainer) * trainer.accumulate_grad_batches / len(batches)
