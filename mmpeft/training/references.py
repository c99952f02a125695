"""References of preferences: the same rows, read by what a finetune began from, without gradients and dropout.

No second model is there. A reference that is the base serves rows as the base; one that is the adapter that a finetune
began as has its own slot, into which the tensors of then are put for that one forward.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from mmpeft.data.batch import Batch
from mmpeft.errors import RefusedError
from mmpeft.models.evaluating import evaluating
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.token_losses import TokenLosses
from mmpeft.names import RESERVED_NAME
from mmpeft.training.finetune import Finetune
from mmpeft.training.processes import Reduced


@dataclass
class Beside:
    """What a batch's losses are compared with."""

    losses: TokenLosses | None = None
    """Of the tokens of those rows whose finetune has a reference, in reading order; None where none has."""
    points: Mapping[str, Tensor] = field(default_factory=dict)
    """Finetune -> KTO's reference point, scalar."""


class References:
    """The references of a run's finetunes.

    Args:
        model: with all finetunes, as they begin.
        finetunes: of the run.
        adapters: finetune -> the adapter of its rows; None is the base.
        began_as: finetune -> the adapter of an earlier run that it begins as; None where that is not known.
        has_trained: whether the model's finetunes are those after their training.
        processes: of the run, where there are several.

    Raises:
        RefusedError: as of `reference_of`.
    """

    def __init__(
        self,
        model: MultimodalModel,
        finetunes: Mapping[str, Finetune],
        adapters: Mapping[str, str | None],
        began_as: Mapping[str, str] | None,
        has_trained: bool = False,
        processes: Reduced | None = None,
    ):
        self.model, self.processes = model, processes
        self._routes: dict[str | None, str | None] = {}
        self._held: dict[str | None, Held] = {}
        self._labelled = {
            adapters[name]: name for name, own in finetunes.items() if own.settings.kind.sides == "labels"
        }
        self._unknown: str | None = None
        for name, finetune in finetunes.items():
            if not finetune.settings.kind.has_reference:
                continue
            adapter = adapters[name]
            route = None if began_as is None else reference_of(finetune, began_as) and adapter
            held = Held(_changing(model, adapter, route))
            self._routes[adapter], self._held[adapter] = route, held
            is_base = finetune.settings.preferences.reference == RESERVED_NAME or began_as is not None
            if has_trained and (held.parts or not is_base):
                self._unknown = name

    def beside(self, batch: Batch) -> Beside:
        """What this batch, on its device, is compared with.

        Raises:
            RefusedError: the run has trained already, and what it began from is no longer there.
        """
        return Beside(self.losses(batch), self.points(batch))

    def losses(self, batch: Batch) -> TokenLosses | None:
        """`Beside.losses`; raises as `beside` does."""
        if not self._routes:
            return None
        self._require_known()
        found = [TokenLosses.of_none(torch.zeros(0, device=self.model.device))]
        with evaluating(self.model), self._as_begun(batch.adapters):
            for start, stop in _runs([adapter in self._routes for adapter in batch.adapters]):
                rows = batch.part(start, stop)
                own = self.model.token_losses(rows.routed([self._routes[name] for name in rows.adapters]))
                own.rows = own.rows + start
                found.append(own)
        return found[-1] if len(found) < 3 else _joined(found)

    def points(self, batch: Batch) -> dict[str, Tensor]:
        """KTO's reference points of a batch, of the rows of all processes: the mean of how much likelier the policy
        finds mismatched answers than the reference does, at least 0. Each process must ask for it, with rows or
        without."""
        others = batch.mismatched
        if others is None:
            return {}
        with evaluating(self.model):
            policy = self.model.token_losses(others.routed(others.adapters))
        reference, table = self.losses(others), others.conversations
        assert reference is not None, "finetunes with mismatched answers have references"
        sums: list[Tensor] = []
        for adapter in self._labelled:
            own = np.array([name == adapter for name in others.adapters], bool)
            beyond = reference.where(own[reference.rows]).nll.sum() - policy.where(own[policy.rows]).nll.sum()
            sums += [beyond, torch.full_like(beyond, int(own[table.rows].sum()))]
        flat = torch.stack(sums)
        if self.processes is not None:
            self.processes.sum(flat)
        means = flat[0::2] / flat[1::2].clamp(min=1)
        return dict(zip(self._labelled.values(), means.clamp(min=0).unbind(), strict=True))

    @contextmanager
    def _as_begun(self, adapters: Sequence[str | None]) -> Iterator[None]:
        with ExitStack() as stack:
            for adapter in {*adapters} & self._held.keys():
                stack.enter_context(self._held[adapter].put_back())
            yield

    def _require_known(self) -> None:
        if self._unknown is not None:
            raise RefusedError(
                f"{self._unknown!r} is compared with what it began from, which this run no longer is: the curves of "
                "its fit have val_loss and val_reward_accuracy; `mmpeft test` ranks its answers"
            )


def reference_of(finetune: Finetune, began_as: Mapping[str, str]) -> str | None:
    """The adapter of an earlier run that a finetune is compared with; None is the base.

    Args:
        finetune: whose objective has a reference.
        began_as: finetune -> the adapter that it begins as; those that begin as none are not in it.

    Raises:
        RefusedError: the reference is another adapter than that.
    """
    wanted, begun = finetune.settings.preferences.reference, began_as.get(finetune.name)
    if wanted == RESERVED_NAME:
        return None
    if wanted not in (None, begun):
        what = "no adapter, but afresh" if begun is None else f"{begun!r}"
        raise RefusedError(
            f"preferences.reference of {finetune.name!r} is {wanted!r}, but that finetune begins as {what}: set "
            f"model.start_from to the run of {wanted!r} and model.start_adapter to {wanted!r}, or the reference to "
            f"{RESERVED_NAME}"
        )
    return begun


class Held:
    """Slots of Parameters as they were.

    Args:
        parts: (Parameter, slot) of each.
    """

    def __init__(self, parts: Sequence[tuple[nn.Parameter, int]]):
        self.parts = parts
        self._then = [parameter.data[slot].clone() for parameter, slot in parts]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Inside, they are as they were. Nothing that still needs a gradient may have been computed from them."""
        now = [parameter.data[slot].clone() for parameter, slot in self.parts]
        try:
            self._fill(self._then)
            yield
        finally:
            self._fill(now)

    def _fill(self, tensors: Sequence[Tensor]) -> None:
        for (parameter, slot), tensor in zip(self.parts, tensors, strict=True):
            parameter.data[slot].copy_(tensor)


def _changing(
    model: MultimodalModel, adapter: str | None, route: str | None
) -> list[tuple[nn.Parameter, int]]:
    """Of what the reference reads with, the parts that will train: the adapter that it is, and a projector that a
    single finetune shares with the base."""
    parts: list[tuple[nn.Parameter, int]] = []
    if route is not None:
        parts += [
            (parameter, slot)
            for _, stack, slot in model.bank.places(route)
            for parameter in stack.parameters()
        ]
    slot = model.projector_slots.get(route or "", 0)
    if slot == model.projector_slots.get(adapter or "", 0):
        parts += [(parameter, slot) for parameter in model.projector.parameters() if parameter.requires_grad]
    return parts


def _runs(marks: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, stop) of those that are marked and stand side by side."""
    for marked, numbers in groupby(range(len(marks)), marks.__getitem__):
        if marked:
            own = list(numbers)
            yield own[0], own[-1] + 1


def _joined(parts: Sequence[TokenLosses]) -> TokenLosses:
    return TokenLosses(
        torch.cat([part.nll for part in parts]),
        torch.cat([part.correct for part in parts]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.segments for part in parts]),
    )
