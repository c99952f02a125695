"""Proof on the very model that a finetune changes the rows that it serves and no others.

Three rows of the same tokens, of which the second is the finetune's, are read before and after its tensors are moved a
little: the second must change, the others must be the base's. Every layer of the finetune must be called: some models
read the weight of a linear and multiply themselves, and an adapter there does nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmpeft.adapters.bank import INPUTS, AdapterBank
from mmpeft.adapters.entry import Entry
from mmpeft.adapters.experts import split_path
from mmpeft.data.batch import collate
from mmpeft.data.packing import pack
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_json
from mmpeft.inference.comparison import distance, random_tokens, tolerance, unlabelled
from mmpeft.models.evaluating import evaluating
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.runs.files import LeftOut

MOVED = 0.1
"""By how much: of itself, and of a normal distribution."""
OF_IMAGES = "image_prompt"
"""A method that changes nothing where there is no image."""


def check_adapters(
    model: MultimodalModel,
    checked: dict[str, Any],
    left_out: LeftOut | None = None,
    among: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Checks one finetune of every combination of methods on every choice of layers.

    Args:
        model: holds the finetunes.
        checked: of the base, as `ensure_checked` gives it; what is in it already is not checked again.
        left_out: takes the finetunes that fail, which leave the bank; None raises for the first.
        among: the finetunes to be checked; all by default.

    Returns:
        The same with what was checked now.

    Raises:
        RefusedError: one that reaches other rows, or not its own.
    """
    known, kinds = {*checked.get("adapters", [])}, defaultdict[str, list[str]](list)
    for name in model.bank.names if among is None else among:
        if (kind := kind_of(model.bank.entry(name))) not in known:
            kinds[kind].append(name)
    if not kinds:
        return checked | {"adapters": sorted(known)}
    with evaluating(model):
        for kind, names in kinds.items():
            try:
                _check(model, names[0])
            except RefusedError as error:
                if left_out is None:
                    raise
                for name in names:
                    left_out[name] = error
                    model.bank.remove(name)
            else:
                known.add(kind)
    return checked | {"adapters": sorted(known)}


def kind_of(entry: Entry) -> str:
    """What one check speaks for: methods, and a hash of where they are."""
    return f"{_methods(entry)} {hash_json([part.sites for part in entry.parts])[:16]}"


def _methods(entry: Entry) -> str:
    return " + ".join(part.config.method for part in entry.parts)


def _check(model: MultimodalModel, name: str) -> None:
    methods = _methods(model.bank.entry(name))
    what = f"{methods} on {type(model.language_model).__name__}"
    call = model.bank.entry(name).invocation
    base = _logits(model, [None] * 3, call)
    try:
        with uncalled(model.bank, name) as idle:
            before = _logits(model, [None, name, None], call)
        with _moved(model, name):
            after = _logits(model, [None, name, None], call)
    except RuntimeError as error:
        raise RefusedError(f"{what} cannot be read by that model: {error}; use another method") from error
    if idle:
        places = len([path for path in model.bank.entry(name).sites if path != INPUTS])
        raise RefusedError(
            f"{what}: {len(idle)} of its {places} layers are never called, such as {min(idle)}: the model reads their "
            f"weights in another way, or for other inputs than text, and whatever is trained there does nothing; leave "
            f"them out of target_modules for {name!r} (layers: '0:' leaves out what is outside of the decoder)"
        )
    for row in (0, 2):
        off = max(distance(before[row], base[row]), distance(after[row], base[row]))
        if not off <= tolerance(model):
            raise RefusedError(
                f"{what} changes rows of the base beside it (by {off:.2g} of their logits); name other target_modules "
                f"for {name!r}, or use another method"
            )
    if methods != OF_IMAGES and torch.equal(after[1], before[1]):
        raise RefusedError(
            f"{what} changes nothing, whatever its tensors are; name other target_modules for {name!r}, or use another "
            "method"
        )


@contextmanager
def uncalled(bank: AdapterBank, name: str) -> Iterator[set[str]]:
    """Afterwards, the layers of an adapter that the model did not call inside."""
    idle = {path for path in bank.entry(name).sites if path != INPUTS}
    hooks = []
    for path in tuple(idle):
        experts = split_path(bank.model, path)
        module = experts[0] if experts else bank.model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: idle.discard(path)))
    try:
        yield idle
    finally:
        for hook in hooks:
            hook.remove()


def _logits(model: MultimodalModel, names: list[str | None], call: Sequence[int]) -> Tensor:
    """(rows, tokens, vocabulary), of rows with an activated adapter's invocation tokens among them."""
    prefix, conversation, _ = random_tokens(model)
    row = pack([unlabelled([*prefix, *call, *conversation])])
    hidden = model.hidden_states(collate([row] * len(names), None, names).to(model.device))
    return model.logits(hidden, names)


@contextmanager
def _moved(model: MultimodalModel, name: str) -> Iterator[None]:
    """Inside, every number of the finetune is another."""
    places = list(model.bank.places(name))
    own = [parameter[slot] for _, stack, slot in places for parameter in stack.parameters()]
    kept = [tensor.clone() for tensor in own]
    generator = torch.Generator(model.device).manual_seed(0)
    try:
        for tensor in own:
            noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
            tensor *= 1 + MOVED  # of numbers so large that an addition would be rounded away
            tensor += MOVED * noise
        yield
    finally:
        for tensor, old in zip(own, kept, strict=True):
            tensor.copy_(old)
