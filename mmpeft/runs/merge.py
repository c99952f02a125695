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
from mmpeft.files import ordinary_permissions, save_tensors, whole_folder
from mmpeft.hashing import hash_tensors
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, late_bars, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
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
from mmpeft.runs.manifest import Manifest, choose_adapter, read_manifest, write_manifest

PROMPT = "Question: what is in this image, and what color is it? Answer:"
"""The text on which the model is compared before and after."""

ROUNDING_STEPS = 64
"""Steps of the largest logit up to which a difference is rounding: some 30 on 30 layers in float32, 3 in bfloat16."""
SMALL_SHARE = 0.1
"""Of what a finetune changes."""
INT8_STEP = 1 / 127
"""Between neighbours of 8-bit products, of the largest."""


@dataclass
class Merged:
    """What `merge_run` wrote, and how near it is."""

    adapter: str
    directory: Path
    difference: float
    """Largest absolute difference of a logit of `PROMPT` between adapted and merged model."""
    change: float
    """The same between base and adapted model."""
    largest: float
    """Largest absolute logit of the adapted model."""
    step: float
    """Relative distance of two neighbouring numbers that the model computes with."""

    @property
    def verdict(self) -> str:
        """Whether the difference is rounding, and whether it is small beside what the finetune does."""
        rounded = self.difference <= ROUNDING_STEPS * self.step * self.largest
        cause = "rounding" if rounded else "more than rounding explains"
        if rounded and self.difference <= SMALL_SHARE * self.change:
            return f"{cause}, and small beside the {self.change:.2g} by which the finetune changes them"
        return (
            f"{cause}, and the finetune changes them by {self.change:.2g}: compare answers of both before you rely on "
            "the merged model"
        )


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
    adapter = choose_adapter(run, manifest, adapter)
    directory = Path(output) if output is not None else Path(run) / "merged" / adapter
    require_empty(directory)
    language = replace(language_of(run, manifest), quantization=quantization, gradient_checkpointing=False)
    slots = shared_slots(read_projectors(run, manifest, {}), [adapter])
    tokenizer = load_tokenizer(language.name)
    model = build_model(language, manifest.vision_config, projector_slots=slots)
    check_identity(manifest, describe(language, model, tokenizer), run)
    load_trained(run, model, {adapter: adapter})

    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model.bank.route([None])
    base = _logits(model.language_model, ids)
    model.bank.route([adapter], ids)
    adapted = _logits(model.language_model, ids)
    merge(model.bank, adapter)
    plain: Any = unwrap(model.bank)
    merged = _logits(plain, ids)

    projector = model.projector.tensors(model.projector_slots.get(adapter, 0))
    own = _as_base(manifest, adapter, language)
    own.facts = {"merged": f"{adapter} of {run}"}
    with whole_folder(directory, sum(weights.nbytes for weights in plain.parameters())) as unfinished:
        with late_bars():
            plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for path in unfinished.glob("*.safetensors"):
            ordinary_permissions(path)
        _write_run(unfinished, own, projector, model)
    step = max(torch.finfo(plain.dtype).eps, INT8_STEP if quantization == "int8" else 0.0)
    differences = _largest(merged - adapted), _largest(adapted - base)
    return Merged(adapter, directory, *differences, largest=_largest(adapted), step=step)


def _as_base(manifest: Manifest, adapter: str, language: LanguageConfig) -> Manifest:
    """What is known of a finetune, as that of the base that it is part of now; its identity comes with its files."""
    return Manifest(
        language=asdict(language) | {"name": HERE},
        vision=manifest.vision,
        places={part: place for part, place in manifest.places.items() if part != "language"},
        template=manifest.template,
        identity={},
        instructions=manifest.instructions,
        answer_tokens=manifest.answer_tokens,
        choices={BASE: manifest.choices[adapter]} if adapter in manifest.choices else {},
        without_images=[BASE] if adapter in manifest.without_images else [],
    )


def _write_run(
    directory: Path, manifest: Manifest, projector: dict[str, Tensor], model: MultimodalModel
) -> None:
    """Makes the folder a run whose base is the merged model itself; the manifest comes last, when all is there."""
    if manifest.vision is not None:
        save_tensors(projector, directory / PROJECTOR)
        manifest.projectors = {BASE: hash_tensors(projector)}
    language = language_of(directory, manifest)
    manifest.identity = describe(language, model, load_tokenizer(language.name))
    manifest.identity["language"]["name"] = HERE
    write_manifest(directory, manifest)


@torch.no_grad()
def _logits(language_model: Any, ids: Tensor) -> Tensor:
    """(1, length) ids -> (1, length, vocabulary) in fp32."""
    return language_model(input_ids=ids).logits.float()


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
