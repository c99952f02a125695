"""Whether a network leaves out a border of what it is given: strided windows that end before their input does."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WINDOWED = ("convolution", "im2col", "avg_pool2d", "max_pool2d_with_indices")
PADDINGS = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d")


@dataclass(frozen=True)
class Cut:
    """Of ``rows`` rows (or columns) the last ``lost`` lie in no window of ``window`` in steps of ``stride``."""

    lost: int
    rows: int
    window: int
    stride: int

    def __str__(self) -> str:
        return (
            f"the last {self.lost} of {self.rows} rows or columns lie outside its windows of {self.window} "
            f"in steps of {self.stride}"
        )


class CutBorders(TorchDispatchMode):
    """Notes the cuts of every convolution, pooling and unfolding run inside it.

    A patch embedding of 16 by 16 over 230 pixels leaves out 6, which torch does without a word. Padding counts as
    no loss, whether the operation's own or put on just before it. Windows smaller than their stride (a 1x1 shortcut of
    stride 2) leave out positions at every size and are not noted.
    """

    def __init__(self):
        super().__init__()
        self.cuts: list[Cut] = []
        self._padded: list[tuple[Tensor, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PADDINGS:
            self._padded.append((output, args[1]))
        elif name in WINDOWED:
            options = {argument.name: argument.default_value for argument in func._schema.arguments}
            options |= dict(zip(options, args, strict=False)) | (kwargs or {})
            if name != "convolution" or (args[0].dim() == 4 and not options["transposed"]):
                self._note(args[0], options)
        return output

    def _note(self, given: Tensor, options: dict[str, Any]) -> None:
        windows = options["weight"].shape[2:] if "weight" in options else options["kernel_size"]
        put_on = next((list(pads) for tensor, pads in self._padded if tensor is given), [])
        for axis in (0, 1):
            size, window = given.shape[axis - 2], _of(windows, axis)
            stride = _of(options["stride"] or windows, axis)
            before = after = _of(options["padding"], axis)
            if len(put_on) == 4:
                after += put_on[3 - 2 * axis]  # left, right, top, bottom
            span = _of(options.get("dilation") or 1, axis) * (window - 1) + 1
            lost = (size + 2 * before - span) % stride - after
            if window >= stride and lost > 0 and not options.get("ceil_mode"):
                self.cuts.append(Cut(lost, size, window, stride))


def _of(value: Any, axis: int) -> int:
    """One number for both axes, or one each."""
    return value if isinstance(value, int) else value[axis % len(value)]
