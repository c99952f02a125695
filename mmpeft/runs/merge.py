"""Merges one finetune of a run into its base, and exports a plain model folder that needs no mmpeft.

::

    merged/default/
      model.safetensors config.json ...   loads with AutoModelForCausalLM
      tokenizer.json ...                  loads with AutoTokenizer
      mmpeft.json projector.safetensors   `mmpeft.load` takes the folder as a run of that base, with images
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmpeft.adapters.merge import merge, unwrap
from mmpeft.errors import RefusedError
from mmpeft.files import ordinary_permissions, save_tensors
from mmpeft.hashing import hash_tensors
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.runs.files import (
    BASE,
    HERE,
    PROJECTOR,
    language_of,
    load_trained,
    read_projectors,
    require_empty,
    shared_slots,
)
from mmpeft.runs.identity import check_identity, describe
from mmpeft.runs.manifest import FORMAT, Manifest, read_manifest, write_manifest

PROMPT = "Question: what is in this image, and what color is it? Answer:"
"""The text on which the model is compared before and after."""


@dataclass
class Merged:
    """What `merge_run` wrote, and how near it is."""

    adapter: str
    directory: Path
    difference: float
    """Largest absolute difference of a logit of `PROMPT` between adapted and merged model."""
    change: float
    """The same between base and adapted model: what ``difference`` is to be measured by."""


def merge_run(
    run: str | Path,
    adapter: str | None = None,
    output: str | Path | None = None,
    quantization: Literal["nf4", "int8"] | None = None,
) -> Merged:
    """Folds an adapter of a run into its base and writes the result as a transformers folder.

    The base is the run's own in its dtype, dense unless ``quantization`` says otherwise, whatever it was
    trained on: a QLoRA run's update goes onto the weights that 4 bits had approximated.

    The arguments are those of `mmpeft merge`.

    Raises:
        RefusedError: no such adapter, a folder that is not empty, LoRA on a quantised base, or what
            `load_run` refuses. Nothing is written then.
    """
    manifest = read_manifest(run)
    adapter = _chosen(manifest.adapters, adapter, run)
    directory = Path(output) if output is not None else Path(run) / "merged" / adapter
    require_empty(directory)
    language = replace(language_of(run, manifest), quantization=quantization, gradient_checkpointing=False)
    slots = shared_slots(read_projectors(run, manifest), [adapter])
    model = build_model(language, manifest.vision_config, projector_slots=slots)
    tokenizer = load_tokenizer(language.name)
    check_identity(manifest, describe(language, model, tokenizer), run)
    load_trained(run, model, {adapter: adapter})

    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model.bank.route([None])
    base = _logits(model.language_model, ids)
    model.bank.route([adapter])
    adapted = _logits(model.language_model, ids)
    merge(model.bank, adapter)
    plain: Any = unwrap(model.bank)
    merged = _logits(plain, ids)

    directory.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        ordinary_permissions(path)
    projector = model.projector.tensors(model.projector_slots.get(adapter, 0))
    _write_run(directory, manifest, language, projector, model)
    return Merged(adapter, directory, _largest(merged - adapted), _largest(adapted - base))


def _write_run(
    directory: Path, manifest: Manifest, language: LanguageConfig, projector: dict[str, Tensor], model: Any
) -> None:
    """Makes the folder a run whose base is the merged model itself."""
    merged = replace(language, name=str(directory.resolve()))
    own = replace(
        manifest,
        language=asdict(language) | {"name": HERE},
        identity=describe(merged, model, load_tokenizer(merged.name)),
        adapters=[],
        adapter_files={},
        projectors={},
        projector="",
        base="",
        metrics={},
        facts={},
        format=FORMAT,
    )
    if manifest.vision is not None:
        save_tensors(projector, directory / PROJECTOR)
        own.projectors = {BASE: hash_tensors(projector)}
    write_manifest(directory, own)


def _chosen(adapters: list[str], name: str | None, run: str | Path) -> str:
    if not adapters:
        raise RefusedError(
            f"{run} has no adapters: its language model is the base, and there is nothing to merge"
        )
    if name is not None and name not in adapters:
        raise RefusedError(f"{run} has no adapter {name!r}; it has {', '.join(adapters)}")
    return name or adapters[0]


@torch.no_grad()
def _logits(language_model: Any, ids: Tensor) -> Tensor:
    """(1, length) ids -> (1, length, vocabulary) in fp32."""
    return language_model(input_ids=ids).logits.float()


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
