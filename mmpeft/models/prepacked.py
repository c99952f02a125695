"""Prepacked weights of frozen linears, for steps with few rows on CPU: the products of decoding in bf16.

oneDNN multiplies weights in blocks of its own. Handed a plain weight it lays the blocks out anew at every product,
which with a few rows takes about as long as the product; laid out once, the same kernel gives the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.transfer import is_sharded

ROWS = 32
"""Rows that the blocks are laid out for; others are multiplied by the same blocks."""
SHARE = 0.25
"""Of the memory that is free: second copies of weights take no more."""
MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
GROUP_FILES = (
    ("memory.max", "memory.current", ("memory.stat", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        ("memory/memory.stat", "total_inactive_file"),
    ),
)
"""Limit, use, and where the pages of files stand: of version 2, then of version 1."""
CONTROLLERS = ("", "memory")
"""What `OWN_GROUPS` calls the memory of each."""
OWN_GROUPS = Path("/proc/self/cgroup")


class PrepackedLinears:
    """The dense bf16 linears of a model on CPU, each with a second copy of its weight, made when it is first needed.

    Args:
        model: a language model.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._packed: dict[nn.Linear, tuple[tuple[Any, ...], Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrepackedLinears":
        """Without the copies, which are of the other model's weights."""
        return PrepackedLinears(memo.get(id(self._model), self._model))

    @contextmanager
    def in_use(self, adapted: Iterable[Any]) -> Iterator[None]:
        """Inside, linears multiply by their prepacked weights; there are no gradients.

        Args:
            adapted: the layers whose forward a bank has replaced, see `AdaptedForward`: it calls the linear's own as
                ``plain``.
        """
        own = {layer.base: layer for layer in adapted if hasattr(layer, "plain")}
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        for linear, prepacked in () if torch.is_grad_enabled() else self._forwards:
            holder, name = (vars(own[linear]), "plain") if linear in own else (vars(linear), "forward")
            forward = holder.get(name)
            if forward is None or getattr(forward, "__func__", None) is nn.Linear.forward:
                replaced.append((holder, name, forward))
                holder[name] = prepacked
        try:
            yield
        finally:
            for holder, name, forward in replaced:
                if forward is None:
                    del holder[name]
                else:
                    holder[name] = forward

    @cached_property
    def _forwards(self) -> list[tuple[nn.Linear, Callable[[Tensor], Tensor]]]:
        if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return []
        linears = [module for module in self._model.modules() if type(module) is nn.Linear]
        return [
            (linear, partial(self._forward, linear)) for linear in linears if _can_be_packed(linear.weight)
        ]

    @cached_property
    def _room(self) -> int:
        """Bytes that copies may take together."""
        return int(SHARE * free_memory())

    def _forward(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        if not _is_bf16_on_cpu(x) or (weight := self._weight(linear)) is None:
            return nn.functional.linear(x, linear.weight, linear.bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, linear.bias, "none", [], "")

    def _weight(self, linear: nn.Linear) -> Tensor | None:
        """The prepacked weight as the plain one is now; None where there is no room for it."""
        weight = linear.weight
        if not _is_bf16_on_cpu(weight) or weight.is_inference():  # such a one does not tell when it changes
            return None
        now = weight, weight._version, weight.data_ptr()
        (then, packed) = self._packed.get(linear, ((None,), None))
        if packed is not None and then[0] is weight and then[1:] == now[1:]:
            return packed
        if linear not in self._packed:
            if weight.nbytes > self._room:
                return None
            self._room -= weight.nbytes
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self._packed[linear] = now, packed
        return packed


def _can_be_packed(weight: Tensor) -> bool:
    """One that is sharded is gathered anew for every forward."""
    return _is_bf16_on_cpu(weight) and not is_sharded(weight)


def _is_bf16_on_cpu(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def free_memory() -> int:
    """Bytes that the system can give without swapping, within the limit of a container; 0 where it does not say."""
    lines = MEMORY.read_text().splitlines() if MEMORY.exists() else []
    sizes = dict(line.split(":", 1) for line in lines)
    free = 1024 * int(sizes.get("MemAvailable", "0 kB").split()[0])
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """Bytes that the control groups of this process may still take, its own and all above it, where they have a limit;
    pages of files that were read are given back. A container has its own at the root; a job of Slurm or a unit of
    systemd below. Source: the kernel's cgroup-v2.rst, and cgroup-v1/memory.rst."""
    left: list[int] = []
    for controller, (limit, usage, (pages, field)) in zip(CONTROLLERS, GROUP_FILES, strict=True):
        for group in _own_groups(controller):
            try:
                most, used = (int(_of_group(group, name)) for name in (limit, usage))
                stat = dict(line.split() for line in _of_group(group, pages).splitlines())
            except (OSError, ValueError):  # not of this version, or no limit: "max"
                continue
            left.append(max(0, most - used + int(stat.get(field, 0))))
    return left


def _own_groups(controller: str) -> list[PurePosixPath]:
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    told = (line.split(":", 2) for line in lines)
    own = next((path for _, names, path in told if controller in names.split(",")), "/")
    group = PurePosixPath(own).relative_to("/")
    return [group, *group.parents]


def _of_group(group: PurePosixPath, name: str) -> str:
    file = GROUP / name
    return (file.parent / group / file.name).read_text()
