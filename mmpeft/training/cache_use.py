"""Which images' features a run writes to disk: those that it sees often enough."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmpeft.data.feature_cache.encoder_folder import tell
from mmpeft.data.features import IN_THE_STEP, FeatureCache
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.records import Record
from mmpeft.data.sequences import Chained, parts_of
from mmpeft.data.sources import UNDECODABLE, with_images
from mmpeft.data.store import first_of_image_sets
from mmpeft.data.unusable_image import naming_its_row
from mmpeft.errors import RefusedError
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
        RefusedError: an image of a fit cannot be read, and is not of a training row that may be left out.
    """
    if data.cache.build == "never":
        return
    seen: dict[str, list[Split]] = {}
    for name, finetune in finetunes.items():
        own: list[Split] = [split for split in finetune.records if split != "train"]
        epochs = _epochs(finetune, data, trainer) if stage == "fit" else LEAST_EPOCHS
        if data.cache.build == "always" or epochs >= LEAST_EPOCHS:
            own.append("train")
        else:
            _tell_why(features, f"the training images of {name}", finetune.records.get("train", []), epochs)
        seen[name] = own
    if stage != "fit" or not data.skips_late:
        _build(features, finetunes, seen, skip_unreadable=stage in ("test", "predict"))
        return
    held: dict[str, list[Split]] = {name: [s for s in own if s != "train"] for name, own in seen.items()}
    _build(features, finetunes, held, skip_unreadable=False)
    _build(features, finetunes, seen, skip_unreadable=True)


def _tell_why(features: FeatureCache, which: str, records: Sequence[Record], epochs: float) -> None:
    """Why images are not written, if there are any."""
    if next(images_of(records), None) is None:
        return
    if _are_held(features, images_of(records)):
        return tell(f"{which} are there already: nothing is to be written")
    tell(
        f"{which} are not written: they are seen in {epochs:.2g} epochs, and from {LEAST_EPOCHS} on it pays. "
        f"{IN_THE_STEP}; data.cache.build=always writes them for other runs"
    )


def _are_held(features: FeatureCache, images: Iterable[str | bytes]) -> bool:
    """Whether no image is to be encoded. Those that are there are not read for it, and the first that is not ends
    it."""
    try:
        return all(map(features.holds, images))
    except RefusedError:  # the step that needs it says so
        return False


def _build(
    features: FeatureCache,
    finetunes: Mapping[str, Finetune],
    splits: Mapping[str, list[Split]],
    skip_unreadable: bool,
) -> None:
    """Encodes the images of some splits of every finetune."""
    records = Chained([all_records([finetunes[name]], *own) for name, own in splits.items() if own])
    with naming_its_row(first_of_image_sets(records)):
        features.build(images_of(records), skip_unreadable=skip_unreadable)


def images_of(records: Sequence[Record]) -> Iterator[str | bytes]:
    """The images of records, those of a set once."""
    return (image for record in first_of_image_sets(records) for image in record["images"])


def leave_out_undecodable(features: FeatureCache, finetunes: Mapping[str, Finetune], notes: Notes) -> None:
    """Training rows whose image cannot be decoded go, before it is planned in which step they would come.

    Args:
        features: has encoded what is to be kept.
        notes: is told of them.

    Raises:
        DataError: no row of a file is left.
    """
    faults = features.undecodable(images_of(all_records(finetunes.values(), "train")))
    if not faults:
        return
    kept: dict[
        int, tuple[Any, Any]
    ] = {}  # of a file that several finetunes share, once; with what its id is of
    for finetune in finetunes.values():
        for part in parts_of(finetune.records["train"]):
            if id(part) not in kept:
                kept[id(part)] = part, with_images(part, notes, UNDECODABLE, faults.get)
        parts = [kept[id(part)][1] for part in parts_of(finetune.records["train"])]
        finetune.keep("train", Chained(parts))


def _epochs(finetune: Finetune, data: VisionLanguageData, trainer: Any) -> float:
    """How often a finetune sees its training data, as its loader will count batches."""
    examples = len(finetune.records.get("train", []))
    batches: Any = range(max(1, round(examples / data.packing.batch_size)))  # its length is all that counts
    return total_steps(finetune, batches, trainer) * trainer.accumulate_grad_batches / len(batches)
