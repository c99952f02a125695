"""What an adapter file would change where in a base model, and whether it changes an answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mmpeft.adapters import AdapterBank
from mmpeft.adapters.adapter_file import read_fields
from mmpeft.adapters.bank import INPUTS
from mmpeft.adapters.blocks import last_name
from mmpeft.adapters.peft_format import load_adapter, read_parts
from mmpeft.errors import RefusedError
from mmpeft.inference.adapter_check import uncalled
from mmpeft.models.language import LanguageConfig, load_language_model
from mmpeft.reporting.tables import make_table

NAME = "probed"
PROBE_TOKENS = 16


@dataclass
class AdapterRow:
    """What one method of the file does to layers of one name."""

    method: str
    layer: str
    sites: int
    tensors: list[str]
    """Names and shapes; where they differ from layer to layer, each."""
    parameters: int


def adapter_rows(bank: AdapterBank, name: str) -> list[AdapterRow]:
    """Every method and every name of layers of an adapter, in order."""
    found: dict[tuple[str, str], AdapterRow] = {}
    for part in bank.entry(name).parts:
        for path, stack, slot in bank.places_of(part):
            layer = "what the model reads" if path == INPUTS else last_name(path)
            row = found.setdefault(
                (part.config.method, layer), AdapterRow(part.config.method, layer, 0, [], 0)
            )
            row.sites += 1
            for key, tensor in stack.tensors(slot).items():
                row.parameters += tensor.numel()
                shape = f"{key} {tuple(tensor.shape)}"
                row.tensors += [] if shape in row.tensors else [shape]
    return list(found.values())


@torch.no_grad()
def probe(bank: AdapterBank, name: str) -> tuple[float, list[str]]:
    """How far the adapter moves the logits of a row of fixed tokens, its invocation tokens among them where it has any,
    from the base's, and the layers among its own that
    the model's forward never called, whose tensors therefore do nothing."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = bank.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
    call = torch.tensor([[*bank.entry(name).invocation]], dtype=ids.dtype)
    ids = torch.cat([ids[:, : PROBE_TOKENS // 2], call, ids[:, PROBE_TOKENS // 2 :]], 1)
    ids = ids.expand(2, -1).to(bank.model.get_input_embeddings().weight.device)
    bank.route([name, None], ids)
    with uncalled(bank, name) as idle:
        own, base = bank.model(input_ids=ids).logits.float()
    return float((own - base).abs().max()), [path for path in bank.entry(name).sites if path in idle]


def inspect_adapter(directory: str | Path, model: nn.Module) -> tuple[list[AdapterRow], float | None]:
    """The rows of an adapter file on ``model``, and how far it moves logits; None where a language model alone cannot
    tell, as of prompts and prefixes.

    Raises:
        RefusedError: the file does not fit, or nothing of the base's answer changes.
    """
    reads = any(config.home == "inputs" for config in read_parts(directory))
    bank = AdapterBank(model, image_shape=(0, 0) if reads else None)
    load_adapter(bank, NAME, directory)
    if reads:
        return adapter_rows(bank, NAME), None
    moved, uncalled = probe(bank, NAME)
    if not moved and not uncalled:
        raise RefusedError(
            f"{directory} changes nothing of {type(model).__name__}'s answer to a probe: its rows would be those of "
            "the base; look at its scaling, and whether it was trained"
        )
    if uncalled:
        raise RefusedError(
            f"{directory} changes {'some' if moved else 'nothing'} of {type(model).__name__}'s answer to a probe; "
            f"{len(uncalled)} of its layers are never called, such as {uncalled[0]}: this base reads their weights in "
            "another way, or for other inputs than text, and would serve the adapter in part or not at all"
        )
    return adapter_rows(bank, NAME), moved


def print_adapter(directory: str | Path, base: str | None) -> None:
    """Prints what `inspect_adapter` finds; ``base`` is by default what the file names as its base."""
    if base is None and not (base := read_fields(directory).get("base_model_name_or_path")):
        raise RefusedError(f"{directory} names no base_model_name_or_path; give --base")
    model: Any = load_language_model(LanguageConfig(base))
    rows, moved = inspect_adapter(directory, model)
    table = make_table(
        f"{directory} on {base}",
        method="left",
        layer="left",
        sites="right",
        tensors="left",
        parameters="right",
    )
    for row in rows:
        table.add_row(row.method, row.layer, str(row.sites), ", ".join(row.tensors), f"{row.parameters:,}")
    Console().print(table)
    if moved is None:
        print("it changes what the model reads: a run serves it, a language model alone does not")
    else:
        print(f"on {PROBE_TOKENS} fixed tokens it moves the base's logits by up to {moved:.3g}")
