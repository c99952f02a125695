"""A finetune as a plain LoRA of the language model's blocks, the one method that other servers apply beside a base."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmpeft.adapters.adapter_file import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, AdapterFile, read_file
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.lora import LoraConfig
from mmpeft.adapters.peft_format import read_config
from mmpeft.errors import RefusedError
from mmpeft.files import write_json
from mmpeft.runs.files import check_files
from mmpeft.runs.layout import adapter_folder
from mmpeft.runs.manifest import Manifest

IN_A_BLOCK = re.compile(r"\.\d+\.")
"""Of the path of a layer in a numbered block: neither the head nor the embedding."""


@dataclass
class PlainLora:
    """The LoRA of a finetune, read from its files."""

    config: LoraConfig
    file: AdapterFile

    @property
    def updates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Path of a linear -> its A (rank, in) and B (out, rank)."""
        a, b = ".lora_A.weight", ".lora_B.weight"
        tensors = self.file.tensors
        paths = [key.removeprefix(KEY_PREFIX).removesuffix(a) for key in tensors if key.endswith(a)]
        return {p: (tensors[f"{KEY_PREFIX}{p}{a}"], tensors[f"{KEY_PREFIX}{p}{b}"]) for p in paths}

    @property
    def largest_rank(self) -> int:
        """Of all its linears."""
        return max(len(A) for A, _ in self.updates.values())

    def write(self, folder: Path, base: str) -> None:
        """Writes the two files of PEFT's format, with ``base`` as the name of its base model."""
        write_json(folder / CONFIG_FILE, self.file.fields | {"base_model_name_or_path": base})
        shutil.copyfile(self.file.weights, folder / WEIGHTS_FILE)


def method_of(run: str | Path, name: str) -> AdapterConfig:
    """The config of a run's finetune, from its files."""
    return read_config(adapter_folder(run, name))


def is_plain(config: AdapterConfig) -> bool:
    """Whether it is LoRA and nothing else, such as DoRA, aLoRA, or a LoRA beside retrained biases."""
    return type(config) is LoraConfig


def read_plain_lora(run: str | Path, manifest: Manifest, name: str) -> PlainLora:
    """The LoRA of a finetune for which `is_plain` holds.

    Raises:
        RefusedError: its files are damaged or exchanged, hold NaN, or change nothing.
    """
    folder, config = adapter_folder(run, name), method_of(run, name)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"{name} is no LoRA but {config.method}")
    check_files(folder, manifest.adapter_files.get(name, {}))
    lora = PlainLora(config, read_file(folder))
    if sick := [key for key, tensor in lora.file.tensors.items() if not tensor.isfinite().all()]:
        raise RefusedError(
            f"{lora.file.weights}: {sick[0]} holds NaN or infinite values; the finetune diverged: train it anew"
        )
    if all(_changes_nothing(config, *pair) for pair in lora.updates.values()):
        raise RefusedError(
            f"{lora.file.weights}: its tensors change nothing (every B A is zero), so that a server would answer as "
            "the base does; where the run trained the projector alone, there is no adapter to export"
        )
    return lora


def _changes_nothing(config: LoraConfig, A: Tensor, B: Tensor) -> bool:
    return config.changes_nothing(nn.Identity(), {"lora_A.weight": A, "lora_B.weight": B})


def require_plain(config: AdapterConfig, name: str, program: str) -> None:
    """Raises:
    RefusedError: the program does not apply a finetune of this config, named with its methods.
    """
    if not is_plain(config):
        methods = " and ".join(part.method for part in config.parts())
        raise RefusedError(
            f"{name!r} is a finetune by {methods}, and of adapters {program} applies plain LoRA alone (no DoRA, aLoRA, "
            "IA3 or prompts, no biases, retrained modules or further methods beside it); --to transformers folds it "
            f"into its base, where its method allows that, and {program} takes that model as any other"
        )


def require_blocks(lora: PlainLora, program: str) -> None:
    """Raises:
    RefusedError: it changes packed experts, or layers outside of the blocks, which the program does not take from every
    model.
    """
    outside: list[Any] = lora.file.fields.get("target_parameters") or [
        path for path in lora.updates if not IN_A_BLOCK.search(path)
    ]
    if outside:
        raise RefusedError(
            f"{lora.file.weights} changes {outside[0]}, and {program} takes updates of the linears in the blocks alone "
            "from every model; --to transformers writes it for peft, whose merge_and_unload makes a plain model"
        )
