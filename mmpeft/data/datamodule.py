"""The data of a run, as Lightning asks for it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from mmpeft.data.collate import Batch
from mmpeft.data.loader import JointLoader, PackedLoader, PackingConfig
from mmpeft.data.sources import DataError, check_images, load_records
from mmpeft.data.template import IMAGE_MARKER, Encoded, Template
from mmpeft.embedded import home, resolve

Split = Literal["train", "val", "test", "predict"]
Loader = PackedLoader | JointLoader


@dataclass
class FinetuneData:
    """What one finetune of a joint run learns from; None is the run's own data."""

    train: list[str] | None = None
    val: list[str] | None = None
    test: list[str] | None = None
    max_steps: int | None = None
    """Batches after which it leaves."""


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
        style: "instruct" or LLaVA's "plain" (features, then the answer).
        finetunes: of a joint run, name -> its own data by split; None for what it shares. Taken from model.adapters.
        packing: how conversations fill rows and batches, of each finetune.
        limit: use only so many of the conversations of each split, for a quick look.
        cache: folder of vision features; None keeps them under the mmpeft home.
        seed: order of the training data.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        image_root: str | None = None,
        task: str | None = None,
        style: Literal["instruct", "plain"] = "instruct",
        finetunes: dict[str, FinetuneData] | None = None,
        packing: PackingConfig = PackingConfig(),  # noqa: B008 jsonargparse shows the defaults, nobody writes to them
        limit: int | None = None,
        cache: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        paths = {"train": train, "val": val, "test": test, "predict": predict}
        self.paths = {split: _listed(path) for split, path in paths.items()}
        self.finetunes = finetunes
        self.image_root, self.task = image_root, task
        self.style: Literal["instruct", "plain"] = style
        self.packing, self.limit, self.seed = packing, limit, seed
        self.cache = Path(cache) if cache else home() / "features"
        self.records: dict[Split, list[Any]] = {}
        self._ranges: dict[Split, dict[str, range]] = {}
        self.template: Template | None = None
        self._features: Callable[[Sequence[Any]], Tensor] | None = None
        self._adapter: str | None = None
        self._train_loader: Loader | None = None

    def setup(self, stage: str) -> None:
        """Reads and checks the records of the splits that the stage needs.

        Raises:
            DataError: a file, row or image is not as it must be; the message names all of them.
        """
        splits: tuple[Split, ...] = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,))  # pyright: ignore
        for split in splits:
            paths = self._paths_by_finetune(split)
            if any(paths.values()):
                self._read(split, paths)
            elif split not in ("val",) or stage == "validate":
                raise DataError(f"`mmpeft {stage}` needs data: set --data.{split} to a data file or folder")

    def connect(
        self,
        tokenizer: Any,
        image_tokens: int,
        features: Callable[[Sequence[Any]], Tensor],
        adapter: str | None,
    ) -> None:
        """Takes from the model what turning records into batches needs."""
        self.template = Template(tokenizer, image_tokens, self.style, self.packing.max_length)
        self._features, self._adapter = features, adapter

    def train_dataloader(self) -> Loader:
        if self._train_loader is None:
            self._train_loader = self._loader("train", self._encode("train"), self.seed)
        return self._train_loader

    def val_dataloader(self) -> Loader | list:
        return self._loader("val", self._encode("val"), None) if "val" in self.records else []

    def test_dataloader(self) -> Loader:
        return self.prompt_loader("test")

    def predict_dataloader(self) -> Loader:
        return self.prompt_loader("predict")

    def some_batches(self, name: str, number: int) -> list[Batch]:
        """The first ``number`` batches of a finetune's training data, without taking them from its epoch."""
        own = self._train_loader_of(name)
        return [own.batch(index) for index in range(min(number, len(own)))]

    def finetune_ranges(self, split: Split) -> dict[str, range]:
        """Of a joint run, each finetune's part of a split's records."""
        return self._ranges[split] if self.finetunes is not None else {}

    def total_steps(self, name: str) -> int:
        """Optimiser steps that a finetune will take.

        Not Lightning's ``estimated_stepping_batches``: where training ends by epochs that sets the loaders up before
        a checkpoint's state is there for them, and a resumed run would begin its epoch again (2.6.6).
        """
        trainer: Any = self.trainer
        most = [trainer.max_steps] if trainer.max_steps > 0 else []
        if self.finetunes is not None and self.finetunes[name].max_steps:
            most.append(self.finetunes[name].max_steps)
        if not self._ends_by_steps():
            own = self._train_loader_of(name)
            limit = trainer.limit_train_batches
            batches = min(len(own), limit) if isinstance(limit, int) else int(len(own) * (limit or 1.0))
            most.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
        if not most:
            raise ValueError("the run has no end: set trainer.max_steps or trainer.max_epochs")
        return max(1, min(most))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def prompt_loader(self, split: Split) -> Loader:
        """Prompts to be answered, in the order of the records."""
        assert self.template is not None, "connect() comes before the loaders"
        return self._loader(split, [self.template.encode_prompt(r) for r in self.records[split]], None)

    def instructions(self) -> dict[str, str | None]:
        """The tasks of the training data, the most frequent first, each with its instruction where it has just
        one (a caption task, say)."""
        questions: dict[str, set[str]] = {}
        tasks = Counter(record["task"] or "" for record in self.records.get("train", []))
        for record in self.records.get("train", []):
            question = record["turns"][0][0].replace(IMAGE_MARKER, "").strip()
            questions.setdefault(record["task"] or "", set()).add(question)
        return {
            task: next(iter(q)) if len(q := questions[task]) == 1 else None for task, _ in tasks.most_common()
        }

    def images(self) -> list[Any]:
        """Every image of the splits that were set up."""
        return [
            image for records in self.records.values() for record in records for image in record["images"]
        ]

    def _train_loader_of(self, name: str) -> PackedLoader:
        loader = self.train_dataloader()
        return loader.loaders[name] if isinstance(loader, JointLoader) else loader

    def _paths_by_finetune(self, split: Split) -> dict[str, list[str]]:
        """Each finetune's files, its own or the run's; under one name, "", where the run has just one finetune."""
        if self.finetunes is None:
            return {"": self.paths[split]}
        own = {name: getattr(data, split, None) for name, data in self.finetunes.items()}
        return {name: self.paths[split] if paths is None else paths for name, paths in own.items()}

    def _read(self, split: Split, paths: dict[str, list[str]]) -> None:
        """The records of all finetunes in one list; files that several share are read once."""
        by_files: dict[tuple[str, ...], list[Any]] = {}
        records: list[Any] = []
        self._ranges[split] = {}
        for name, files in paths.items():
            if not files:
                if split != "val":
                    raise DataError(
                        f"finetune {name!r} has no {split} data, neither its own nor data.{split}"
                    )
                continue
            key = tuple(files)
            if key not in by_files:
                by_files[key] = self._checked(split, files)
            self._ranges[split][name] = range(len(records), len(records) + len(by_files[key]))
            records += by_files[key]
        self.records[split] = records

    def _checked(self, split: Split, files: list[str]) -> list[Any]:
        records = [
            record
            for path in files
            for record in load_records(
                resolve(path), image_root=self.image_root, task=self.task, require_answers=split != "predict"
            )
        ][: self.limit]
        problems = check_images(records)
        if problems:
            raise DataError(f"{split}: {len(problems)} images cannot be used\n" + "\n".join(problems[:20]))
        return records

    def _encode(self, split: Split) -> list[Encoded]:
        assert self.template is not None, "connect() comes before the loaders"
        once = {id(record): record for record in self.records[split]}
        encoded = {key: self.template.encode(record) for key, record in once.items()}
        truncated = sum(example.truncated for example in encoded.values())
        if truncated:
            print(f"{split}: {truncated} of {len(encoded)} conversations were cut at max_length")
        return [encoded[id(record)] for record in self.records[split]]

    def _loader(self, split: Split, encoded: list[Encoded], seed: int | None) -> Loader:
        assert self._features is not None, "connect() comes before the loaders"
        loaders = {
            name: PackedLoader(
                encoded[own.start : own.stop],
                self._features,
                self.packing,
                name or self._adapter,
                seed,
                own.start,
            )
            for name, own in self._ranges[split].items()
        }
        if self.finetunes is None:
            return loaders[""]
        if split != "train":
            return JointLoader(loaders, {}, cycle=False)
        limits = {name: data.max_steps for name, data in self.finetunes.items() if data.max_steps}
        return JointLoader(loaders, limits, cycle=self._ends_by_steps())

    def _ends_by_steps(self) -> bool:
        return self.trainer is not None and self.trainer.max_epochs in (None, -1)


def _listed(paths: str | list[str] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else paths or []
