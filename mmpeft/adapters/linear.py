"""The adapted linear, and the routing that tells it which finetune each row belongs to."""

from torch import Tensor, nn

from mmpeft.adapters.ia3 import IA3Stack
from mmpeft.adapters.lora import LoraStack


class Routing:
    """Which slot serves each row, per method: one plain object per model, shared by all its adapted linears.

    Written once before a forward and never cleared, because gradient checkpointing runs the forward again
    during the backward. Not a global and not a hook: two models never see each other's rows.
    """

    def __init__(self):
        self.slots: dict[str, Tensor] = {}
        self.uniform: dict[str, bool] = {}

    def write(self, slots: dict[str, Tensor], uniform: dict[str, bool]) -> None:
        """``slots``: method -> (rows,) int64, ``BASE`` for rows without that method; ``uniform``: method ->
        whether the method's stacks have a single slot and it serves every row."""
        self.slots, self.uniform = slots, uniform


class AdapterLinear(nn.Module):
    """A frozen linear whose rows are changed by their own finetunes.

    ``y_b = W(x_b * (1 + u_s)) * (1 + v_s) + c_s B_s A_s x_b`` with ``s`` the slot of row ``b``. ``base`` may
    be any module that maps (B, T, I) to (B, T, O): dense, 4-bit, 8-bit; it is called, never read.
    """

    def __init__(self, base: nn.Module, in_features: int, out_features: int, routing: Routing):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.routing = routing
        self.lora: LoraStack | None = None
        self.ia3_input: IA3Stack | None = None
        self.ia3_output: IA3Stack | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight, which some models look at for its dtype."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    def stacks(self) -> list[LoraStack | IA3Stack]:
        return [stack for stack in (self.lora, self.ia3_input, self.ia3_output) if stack is not None]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, O).

        Raises:
            ValueError: no routing yet, or it was written for another number of rows.
        """
        scaled = x
        if self.ia3_input is not None:
            scaled = self.ia3_input.scale(x, *self._route("ia3", x))
        y = self.base(scaled)
        if self.ia3_output is not None:
            y = self.ia3_output.scale(y, *self._route("ia3", x))
        if self.lora is not None:
            y = y + self.lora.delta(x, *self._route("lora", x)).to(y.dtype)
        return y

    def _route(self, method: str, x: Tensor) -> tuple[Tensor, bool]:
        slots = self.routing.slots.get(method)
        if slots is None:
            raise ValueError(
                f"no routing for {method!r}: say which adapter serves each row first, e.g. "
                "bank.route(['my-adapter', None]), or bank.route([None] * rows) for the base model"
            )
        if x.dim() != 3 or x.shape[0] != slots.shape[0]:
            raise ValueError(
                f"adapted linear got an input of shape {tuple(x.shape)}, but the routing was written for "
                f"{slots.shape[0]} rows of shape (rows, tokens, {self.in_features}); call bank.route(names) "
                "with one name per row before the forward, and keep the batch dimension first"
            )
        return slots, self.routing.uniform[method]
