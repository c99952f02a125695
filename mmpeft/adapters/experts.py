"""Mixtures of experts whose experts are one tensor per projection: per-row adapters on what each token is routed to.

``down_e(act(gate_e x) * up_e x)`` for the experts e of a token, weighted by the router and summed. The experts see all
tokens of a batch as one list, row by row, so that a token's row, and with it its finetune, is known by its place.

Paths name a projection as its Parameter: ``model.layers.0.mlp.experts.down_proj``.

Source: ``use_experts_implementation`` of transformers, by which a class of experts says how its tensors lie.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpeft.adapters.functional import BASE
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.routing import Routing
from mmpeft.errors import RefusedError

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in tensors of a layout that it tells."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate")


def projections(module: nn.Module) -> list[str]:
    """The names of the projections of packed experts, in the order of the module."""
    if not is_experts(module):
        return []
    return [name for name, tensor in module.named_parameters(recurse=False) if name in PROJECTIONS]


def expert_features(module: Any, projection: str) -> tuple[int, int, int]:
    """(experts, in, out) of a projection."""
    count, first, second = getattr(module, projection).shape
    return (count, first, second) if module.is_transposed else (count, second, first)


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Every projection of packed experts by its path."""
    return {
        f"{path}.{name}": module for path, module in model.named_modules() for name in projections(module)
    }


def dense_experts(module: Any, projection: str) -> Tensor:
    """(experts, O, I): a view of a projection's weight."""
    weight = getattr(module, projection).detach()
    return weight.transpose(1, 2) if module.is_transposed else weight


def split_path(model: nn.Module, path: str) -> tuple[nn.Module, str] | None:
    """The experts and the projection that ``path`` names; None where it names a module."""
    parent, _, name = path.rpartition(".")
    if name not in PROJECTIONS:
        return None
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return None
    return (module, name) if is_experts(module) and hasattr(module, name) else None


def expert_key(model: nn.Module, path: str, sites: list[str]) -> str:
    """What PEFT's files call the site at ``path`` of an adapter: a module by its path; a projection by its experts', in
    which all of the adapter's but the last of the module are nested.

    Source: PEFT, ``lora.ParamWrapper``.
    """
    found = split_path(model, path)
    if found is None:
        return path
    module, own = found
    parent = path.rpartition(".")[0]
    names = [name for name in projections(module) if f"{parent}.{name}" in sites]
    return parent + ".base_layer" * (len(names) - 1 - names.index(own))


