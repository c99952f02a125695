"""Routing: which finetune each row of a forward belongs to, and the random numbers of each finetune's own dropout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmpeft.adapters.functional import ALL_SERVED
from mmpeft.errors import RefusedError
from mmpeft.hashing import seed_of
from mmpeft.transfer import to_device


@dataclass(eq=False)
class Stream:
    """One finetune's random numbers for one batch: a function of its own seed and, row by row, of its own tokens, in
    order, so that neither its neighbours nor the padding change them, nor which of its rows are another process's."""

    seed: int
    """Of the finetune's batch."""
    slots: Mapping[str, int]
    """Method -> the slot of the finetune."""
    tokens_of_rows: Tensor
    """(rows, tokens) bool on the host: which are tokens of some row and no padding."""
    rows: Sequence[bool]
    """Of every row, whether it is the finetune's."""
    columns: slice = field(default_factory=lambda: slice(None))
    """Of these tokens, the ones that the coming forwards read."""
    device: torch.device | str = "cpu"
    """Of the forwards."""
    numbers: Tensor | None = None
    """(rows,) or (rows, tokens) int64, on the host: of which row of the finetune's batch each row, or token, is, where
    not all of them are here; None counts the rows that are."""

    @cached_property
    def pieces(self) -> list[tuple[int, int, int]]:
        """(row of the finetune's batch, first and last + 1 of `tokens`) of each row."""
        counted = torch.tensor(self.rows).cumsum(0) - 1 if self.numbers is None else self.numbers
        of_tokens = counted.reshape(len(self.rows), -1).expand(self.tokens_of_rows.shape)
        own = of_tokens.numpy()[self._own_tokens.numpy()]
        starts = [0, *((own[1:] != own[:-1]).nonzero()[0] + 1).tolist()]
        return list(zip(own[starts].tolist(), starts, [*starts[1:], len(own)], strict=True))

    @property
    def _own_tokens(self) -> Tensor:
        return self.tokens_of_rows & torch.tensor(self.rows)[:, None]

    @cached_property
    def tokens(self) -> Tensor:
        """(n,) int64: where its tokens stand among all rows times tokens. Found once a batch, and only if something is
        dropped."""
        return to_device(self._own_tokens.flatten().numpy().nonzero()[0], self.device)

    def uniform(self, features: int, place: str) -> Tensor:
        """(n, features) float32 in [0, 1), the same ones whenever asked for the same ``place``; of a row the same ones
        whichever others are here."""
        numbers = torch.empty(len(self.tokens), features, device=self.device)
        generator = torch.Generator(self.device)
        for row, start, stop in self.pieces:
            generator.manual_seed(seed_of(self.seed, place, row))
            numbers[start:stop].uniform_(generator=generator)
        return numbers


GATHERED_BYTES = 2**30
"""What stacks keep for the rows of one routing at most; beyond that they make it anew in every forward."""


