"""The forward of an adapted layer: its rows are changed by their own finetunes."""

from typing import Any

from torch import Tensor, nn

from mmpeft.adapters.methods.base import Stack
from mmpeft.adapters.routing import Routing
from mmpeft.errors import RefusedError


class AdaptedForward:
    """What a frozen layer computes in place of its own forward: its rows are changed by their own finetunes.

    ``y_b = W(x_b * (1 + u_s)) * (1 + v_s) + c_s B_s A_s x_b + ...`` with ``s`` the slot of row ``b``. The layer may
    be any module that maps (B, T, I) to (B, T, O): dense, 4-bit or 8-bit linear, or a whole feed-forward; it is
    called, never read.

    It is no module but the ``forward`` of one instance, so the model keeps its tree, its state dict and the types of
    its layers. That was chosen over a wrapping module (it renames the base's tensors), hooks (compilation skips their
    guards), parametrisation (it reads the dense weight, which a 4-bit linear does not have) and subclassing (one
    class per quantiser).

    Args:
        base: the frozen layer; it is adapted at once.
        in_features: of the layer, for errors.
        flattened: whether the model hands this layer (B * T, I), as OPT does with its feed-forward. It is not guessed
            from the input: a mixture of experts passes some tokens of a batch, whose rows nobody could tell.
    """

    def __init__(self, base: nn.Module, in_features: int, routing: Routing, flattened: bool = False):
        self.base = base
        self.in_features, self.flattened = in_features, flattened
        self.routing = routing
        self.stacks: dict[str, Stack] = {}
        """Place -> the stack of a method, in the order in which they act; the bank owns them."""
        self.plain: Any = base.forward
        """The layer's own forward, without adapters."""
        self._replaced = base.__dict__.get("forward")
        base.forward = self

    def put(self, place: str, stack: Stack) -> None:
        """Adds the stack of a method, in its turn: a finetune of several methods is the same however it was put
        together."""
        stack.attach(self.base, self.plain)
        stack.routing = self.routing
        self.stacks[place] = stack
        self.stacks = dict(sorted(self.stacks.items(), key=lambda item: (item[1].turn, item[0])))

    def remove(self) -> None:
        """Gives the layer its own forward back."""
        if self._replaced is None:
            del self.base.forward
        else:
            self.base.forward = self._replaced

    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Any:
        """(B, ..., I), or an embedding's token ids (B, T), -> (B, ..., O); ``others`` and ``named`` go to the layer as
        they are, and what it returns beside its output, as a router's choice, comes back as it is.

        Raises:
            RefusedError: no routing yet, or it was written for another number of rows.
        """
        if self.flattened and x.dim() == 2 and x.is_floating_point():
            rows = self.routing.num_rows
            if not x.shape[0] % rows:
                return self._forward(x.unflatten(0, (rows, -1)), *others, **named).flatten(0, 1)
        if x.dim() > 3:  # latent attention hands on the tokens of each row with a dim for its one head
            return self._forward(x.flatten(1, -2), *others, **named).unflatten(1, x.shape[1:-1])
        return self._forward(x, *others, **named)

    def _forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        for stack in self.stacks.values():
            if self.routing.base_says_mode and stack.training != self.base.training:
                stack.train(self.base.training)
        routed = [(stack, *self._route(stack.method, x)) for stack in self.stacks.values()]
        scaled = x
        for stack, slots, uniform in routed:
            if (few := self.routing.few.get(stack.method)) is None:
                scaled = stack.on_input(scaled, slots, uniform)
            elif len(few.rows) and type(stack).on_input is not Stack.on_input:
                own = stack.on_input(scaled.index_select(0, few.rows), few.slots, False)
                scaled = scaled.index_copy(0, few.rows, own)
        returned = self.plain(scaled, *others, **named)
        y = returned[0] if isinstance(returned, tuple) else returned
        shape = y.shape
        if x.is_floating_point() and shape[:-1] != x.shape[:-1]:  # Llama 4's mixture flattens its rows
            y = y.reshape(*x.shape[:-1], -1)
        for stack, slots, uniform in routed:
            if (few := self.routing.few.get(stack.method)) is None:
                y = stack.on_output(x, y, slots, uniform)
            elif len(few.rows) and type(stack).on_output is not Stack.on_output:
                own = stack.on_output(
                    x.index_select(0, few.rows), y.index_select(0, few.rows), few.slots, False
                )
                y = y.index_copy(0, few.rows, own)
        y = y.view(shape) if y.shape != shape else y
        return (y, *returned[1:]) if isinstance(returned, tuple) else y

    def _route(self, method: str, x: Tensor) -> tuple[Tensor, bool]:
        slots = self.routing.slots.get(method)
        if slots is None:
            raise RefusedError(
                f"no routing for {method!r}: say which adapter serves each row first, e.g. "
                "bank.route(['my-adapter', None]), or bank.route([None] * rows) for the base model"
            )
        if x.dim() != (3 if x.is_floating_point() else 2) or x.shape[0] != slots.shape[0]:
            raise RefusedError(
                f"adapted layer got an input of shape {tuple(x.shape)}, but the routing was written for "
                f"{slots.shape[0]} rows of shape (rows, tokens, {self.in_features}); call bank.route(names) "
                "with one name per row before the forward, and keep the batch dimension first"
            )
        return slots, self.routing.uniform[method]