class AdaptedExperts:
    """What packed experts compute in place of their own forward: the tokens of an adapted row pass through experts with
    that row's changes, those of base rows through the experts' own forward.

    Stacks on experts have ``on_expert_input(x, slot, expert)`` and ``on_expert_output(x, y, slot, expert)`` for the
    tokens (n, features) that one finetune sends to one expert.

    Args:
        base: the frozen experts; they are adapted at once.
    """

    def __init__(self, base: Any, routing: Routing):
        self.base, self.routing = base, routing
        self.stacks: dict[str, list[Stack]] = {name: [] for name in projections(base)}
        """Projection -> its stacks, in the order in which they act."""
        self.plain: Any = base.forward
        self._replaced = base.__dict__.get("forward")
        self._names = list(inspect.signature(type(base).forward).parameters)[1:]
        base.forward = self

    def put(self, projection: str, stack: Stack) -> None:
        """Adds the stack of a method, in its turn."""
        stack.routing = self.routing
        self.stacks[projection] = sorted([*self.stacks[projection], stack], key=lambda each: each.turn)

    def remove(self) -> None:
        """Gives the experts their own forward back."""
        if self._replaced is not None:
            self.base.forward = self._replaced
        elif self.base.__dict__.get("forward") is self:
            del self.base.forward

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Tokens (n, dim), their experts (n, k) int64 and the weights of these (n, k) -> (n, dim).

        Raises:
            RefusedError: no routing yet, or tokens that are no whole rows.
        """
        x, chosen, weights = (*inputs, *(named[name] for name in self._names[len(inputs) :]))
        rows = self._rows()
        if x.shape[0] % len(rows):
            raise RefusedError(
                f"adapted experts got {x.shape[0]} tokens, but the routing was written for {len(rows)} rows; call "
                "bank.route(names) with one name per row before the forward"
            )
        served = [slots for slots in dict.fromkeys(rows) if any(slot != BASE for _, slot in slots)]
        if not served:
            return self.plain(x, chosen, weights)
        every = len(served) == len({*rows})
        out = torch.zeros_like(x) if every else self.plain(x, chosen, weights)
        for slots in served:
            row = torch.tensor([each == slots for each in rows], device=x.device)
            own = row.repeat_interleave(x.shape[0] // len(rows)).nonzero()[:, 0]
            out = out.index_copy(0, own, self._adapted(x[own], chosen[own], weights[own], dict(slots)))
        return out

    def _rows(self) -> list[tuple[tuple[str, int], ...]]:
        """Of each row its slot in every method that changes these experts."""
        methods = dict.fromkeys(stack.method for stacks in self.stacks.values() for stack in stacks)
        if any(method not in self.routing.slots for method in methods):
            raise RefusedError("no routing: say which adapter serves each row first, see AdapterBank.route")
        columns = [[(method, slot) for slot in self.routing.slots[method].tolist()] for method in methods]
        return list(zip(*columns, strict=True))

    def _adapted(self, x: Tensor, chosen: Tensor, weights: Tensor, slots: Mapping[str, int]) -> Tensor:
        base = self.base
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            if expert >= base.down_proj.shape[0]:  # no expert: the token passes it
                continue
            token, place = (chosen == expert).nonzero(as_tuple=True)
            hidden = self._project("gate_up_proj" if base.has_gate else "up_proj", x[token], expert, slots)
            hidden = base._apply_gate(hidden) if base.has_gate else base.act_fn(hidden)
            y = self._project("down_proj", hidden, expert, slots)
            if getattr(base, "has_post_expert_norm", False):
                y = base.post_expert_norm(y)
            out = out.index_add(0, token, (y * weights[token, place, None]).to(out.dtype))
        return out

    def _project(self, projection: str, x: Tensor, expert: int, slots: Mapping[str, int]) -> Tensor:
        stacks = [stack for stack in self.stacks[projection] if stack.serves(slots[stack.method])]
        scaled: Any = x
        for stack in stacks:
            scaled = stack.on_expert_input(scaled, slots[stack.method], expert)
        weight = getattr(self.base, projection)[expert]
        bias = getattr(self.base, f"{projection}_bias")[expert] if self.base.has_bias else None
        y: Any = F.linear(scaled, weight.T if self.base.is_transposed else weight, bias)
        for stack in stacks:
            y = stack.on_expert_output(x, y, slots[stack.method], expert)
        return y


class AdaptedProjection:
    """One projection of adapted experts, as the bank's layer of its path."""

    def __init__(self, experts: AdaptedExperts, projection: str):
        self.experts, self.projection = experts, projection

    @property
    def base(self) -> nn.Module:
        return self.experts.base

    @property
    def plain(self) -> Any:
        return self.experts.plain

    @property
    def stacks(self) -> dict[str, Stack]:
        return {stack.method: stack for stack in self.experts.stacks[self.projection]}

    def put(self, place: str, stack: Stack) -> None:
        self.experts.put(self.projection, stack)

    def remove(self) -> None:
        self.experts.remove()


def adapt_projection(module: nn.Module, projection: str, routing: Routing) -> AdaptedProjection:
    """One projection of experts, which are adapted by its first."""
    forward: Any = module.forward
    shared = isinstance(forward, AdaptedExperts) and forward.routing is routing
    return AdaptedProjection(forward if shared else AdaptedExperts(module, routing), projection)
