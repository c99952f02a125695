"""The LightningDataModule, first step of a run's data: files -> records, checked, before any model is there."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from mmpeft.data.feature_cache.settings import CacheConfig, cache_config
from mmpeft.data.formats import DataError
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.plan import PackingConfig
from mmpeft.data.records import IMAGE_MARKER, Record
from mmpeft.data.sampling import sample_shots
from mmpeft.data.sequences import Chained
from mmpeft.data.sources import OnBadSample, load_records, require_images, with_images
from mmpeft.data.store import first_of_image_sets
from mmpeft.data.template import STYLES, LayoutName
from mmpeft.errors import RefusedError, require_positive
from mmpeft.paths import resolve
from mmpeft.training.finetune import Finetune, Split

SPLITS: dict[str, tuple[Split, ...]] = {
    **{"fit": ("train", "val"), "validate": ("val",)},
    **{"test": ("test",), "predict": ("predict",)},
}
"""Stage -> the splits it reads."""


class VisionLanguageData(L.LightningDataModule):
    """Conversations about images, or about none.

    Everything that can be wrong with the files is found here, before any model is loaded.

    Args:
        train: data file or folder to train on, or several; "embedded/easy-vqa/train.jsonl" comes with
            `mmpeft prepare`.
        val: data for the validation curve.
        test: held-out data for `mmpeft test`.
        predict: data whose answers are to be written by `mmpeft predict`.
        image_root: folder that image paths start from; by default the data file's.
        task: identifier put before every instruction, such as vqa or caption; a row's own "task" goes first.
        template: layout of a conversation: "minigpt" (``[INST] <Img>features</Img> ...``), "chat" (the model's own chat
            template, for instruct models), or LLaVA's "plain" (features, then the answer).
        style: has moved to template, where "instruct" is "minigpt".
        packing: how conversations fill rows and batches, of each finetune.
        limit: use only so many of the conversations of each split, for a quick look.
        columns: what your columns are, where their names are not known: our key -> yours, such as
            ``{image: img_name, question: prompt, answer: response}``.
        ignore: columns that are left out, and tags such as ``"<video>"`` that are text.
        on_bad_sample: of train: whether a row that is not valid, or too long to be learnt from, or whose image is
            missing or cannot be decoded, is an error, or is left out and counted. What ``shots`` drew must be good.
        text_only: train on text alone, although the model has an encoder.
        shots: train on so many examples of every answer alone.
        shots_seed: which ones.
        weights: of the files of ``train``, in their order: the shares in which an epoch sees them; None sees every
            example once.
        answer_by: has moved to test.answer_by.
        metrics: has moved to test.metrics.
        held_text: has moved to test.held_text.
        cache: folder of vision features, or a section: folder, max_gb, build; None keeps them under the mmpeft home.
        seed: order of the training data, and what dropout drops.
        workers: threads that decode, tokenise and collate ahead of the step; null is one for every second core, at most
            8. The batches do not depend on it.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        image_root: str | None = None,
        task: str | None = None,
        template: LayoutName = "minigpt",
        style: Literal["instruct", "plain"] | None = None,
        packing: PackingConfig = PackingConfig(),  # noqa: B008 jsonargparse shows the defaults, nobody writes to them
        limit: int | None = None,
        columns: dict[str, str] | None = None,
        ignore: list[str] | None = None,
        on_bad_sample: OnBadSample = "raise",
        text_only: bool = False,
        shots: int | None = None,
        shots_seed: int = 0,
        weights: list[float] | None = None,
        answer_by: Literal["auto", "generate", "rank"] | None = None,
        metrics: list[str] | None = None,
        held_text: str | None = None,
        cache: str | CacheConfig | None = None,
        seed: int = 0,
        workers: int | None = None,
    ):
        super().__init__()
        paths: dict[Split, Any] = {"train": train, "val": val, "test": test, "predict": predict}
        self.paths = {split: [path] if isinstance(path, str) else path or [] for split, path in paths.items()}
        self.image_root, self.task = image_root, task
        self.template: LayoutName = template if style is None else _moved_to_template(style, template)
        self.packing, self.limit, self.seed, self.workers = packing, limit, seed, workers
        self.shots, self.shots_seed, self.weights = shots, shots_seed, weights
        given = {"answer_by": answer_by, "metrics": metrics, "held_text": held_text}
        self.moved = {name: value for name, value in given.items() if value is not None}
        """Settings that belong into the section ``test:``."""
        for name in self.moved:
            print(f"data.{name} has moved: write test.{name}", file=sys.stderr)
        for split, given in self.paths.items():
            if "" in given:
                raise RefusedError(f"data.{split} is an empty path; wanted a data file or folder, or null")
        for name, value in (("shots", shots), ("limit", limit), ("workers", workers)):
            require_positive(f"data.{name}", value)
        if weights is not None and (
            shots is not None or not all(0 < weight < math.inf for weight in weights)
        ):
            raise RefusedError(
                f"data.weights is {weights}; each must be a number above 0, and data.shots cannot stand beside them"
            )
        self.columns = Columns(columns or {}, ignore or [])
        self.on_bad_sample: OnBadSample = on_bad_sample
        self.text_only = text_only
        self.notes: dict[Split, Notes] = {}
        """What reading left aside."""
        self.cache = cache_config(cache)

    def setup(self, stage: str) -> None:
        """Reads the records of the splits that a stage of Lightning needs."""
        self.read(TrainerFn(stage).value, self._module.finetunes)  # in text the enum is its class and member

    def read(self, stage: str, finetunes: Mapping[str, Finetune]) -> None:
        """Gives every finetune its records of the splits that a stage needs.

        Raises:
            DataError: a file, row or image is not as it must be; the message names all of them.
        """
        for split in SPLITS[stage]:
            self.notes.pop(split, None)
            files = {name: own.paths.get(split, self.paths[split]) for name, own in finetunes.items()}
            if any(files.values()):
                self._read(split, finetunes, files)
            elif split != "val" or stage == "validate":
                raise DataError(f"`mmpeft {stage}` needs data: set --data.{split} to a data file or folder")
        self._tell(stage)

    def train_dataloader(self) -> Any:
        return self._module.batches.train()

    def val_dataloader(self) -> Any:
        return self._module.batches.val()

    def test_dataloader(self) -> Any:
        return self._module.begin_evaluation("test")

    def predict_dataloader(self) -> Any:
        return self._module.begin_evaluation("predict")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches of training move; the engine moves its own."""
        return batch.to(device) if hasattr(batch, "to") else batch

    @property
    def _module(self) -> Any:
        """Step two, records -> batches, needs the model's tokenizer and encoder: the module has them."""
        return self.trainer.lightning_module  # pyright: ignore[reportOptionalMemberAccess]

    @property
    def skips_late(self) -> bool:
        """Whether training rows that are found to be bad once the model is there are left out."""
        return self.on_bad_sample == "skip" and self.shots is None

    def tell_skipped(self, notes: Notes) -> None:
        """Says which training rows were left out beside those of `read`."""
        self.notes["train"].add(notes)
        for line in notes.skipped_lines:
            print(f"train: {line}", file=sys.stderr)

    def _read(self, split: Split, finetunes: Mapping[str, Finetune], files: Mapping[str, list[str]]) -> None:
        """Files that several finetunes share are read once."""
        by_files: dict[tuple[bool, tuple[str, ...]], list[Sequence[Record]]] = {}
        for name, own in files.items():
            if not own:
                if split != "val":
                    raise DataError(
                        f"finetune {name!r} has no {split} data, neither its own nor data.{split}"
                    )
                continue
            finetune = finetunes[name]
            if (way := (finetune.learns_from_labels and split in SPLITS["fit"], tuple(own))) not in by_files:
                by_files[way] = self._checked(split, own, labelled=way[0])
            records: Sequence[Record] = Chained(parts := by_files[way])
            if split == "train" and self.shots is not None:
                seed = self.shots_seed if finetune.shots_seed is None else finetune.shots_seed
                records = sample_shots(records, self.shots, seed)
            if split == "train" and self.weights is not None:
                finetune.mix = self._mix(own, [len(part) for part in parts])
            finetune.records[split] = records

    def _checked(self, split: Split, files: list[str], labelled: bool) -> list[Sequence[Record]]:
        """The records of each file, ``labelled`` as of `load_records`."""
        left = self.limit
        parts: list[Sequence[Record]] = []
        notes = self.notes.setdefault(split, Notes())
        bad = self.on_bad_sample if split == "train" else "raise"
        for number, path in enumerate(files):
            part = load_records(
                *(resolve(path), self.columns),
                image_root=self.image_root,
                task=self.task,
                require_answers=split != "predict",
                on_bad_sample=bad,
                each_caption=split == "train",
                labelled=labelled,
                notes=notes,
            )
            if bad == "skip":
                part = with_images(part, notes)
            if left is not None:
                share = left // (len(files) - number)  # with weights every file is to be seen
                part = part[: left if self.weights is None else max(1, share)]
                left -= len(part)
            parts.append(part)
        require_images(Chained(parts), split)
        return parts

    def _tell(self, stage: str) -> None:
        """What reading left aside, once, and columns that no row has."""
        notes = {split: self.notes[split] for split in SPLITS[stage] if split in self.notes}
        if notes:
            mapped = sum((own.mapped for own in notes.values()), Counter())
            self.columns.check_used(Notes(mapped=mapped), f"the data of `mmpeft {stage}`")
        for split, own in notes.items():
            own.tell(split)

    def _mix(self, files: list[str], sizes: list[int]) -> list[tuple[int, float]]:
        assert self.weights is not None, "only data.weights mixes files"
        if len(self.weights) != len(files):
            raise DataError(
                f"data.weights has {len(self.weights)} numbers for {len(files)} training files ({', '.join(files)}); "
                "give one for each"
            )
        return list(zip(sizes, self.weights, strict=True))


