"""The data of a run, as Lightning asks for it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from mmpeft.data.batch import Batch, collate
from mmpeft.data.loader import JointLoader, PackedLoader, PackingConfig
from mmpeft.data.packing import pack
from mmpeft.data.sampling import sample_shots
from mmpeft.data.sources import DataError, load_records, require_images
from mmpeft.data.template import IMAGE_MARKER, Encoded, Example, Template
from mmpeft.errors import RefusedError
from mmpeft.paths import home, resolve

HELD_TEXT = "embedded/manual/held.jsonl"
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
    shots_seed: int | None = None
    """Which few-shot examples it gets."""


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
        shots: train on so many examples of every answer alone.
        shots_seed: which ones.
        weights: of the files of ``train``, in their order: the shares in which an epoch sees them; None sees every
            example once.
        answer_by: how `mmpeft test` and `predict` answer: "rank" picks the likeliest of a row's choices, "generate"
            writes; "auto" ranks the rows that have choices.
        metrics: of `mmpeft test`, by name; None takes those that fit the data.
        held_text: data file whose answers `mmpeft test --forgetting` reads as plain text.
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
        shots: int | None = None,
        shots_seed: int = 0,
        weights: list[float] | None = None,
        answer_by: Literal["auto", "generate", "rank"] = "auto",
        metrics: list[str] | None = None,
        held_text: str = HELD_TEXT,
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
        self.shots, self.shots_seed, self.weights = shots, shots_seed, weights
        self.answer_by, self.metrics, self.held_text = answer_by, metrics, held_text
        for name, value in (("shots", shots), ("limit", limit)):
            if value is not None and value < 1:
                raise RefusedError(f"data.{name} is {value}; it must be at least 1")
        if weights is not None and (shots is not None or not all(weight > 0 for weight in weights)):
            raise RefusedError(
                f"data.weights is {weights}; each must be above 0, and data.shots cannot stand beside them"
            )
        self.cache = Path(cache) if cache else home() / "features"
        self.records: dict[Split, list[Any]] = {}
        self.answered: set[int] = set()
        """Numbers of the records that `mmpeft test` or `predict` need not answer again."""
        self.wants_likelihoods = False
        """Whether a test also reads the true answers: for perplexity, asked for or of text alone."""
        self._ranges: dict[Split, dict[str, range]] = {}
        self.template: Template | None = None
        self._features: Callable[[Sequence[Any]], Tensor] | None = None
        self._adapter: str | None = None
        self._mixes: dict[str, list[tuple[int, float]]] = {}
        self._with_choices: dict[str, bool] = {}
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
            for record in self.records.get(split, []) if split != "train" else []:
                self.is_ranked(record)
        self.wants_likelihoods = stage == "test" and self._wants_likelihoods()

    def refuse_images(self, why: str) -> None:
        """Raises:
        DataError: a record has an image.
        """
        for record in (record for records in self.records.values() for record in records):
            if record["images"]:
                raise DataError(
                    f"{record['where']}: {record['id']!r} has an image, but {why}: name an encoder, or take text"
                )

    def connect(
        self,
        tokenizer: Any,
        image_tokens: int,
        features: Callable[[Sequence[Any]], Tensor],
        adapter: str | None,
        with_choices: dict[str, bool] | None = None,
    ) -> None:
        """Takes from the model what turning records into batches needs. ``with_choices``: finetune -> whether it
        learns from wrong choices as well; its name is "" where the run has just one."""
        self.template = Template(tokenizer, image_tokens, self.style, self.packing.max_length)
        self._features, self._adapter, self._with_choices = features, adapter, with_choices or {}

    def train_dataloader(self) -> Loader:
        if self._train_loader is None:
            self._train_loader = self._loader("train", self._encode("train"), self.seed)
        return self._train_loader

    def val_dataloader(self) -> Loader | list:
        return self._loader("val", self._encode("val"), None) if "val" in self.records else []

    def test_dataloader(self) -> list[Loader]:
        return self.question_loaders("test")

    def predict_dataloader(self) -> list[Loader]:
        return self.question_loaders("predict")

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
            raise RefusedError("the run has no end: set trainer.max_steps or trainer.max_epochs")
        return max(1, min(most))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def question_loaders(self, split: Split) -> list[Loader]:
        """What is to be answered, in the order of the records: prompts, then questions with choices."""
        assert self.template is not None, "connect() comes before the loaders"
        prompts: dict[int, Example] = {}
        choices: dict[int, Example] = {}
        for number, record in enumerate(self.records[split]):
            if number in self.answered:
                continue
            if self.is_ranked(record):
                choices[number] = self.template.encode_choices(record)
            else:
                prompts[number] = self.template.encode_prompt(record)
        return [self._loader(split, examples, None) for examples in (prompts, choices) if examples]

    def is_ranked(self, record: Any) -> bool:
        """Whether a record is answered by ranking its choices.

        Raises:
            DataError: it should be and has none.
        """
        if self.answer_by == "rank" and "choices" not in record:
            raise DataError(
                f"{record['where']}: {record['id']!r} has no choices to rank; add them, or set data.answer_by to auto"
            )
        return self.answer_by != "generate" and "choices" in record

    def _wants_likelihoods(self) -> bool:
        if self.metrics is not None:
            return "perplexity" in self.metrics
        return not any(record["images"] or "choices" in record for record in self.records["test"])

    def with_truths(self, split: Split, batch: Batch) -> Batch:
        """The conversations of a batch of prompts with their true answers, row by row."""
        assert self.template is not None, "connect() comes before the loaders"
        assert self._features is not None, "connect() comes before the loaders"
        rows = [pack([self._truth(split, number) for number in numbers]) for numbers in batch.examples]
        images = [image for row in rows for image in row.images]
        truths = collate(rows, self._features(images) if images else None, batch.adapters)
        return replace(truths.to(batch.input_ids.device), examples=batch.examples)

    def _truth(self, split: Split, number: int) -> Encoded:
        """A record's last question with its answer alone as target."""
        assert self.template is not None, "connect() comes before the loaders"
        record = self.records[split][number]
        return self.template.encode_answer(self.template.encode_prompt(record), record["turns"][-1][1])

    def held_texts(self) -> list[str]:
        """Plain text that nothing was trained on."""
        return [str(record["turns"][-1][1]) for record in load_records(resolve(self.held_text))]

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
        by_files: dict[tuple[str, ...], list[list[Any]]] = {}
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
            own = [record for part in by_files[key] for record in part]
            if split == "train" and self.shots is not None:
                own = sample_shots(own, self.shots, self._shots_seed(name))
            if split == "train" and self.weights is not None:
                self._mixes[name] = self._mix(files, [len(part) for part in by_files[key]])
            self._ranges[split][name] = range(len(records), len(records) + len(own))
            records += own
        self.records[split] = records

    def _checked(self, split: Split, files: list[str]) -> list[list[Any]]:
        """The records of each file."""
        left, parts = self.limit, []
        for number, path in enumerate(files):
            part = load_records(
                resolve(path), image_root=self.image_root, task=self.task, require_answers=split != "predict"
            )
            # with weights every file is to be seen
            share = left if left is None or self.weights is None else max(1, left // (len(files) - number))
            parts.append(part[:share])
            left = None if left is None else left - len(parts[-1])
        require_images([record for part in parts for record in part], split)
        return parts

    def _mix(self, files: list[str], sizes: list[int]) -> list[tuple[int, float]]:
        assert self.weights is not None
        if len(self.weights) != len(files):
            raise DataError(
                f"data.weights has {len(self.weights)} numbers for {len(files)} training files ({', '.join(files)}); "
                "give one for each"
            )
        return list(zip(sizes, self.weights, strict=True))

    def _shots_seed(self, name: str) -> int:
        own = self.finetunes[name].shots_seed if self.finetunes else None
        return self.shots_seed if own is None else own

    def _encode(self, split: Split) -> dict[int, Example]:
        """Number of the record -> what a finetune learns from or is validated on."""
        assert self.template is not None, "connect() comes before the loaders"
        encoded: dict[int, Example] = {}
        once: dict[tuple[int, bool], Example] = {}
        for name, own in self._ranges[split].items():
            for number in own:
                record = self.records[split][number]
                ranked = self._with_choices.get(name, False) and "choices" in record
                if (id(record), ranked) not in once:
                    encode = self.template.encode_choices if ranked else self.template.encode
                    once[id(record), ranked] = encode(record)
                encoded[number] = once[id(record), ranked]
        truncated = sum(example.truncated for example in once.values())
        if truncated:
            print(f"{split}: {truncated} of {len(once)} conversations were cut at max_length")
        return encoded

    def _loader(self, split: Split, examples: dict[int, Example], seed: int | None) -> Loader:
        assert self._features is not None, "connect() comes before the loaders"
        loaders: dict[str, PackedLoader] = {}
        for name, own in self._ranges[split].items():
            numbers = [number for number in own if number in examples]
            if numbers:
                encoded = [examples[number] for number in numbers]
                adapter = name or self._adapter
                mix = self._mixes.get(name) if split == "train" else None
                loaders[name] = PackedLoader(
                    encoded, self._features, self.packing, adapter, seed, numbers, mix
                )
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
