"""Memory said before it is spent: what a fit will need at most, of what is there, and what to set where it is less."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from mmpeft.adapters.base_weights import is_4bit
from mmpeft.data.batch import Batch, collate, concatenate
from mmpeft.data.features import FeatureCache
from mmpeft.data.loader import JointLoader, PackedLoader
from mmpeft.data.packing import PackedRow
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.prepacked import free_memory
from mmpeft.training.malloc import return_freed_memory
from mmpeft.training.run_writer import peak_memory_bytes
from mmpeft.training.sharding import sharded
from mmpeft.training.step_memory import count_step

STATUS = Path("/proc/self/status")
SPLINTERED = 0.3
"""Of the bytes of a step, what malloc needs beside them on a processor: freed pieces into which no other tensor fits.
Measured with glibc 2.36: 0.28 to 0.31 on a model of 135M parameters, in float32 and in bfloat16."""
KERNELS = 2**26
"""Buffers that kernels keep, 30 to 60 MB on either device."""
STATE = {"adamw": 2.0, "adafactor": 0.05}
"""Numbers that the optimiser keeps for one that trains; Adafactor's are row and column means of matrices."""


@dataclass
class Estimate:
    """Bytes at once, on the device that trains."""

    base: int
    """Language model and encoder."""
    adapters: int
    """With the projector."""
    optimizer: int
    activations: int
    """Of the largest batch, with the gradients of what trains."""
    logits: int
    features: int
    """Still to come."""
    pages: int
    """Of these, what lies in files: the system takes it back as it needs."""
    beside: int
    """The process and its libraries; what tensors leave unused between them."""
    before: int
    """The highest so far, as while the model was loaded."""
    rows: int
    width: int
    """Of the largest batch."""

    @property
    def step(self) -> int:
        """What grows with the batch."""
        return self.activations + self.logits

    @property
    def total(self) -> int:
        parts = (self.base, self.adapters, self.optimizer, self.step, self.features, self.beside)
        return max(sum(parts), self.before)

    @property
    def needed(self) -> int:
        """What must be there: without pages of files, and what was freed since."""
        return (
            self.base + self.adapters + self.optimizer + self.step + self.features - self.pages + self.beside
        )


def estimate(
    model: MultimodalModel,
    optimizer: str,
    batch: Batch,
    features_to_come: int = 0,
    on_disk: bool = False,
    times: int = 1,
) -> Estimate:
    """What training will need.

    Args:
        model: with its adapters, on its device, before the first step.
        optimizer: "adamw" or "adafactor".
        batch: the largest; its features need no numbers.
        features_to_come: bytes of features that main memory does not hold yet.
        on_disk: whether they lie in files that are mapped.
        times: batches whose gradients are added up.

    Raises:
        Exception: as of `count_step`.
    """
    on_cpu, training = model.device.type == "cpu", model.training
    before = peak_memory_bytes()
    model.train()
    try:
        live = count_step(model, batch.to(model.device), times)
    finally:
        model.train(training)
    frozen = {*model.language_model.parameters(), *model.language_model.buffers()}
    frozen |= {*model.vision_encoder.parameters(), *model.vision_encoder.buffers()}
    own = {*model.projector.parameters(), *model.bank.parameters()}
    base, adapters = _bytes(frozen), _bytes(own - frozen)
    trained = [each for each in own if each.requires_grad]
    state, gradients = round(STATE[optimizer] * _bytes(trained)), _bytes(trained)
    # beside its state an optimiser makes two tensors of the size of a gradient: of one at a time, on a GPU of all
    working = 2 * (max((each.nbytes for each in trained), default=0) if on_cpu else gradients)
    step = max(live.peak, gradients + working)
    splinters = round(SPLINTERED * step) + KERNELS if on_cpu else KERNELS
    if on_cpu:
        return_freed_memory()
    used = resident() if on_cpu else torch.cuda.memory_allocated(model.device)
    to_come = features_to_come if on_cpu else 0
    return Estimate(
        *(base, adapters, state, step - live.apart, live.apart, to_come, to_come if on_disk else 0),
        *(max(0, used - base - adapters) + splinters, before, *batch.input_ids.shape),
    )


