"""The adapted layer, and the routing that tells it which finetune each row belongs to."""

from torch import Tensor, nn

from mmpeft.adapters.methods.base import Stack
from mmpeft.errors import RefusedError

ORDER = (
    *("ia3_input", "ia3_output", "dora", "lora", "full", "bitfit"),
    *("bottleneck_sequential", "bottleneck_parallel"),
)
"""Places of a layer in the order in which they act: a finetune of several methods is the same however it was put
together."""


class Routing:
    """Which slot serves each row, per method: one plain object per model, shared by all its adapted layers.

    Written once before a forward and never cleared, because gradient checkpointing runs the forward again
    during the backward. Not a global and not a hook: two models never see each other's rows.
    """

    def __init__(self):
        self.slots: dict[str, Tensor] = {}
        self.uniform: dict[str, bool] = {}

    @property
    def num_rows(self) -> int:
        """Rows of the batch that the routing was written for."""
        return len(next(iter(self.slots.values()))) if self.slots else 1

    def write(self, slots: dict[str, Tensor], uniform: dict[str, bool]) -> None:
        """``slots``: method -> (rows,) int64, ``BASE`` for rows without that method; ``uniform``: method ->
        whether the method's stacks have a single slot and it serves every row."""
        self.slots, self.uniform = slots, uniform


class AdapterLayer(nn.Module):
    """A frozen layer whose rows are changed by their own finetunes.

    ``y_b = W(x_b * (1 + u_s)) * (1 + v_s) + c_s B_s A_s x_b + ...`` with ``s`` the slot of row ``b``. ``base``
    may be any module that maps (B, T, I) to (B, T, O): dense, 4-bit or 8-bit linear, or a whole feed-forward; it is
    called, never read.

    Args:
        flattened: whether the model hands this layer (B * T, I), as OPT does with its feed-forward. It is not guessed
            from the input: a mixture of experts passes some tokens of a batch, whose rows nobody could tell.
    """

    def __init__(
        self, base: nn.Module, in_features: int, out_features: int, routing: Routing, flattened: bool = False
    ):
        super().__init__()
        self.flattened = flattened
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.routing = routing
        self.stacks = nn.ModuleDict()

    @property
    def weight(self) -> Tensor:
        """The base's weight, which some models look at for its dtype."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    def put(self, place: str, stack: Stack) -> None:
        """Adds the stack of a method, in its turn."""
        stack.attach(self.base)
        have = {**dict(self.stacks.items()), place: stack}
        self.stacks = nn.ModuleDict({key: have[key] for key in ORDER if key in have})

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, O); ``others`` go to the base as they are.

        Raises:
            RefusedError: no routing yet, or it was written for another number of rows.
        """
        if self.flattened and x.dim() == 2:
            return self._forward(x.unflatten(0, (self.routing.num_rows, -1)), *others).flatten(0, 1)
        return self._forward(x, *others)

    def _forward(self, x: Tensor, *others: Tensor) -> Tensor:
        routed: list[tuple[Stack, Tensor, bool]] = []
        for stack in self.stacks.values():
            routed.append((stack, *self._route(stack.method, x)))  # pyright: ignore[reportArgumentType]
        scaled = x
        for stack, slots, uniform in routed:
            scaled = stack.on_input(scaled, slots, uniform)
        y = self.base(scaled, *others)
        for stack, slots, uniform in routed:
            y = stack.on_output(x, y, slots, uniform)
        return y

    def _route(self, method: str, x: Tensor) -> tuple[Tensor, bool]:
        slots = self.routing.slots.get(method)
        if slots is None:
            raise RefusedError(
                f"no routing for {method!r}: say which adapter serves each row first, e.g. "
                "bank.route(['my-adapter', None]), or bank.route([None] * rows) for the base model"
            )
        if x.dim() != 3 or x.shape[0] != slots.shape[0]:
            raise RefusedError(
                f"adapted layer got an input of shape {tuple(x.shape)}, but the routing was written for "
                f"{slots.shape[0]} rows of shape (rows, tokens, {self.in_features}); call bank.route(names) "
                "with one name per row before the forward, and keep the batch dimension first"
            )
        return slots, self.routing.uniform[method]