def _moved_to_template(style: str, template: LayoutName) -> LayoutName:
    """What the old key ``style`` says."""
    wanted = STYLES[style]
    print(f"data.style has moved: write data.template: {wanted}", file=sys.stderr)
    if template not in ("minigpt", wanted):
        raise RefusedError(
            f"data.style ({style}) has moved to data.template ({template}), and both are given; keep the second"
        )
    return wanted


def all_records(finetunes: Iterable[Finetune], *splits: Split) -> Sequence[Record]:
    """The records of all finetunes, of these splits or of every one that was read."""
    return Chained(
        [
            own
            for finetune in finetunes
            for split, own in finetune.records.items()
            if not splits or split in splits
        ]
    )


def require_some_image(records: Sequence[Record]) -> None:
    """Raises:
    DataError: no record has an image.
    """
    if records and not any(record["images"] for record in first_of_image_sets(records)):
        raise DataError(
            f"{records[0]['where']} and all other rows have no image, but the model has an encoder: name the images in "
            "the rows (docs/data.md), or say that there are none with data.text_only: true"
        )


def refuse_images(records: Sequence[Record], why: str) -> None:
    """Raises:
    DataError: a record has an image.
    """
    for record in first_of_image_sets(records):
        if record["images"]:
            raise DataError(
                f"{record['where']}: {record['id']!r} has an image, but {why}: name an encoder, or take text"
            )


def instructions(records: Sequence[Record]) -> dict[str, str | None]:
    """The tasks of training data, the most frequent first, each with its instruction where it has just one (a caption
    task, say)."""
    questions: dict[str, str | None] = {}
    tasks: Counter[str] = Counter()
    for record in records:
        task, question = record["task"] or "", record["turns"][0][0].replace(IMAGE_MARKER, "").strip()
        tasks[task] += 1
        if questions.setdefault(task, question) != question:
            questions[task] = None
    return {task: questions[task] for task, _ in tasks.most_common()}
