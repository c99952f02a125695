"""Out of memory: a batch that does not fit goes in smaller pieces from then on, whose gradients are added up.

A step's losses are sums, and what they are means over is known before (`Batch.of_step`): however a batch is cut, the
step is the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmpeft.data.batch import Batch
from mmpeft.errors import RefusedError

Forward = Callable[[Batch], tuple[Tensor, Callable[[], None]]]
"""Batch -> its loss, and what is to be done once that has its gradient"""


class Pieces:
    """The forward and backward of a batch, piece by piece.

    Args:
        forward: of a piece.
        parameters: that get gradients.
        whole: whether batches must stay whole, as each forward is one of several processes.
    """

    def __init__(self, forward: Forward, parameters: Sequence[nn.Parameter], whole: bool = False):
        self._forward, self._parameters, self._whole = forward, parameters, whole
        self.most: int | None = None
        """Rows of a piece; None takes batches whole."""
        self._left: list[Batch] = []
        self._loss: Tensor | None = None
        self._done: Callable[[], None] = lambda: None
        self._told = torch.zeros(())

    def forward(self, batch: Batch) -> Tensor:
        """The forward of the first piece. Returns a number with its loss, for the trainer to hold and to scale: what it
        holds keeps no activations.

        Raises:
            RefusedError: a single row is too much, or a batch that must stay whole.
        """
        self._left = [batch]
        self._begin()
        assert self._loss is not None, "it has begun"
        self._told = self._loss.detach().requires_grad_()
        return self._told

    def backward(self, scaled: Tensor) -> None:
        """The backward of the first piece, and all of the others.

        Args:
            scaled: a multiple of what `forward` returned; gradients are multiplied by the same.

        Raises:
            RefusedError: a single row is too much, or a batch that must stay whole.
        """
        scaled.backward()
        while self._left:
            if self._loss is None:
                self._begin()
            if self._backward_of_one(self._told.grad):
                self._done()
                self._left.pop(0)
            else:
                self._halve()

    def _begin(self) -> None:
        while True:
            self._cut()
            try:
                self._loss, self._done = self._forward(self._left[0])
            except torch.OutOfMemoryError:
                pass
            else:
                return
            self._halve()

    def _backward_of_one(self, factor: Tensor | None) -> bool:
        """Whether there was memory for it; otherwise the gradients are as before."""
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        assert self._loss is not None, "it has begun"
        try:
            self._loss.backward(factor)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        self._loss = None
        for parameter, earlier in zip(self._parameters, before, strict=True):
            if not fits or parameter.grad is None:
                parameter.grad = earlier
            elif earlier is not None:
                parameter.grad += earlier
        return fits

    def _halve(self) -> None:
        rows, tokens = self._left[0].input_ids.shape
        if rows == 1:
            raise RefusedError(
                f"{self._left[0].input_ids.device} has no memory for a single row of {tokens} tokens: set "
                "model.language.gradient_checkpointing to true, data.packing.max_length lower, or "
                "model.language.quantization to nf4"
            )
        if self._whole:
            raise RefusedError(
                f"{self._left[0].input_ids.device} has no memory for {rows} rows of {tokens} tokens, and with a "
                "sharded base no process can take its rows in smaller pieces than the others: set "
                "model.language.gradient_checkpointing to true, data.packing.batch_size or data.packing.max_length "
                "lower, or train on more devices"
            )
        self.most = (rows + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(
            f"out of memory with {rows} rows of {tokens} tokens: from here on at most {self.most} are computed at once "
            "and their gradients added up, which changes no step"
        )

    def _cut(self) -> None:
        """Of the next piece no more rows than fit."""
        rows, most = len(self._left[0].input_ids), self.most
        if most is not None and rows > most:
            batch = self._left.pop(0)
            self._left[:0] = [batch.part(start, min(start + most, rows)) for start in range(0, rows, most)]