class Gathered:
    """What stacks have made of their slots for the rows of one routing, as long as none of their tensors changes."""

    def __init__(self) -> None:
        self._found: dict[Any, tuple[list[tuple[Tensor, int]], tuple[Tensor, ...]]] = {}
        self._room = GATHERED_BYTES

    def get(
        self, key: Any, made_of: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``make`` makes of the tensors ``made_of``."""
        if torch.is_grad_enabled() or any(tensor.is_inference() for tensor in made_of):
            return make()
        versions, kept = self._found.get(key, ([], ()))
        if versions and all(
            now is then and now._version == version
            for now, (then, version) in zip(made_of, versions, strict=True)
        ):
            return kept
        self._room += sum(tensor.nbytes for tensor in kept)
        made = make()
        size = sum(tensor.nbytes for tensor in made)
        self._found.pop(key, None)
        if size <= self._room:
            self._room -= size
            self._found[key] = [(tensor, tensor._version) for tensor in made_of], made
        return made


@dataclass(frozen=True)
class Few:
    """The rows of a method that most rows do not have."""

    rows: Tensor
    """(n,) int64"""
    slots: Tensor
    """(n,) int64: theirs, none of which is ``BASE``"""


@dataclass(eq=False)
class Routing:
    """Which slot serves each row, per method: one plain object per model, shared by all its adapted layers.

    Written once before a forward and never cleared, because gradient checkpointing runs the forward again
    during the backward. Not a global and not a hook: two models never see each other's rows.
    """

    slots: dict[str, Tensor] = field(default_factory=dict)
    """Method -> (rows,) int64, ``BASE`` for rows without that method."""
    uniform: dict[str, bool] = field(default_factory=dict)
    """Method -> whether its stacks have a single slot and it serves every row."""
    names: Sequence[str | None] = ()
    """The adapter of each row."""
    owned: Sequence[Mapping[str, int]] = ()
    """Of each row, method -> slot."""
    invoked: Tensor | None = None
    """(rows, tokens) bool: the tokens on which activated adapters act; None where no row has one."""
    awaits_invoked: bool = False
    """Whether rows have one, and nobody has said where it acts."""
    base_says_mode: bool = True
    """Whether stacks train where the layer that they change does, since ``model.train()`` does not reach what lies
    beside the model; False where the model stays in eval mode while they train, and the bank's mode is theirs."""
    streams: list[Stream] = field(default_factory=list)
    """The random numbers of every finetune's dropout; none where it draws from torch's global generator."""
    gathered: "Gathered | None" = None
    """What stacks have made for these rows, where many forwards come with this routing, as in decoding."""
    few: dict[str, Few] = field(default_factory=dict)
    """Methods whose stacks are shown their own rows alone, see `narrow`."""

    @property
    def num_rows(self) -> int:
        """Rows of the batch that the routing was written for."""
        return len(next(iter(self.slots.values()))) if self.slots else 1

    def narrow(self) -> None:
        """Spares the stacks of methods that at most half of the rows have all other rows, until the next route; not
        where a row has an activated adapter, since it is told of all rows where these act. For forwards without
        gradients, whose products may be of other shapes in other company."""
        if self.invoked is not None or self.awaits_invoked:
            return
        for method, slots in self.slots.items():
            rows = [row for row, own in enumerate(self.owned) if method in own]
            if 2 * len(rows) <= len(self.owned):
                few = Few(
                    to_device(rows, slots.device),
                    to_device([self.owned[n][method] for n in rows], slots.device),
                )
                setattr(few.slots, ALL_SERVED, True)
                self.few[method] = few

    def seed_dropout(
        self,
        seeds: Mapping[str, int],
        tokens: Tensor,
        columns: slice = slice(None),
        numbers: Tensor | None = None,
    ) -> None:
        """Gives every finetune random numbers of its own for the dropout of the coming forwards, until the next route:
        together it then drops what it would alone.

        Args:
            seeds: adapter -> seed of its share of this batch.
            tokens: (rows, tokens) bool on the host: which are no padding. Padding is never dropped.
            columns: which of the tokens are read, where these are not all: of them the same is dropped as if they were.
            numbers: as of a `Stream`.

        Raises:
            RefusedError: an adapter of the rows has no seed.
        """
        names = [name for name in dict.fromkeys(self.names) if name is not None]
        if unseeded := [name for name in names if name not in seeds]:
            raise RefusedError(
                f"dropout got seeds for {sorted(seeds)}, but rows of {unseeded} are in the batch; give one to each"
            )
        self.streams = []
        device = next(iter(self.slots.values())).device if self.slots else "cpu"
        for name in names:
            rows = [name == each for each in self.names]
            self.streams.append(
                Stream(seeds[name], self.owned[rows.index(True)], tokens, rows, columns, device, numbers)
            )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, it may be written for other rows; afterwards it is as it was."""
        kept = dict(vars(self))
        try:
            yield
        finally:
            vars(self).update(kept)

    def act_on(self, invoked: Tensor | None) -> None:
        """Says on which tokens (rows, tokens) of the coming forwards activated adapters act; None for rows without
        any."""
        self.invoked, self.awaits_invoked = invoked, False

    def invoked_of(self, x: Tensor) -> Tensor | None:
        """(B, T) bool: the tokens of a layer's input (B, T, I) on which activated adapters act; None where no row has
        one.

        Raises:
            RefusedError: nobody has said which, or it was said of other tokens.
        """
        if self.awaits_invoked or (self.invoked is not None and self.invoked.shape != x.shape[:2]):
            told = "nobody" if self.invoked is None else f"tokens of shape {tuple(self.invoked.shape)}"
            raise RefusedError(
                "an activated adapter acts from its invocation tokens on, which are looked for in the ids: an input of "
                f"shape {tuple(x.shape)} came where {told} had been shown; call bank.route(names, ids) before every "
                "forward of a whole row"
            )
        return self.invoked

    def kept(self, x: Tensor, method: str, rates: Mapping[int, float], place: str) -> Tensor:
        """What the finetunes' own dropout leaves of ``x`` (B, T, I): a mask of its shape.

        Args:
            x: input of a layer.
            method: whose slots are meant.
            rates: slot -> probability of dropping a feature; a slot that is not here drops nothing.
            place: what tells this mask from all others of the batch.

        Raises:
            RefusedError: the dropout was seeded for another number of tokens.
        """
        mask = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        for stream in self.streams:
            rows, tokens = stream.tokens_of_rows.shape
            if (rows, len(range(tokens)[stream.columns])) != x.shape[:2]:
                raise RefusedError(
                    f"dropout was seeded for (rows, tokens) {(rows, tokens)}, but an adapted "
                    f"layer got an input of shape {tuple(x.shape)}; call routing.seed_dropout with its tokens"
                )
            if rate := rates.get(stream.slots.get(method, -1)):
                whole = mask if tokens == x.shape[1] else mask.new_ones(rows, tokens, x.shape[-1])
                whole.flatten(0, 1)[stream.tokens] = stream.uniform(x.shape[-1], place) >= rate
                if whole is not mask:
                    mask &= whole[:, stream.columns]
        return mask
