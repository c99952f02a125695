"""The same rows, base and LoRA trained by `mmpeft fit` and by its peers, each over whole epochs with its optimiser.

The peers have a row per question, group rows by length, and get every row tokenised beforehand: transformers' `Trainer`
with peft's LoRA, its encoder in the step or its features for free; and a bare loop of peft's steps without optimiser.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import lightning as L
import peft
import torch
import transformers
from torch import Tensor

from benchmarks.peers import ByLength, Peer, Rows, TrainerClock, collate_rows
from benchmarks.race import Race
from mmpeft.adapters import LoraConfig
from mmpeft.data.feature_cache.settings import CacheConfig
from mmpeft.data.plan import PackingConfig
from mmpeft.data.sources import load_records
from mmpeft.data.template import Encoded, Template
from mmpeft.models.language import LanguageConfig, load_language_model, load_tokenizer
from mmpeft.models.vision import VisionConfig, make_encoder
from mmpeft.paths import VISION_WEIGHTS, resolve
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.module import VisionLanguageModule

TARGETS = ["q_proj", "v_proj"]
RATE = 2e-3
OURS, ONLINE, FREE, BARE = (
    "mmpeft fit",
    "Trainer, encoder in the step",
    "Trainer, features for free",
    "peft, bare steps",
)


def embedded_vision(image_size: int = 96) -> VisionConfig:
    """The embedded encoder: a token for every 32 x 32 pixels."""
    return VisionConfig(weights=VISION_WEIGHTS, image_size=image_size, fit="squash")


@dataclass
class Recipe:
    """What is trained on, and how."""

    data: str
    rows: int
    """The first of the data, of which each is a question or a text."""
    vision: VisionConfig | None
    packing: PackingConfig
    epochs: int = 1
    """With 2 or more mmpeft keeps the features on disk; the time is that of an epoch."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    attention: str = "sdpa"
    """Of the peers."""

    def race(self, title: str, unit: str = "questions/s") -> Race:
        """All of them; nothing is loaded before its first turn."""
        peers: dict[str, Callable[[], float]] = {ONLINE: self._trainer(True), FREE: self._trainer(False)}
        if self.vision is None:
            peers = {"Trainer": self._trainer(False)}
        runs = {OURS: self._fit(), **peers, BARE: self._bare()}
        losses = self._losses
        return Race(
            title,
            {name: lambda run=run: self.rows / run() for name, run in runs.items()},
            against=tuple(name for name in runs if name != OURS),
            unit=unit,
            measured=True,
            repeats=3,
            facts={"rows": self.rows},
            told=lambda name, _: {"loss": round(losses[name], 3)} if name in losses else {},
        )

    def __post_init__(self) -> None:
        self._losses: dict[str, float] = {}
        """Of each after its last epoch, as it logs it."""

    # -- ours -----------------------------------------------------------------------------------------------

    def _fit(self) -> Callable[[], float]:
        """Seconds of an epoch of a fit."""
        module: VisionLanguageModule | None = None
        folder = tempfile.TemporaryDirectory()

        def run() -> float:
            nonlocal module
            if module is None:
                adapter = LoraConfig(rank=16, alpha=32, target_modules=TARGETS)
                module = VisionLanguageModule(
                    self.language, self.vision, adapter, learning_rate=RATE, projector_learning_rate=RATE
                )
            data = VisionLanguageData(
                resolve(self.data), limit=self.rows, packing=self.packing, cache=CacheConfig(folder.name)
            )
            clock, quiet = (
                _Clock(),
                {"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
            )
            with silent():
                trainer = L.Trainer(
                    **quiet,
                    **{"enable_checkpointing": False, "default_root_dir": folder.name, "devices": 1},
                    max_epochs=self.epochs,
                    gradient_clip_val=1.0,
                    callbacks=[clock],
                )
                trainer.fit(module, datamodule=data)
            self._losses[OURS] = clock.loss
            return clock.seconds / self.epochs

        return run

    # -- the peers --------------------------------------------------------------------------------------------

    @cached_property
    def _encoder(self) -> Any:
        return make_encoder(self.vision)

    @cached_property
    def _examples(self) -> list[Encoded]:
        tokenizer, tokens = load_tokenizer(self.language.name), self._encoder.num_tokens
        template = Template(tokenizer, tokens, "minigpt", self.packing.max_length)
        records = load_records(resolve(self.data))[: self.rows]
        return [template.encode(record) for record in records]  # pyright: ignore[reportReturnType]

    def _peer(self, online: bool) -> "Peer":
        language = load_language_model(replace(self.language, attention=self.attention))  # pyright: ignore
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
        adapted = peft.get_peft_model(language, config)  # pyright: ignore[reportArgumentType]
        return Peer(adapted, None if self.vision is None else self._encoder, online)

    def _trainer(self, online: bool) -> Callable[[], float]:
        """Seconds of an epoch of `transformers.Trainer`."""
        peer: Peer | None = None
        folder = tempfile.TemporaryDirectory()
        name = "Trainer" if self.vision is None else ONLINE if online else FREE

        def run() -> float:
            nonlocal peer
            peer = peer or self._peer(online)
            rows = Rows(self._examples, self._encoder, online)
            clock = TrainerClock()
            how = transformers.TrainingArguments(
                folder.name,
                num_train_epochs=1,
                per_device_train_batch_size=self.packing.batch_size,
                learning_rate=RATE,
                lr_scheduler_type="cosine",
                bf16=next(peer.language.parameters()).dtype is torch.bfloat16,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
                remove_unused_columns=False,
                **{"save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True},
            )
            with silent():
                trainer = ByLength(peer, how, collate_rows, rows, callbacks=[clock])
                trainer.remove_callback(transformers.PrinterCallback)
                trainer.train()
            self._losses[name] = clock.loss
            return clock.seconds

        return run

    def _bare(self) -> Callable[[], float]:
        """Seconds of forward and backward over all rows by peft, nothing else."""
        peer: Peer | None = None
        batches: list[dict[str, Tensor]] = []

        def run() -> float:
            nonlocal peer
            if peer is None:
                peer, rows = self._peer(False), Rows(self._examples, self._encoder, False)
                order = sorted(range(len(rows)), key=lambda number: len(rows.examples[number].ids))
                size = self.packing.batch_size
                batches.extend(
                    collate_rows([rows[number] for number in order[start : start + size]])
                    for start in range(0, len(order), size)
                )
            begun = time.perf_counter()
            for batch in batches:
                peer(**batch)["loss"].backward()
                peer.zero_grad()
            return time.perf_counter() - begun

        return run


class _Clock(L.Callback):
    """From the first batch's reading to the last step's end."""

    seconds = loss = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seconds += time.perf_counter()
        self.loss = float(trainer.callback_metrics["train_loss"])


@contextmanager
def silent() -> Iterator[None]:
    """Without Lightning's and transformers' lines about what they do, which would stand among those of JSON."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