def resident() -> int:
    """Bytes of this process in main memory; 0 where the system does not say."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def room(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process may have on a device, those that it has among them; 0 where the system does not say. On a
    CPU as many ``processes`` as share it have as much each."""
    if device.type == "cpu":
        free = free_memory()
        return free and free // processes + resident()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def told(
    found: Estimate,
    there: int,
    batch_size: int,
    recomputes: bool,
    seconds: float,
    in_4_bits: bool = False,
    processes: int = 1,
) -> list[str]:
    """The lines that say it.

    Args:
        found: what is needed.
        there: bytes that there are; 0 is unknown.
        batch_size: `data.packing.batch_size`.
        recomputes: whether activations are recomputed.
        seconds: that finding it out took.
        in_4_bits: whether the base is held so.
        processes: that need as much each.
    """
    pages = "features (pages of files, which the system can take back)" if found.pages else "features"
    parts = {
        **{"base": found.base, "adapters": found.adapters, "optimiser": found.optimizer},
        **{f"activations of {found.rows} x {found.width} tokens": found.activations, "logits": found.logits},
        **{pages: found.features, "process and libraries": found.beside},
    }
    took = f", found in {seconds:.1f} s" if seconds > 1 else ""
    each = f" for each of {processes} processes" if processes > 1 else ""
    have = (
        f", of {there / 1e9:.2f} GB that are there{each}"
        if there
        else "; how much is there the system does not say"
    )
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    lines = [f"memory: about {found.total / 1e9:.2f} GB at most{have}{took}", f"  {listed}"]
    if there and found.needed > there:
        lines.append(f"  it will not fit: {_instead(found, there, batch_size, recomputes, in_4_bits)}")
    return lines


def _instead(found: Estimate, there: int, batch_size: int, recomputes: bool, in_4_bits: bool) -> str:
    left = there - (found.needed - found.step)
    fitting = int(batch_size * left / found.step) if left > 0 else 0
    wishes = [f"data.packing.batch_size to {fitting}"] if 0 < fitting < batch_size else []
    wishes += [] if recomputes else ["model.language.gradient_checkpointing to true"]
    wishes += ["data.packing.max_length lower"] if left > 0 and not wishes else []
    wishes += [] if fitting or in_4_bits else ["model.language.quantization to nf4"]
    ways = [f"set {', or '.join(wishes)}"] if wishes else []
    return ", or ".join(ways + ([] if fitting else ["take a smaller model"]))


def largest_batch(loader: PackedLoader | JointLoader, features: FeatureCache) -> Batch:
    """That of this epoch with the most tokens, of all finetunes together, its features without their numbers."""
    loaders = loader.loaders.values() if isinstance(loader, JointLoader) else [loader]
    return concatenate([_collated(own.largest_batch(), own.adapter, features) for own in loaders])


def _collated(rows: Sequence[PackedRow], adapter: str | None, features: FeatureCache) -> Batch:
    encoder = features.encoder
    counts = [
        number for row in rows for number in (row.image_tokens or [encoder.num_tokens or 0] * len(row.images))
    ]
    shapes = [torch.empty(number, encoder.dim, dtype=encoder.feature_dtype) for number in counts]
    return collate(rows, shapes or None, [adapter] * len(rows))


class MemoryTold(L.Callback):
    """Says as a fit begins how much memory it will need."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """What it said."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero or sharded(trainer):  # which has said what it holds
            return
        module, begun = pl_module, time.perf_counter()
        loader, features = module.batches.train(), module.engine.features
        try:
            batch = largest_batch(loader, features)
            own = loader.loaders.values() if isinstance(loader, JointLoader) else [loader]
            images = (
                sum(len(np.unique(each.counts["group"])) for each in own) if batch.features is not None else 0
            )
            found = estimate(
                *(module.model, module.optimizer, batch, features.bytes_to_come(images)),
                on_disk=features.store is not None,
                times=min(2, trainer.accumulate_grad_batches),
            )
        except Exception as error:  # a model of which shapes alone are not enough trains all the same
            reason = str(error).strip().partition("\n")[0]
            print(
                f"memory: not known before the first step ({type(error).__name__}: {reason})", file=sys.stderr
            )
            return
        linears = (own for own in module.model.language_model.modules() if hasattr(own, "weight"))
        lines = told(
            *(found, room(module.model.device, trainer.num_devices), trainer.datamodule.packing.batch_size),
            *(module.language.gradient_checkpointing, time.perf_counter() - begun),
            any(map(is_4bit, linears)),
            trainer.num_devices if module.model.device.type == "cpu" else 1,
        )
        if batch.features is not None and not _all_held(loader, features):
            lines.append("  not in it, as it is not known: the encoder, which runs beside the steps")
        self.lines = lines
        print("\n".join(lines), file=sys.stderr)


def _all_held(loader: PackedLoader | JointLoader, features: FeatureCache) -> bool:
    """Whether the images of the largest batches are encoded already."""
    own = loader.loaders.values() if isinstance(loader, JointLoader) else [loader]
    return all(features.holds(image) for each in own for row in each.largest_batch() for image in row.images)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
