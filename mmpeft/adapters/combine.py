"""Combining several finetunes into one (TIES, DARE, SVD, ...), and the federated average of clients.

The functions on states take tensors as `AdapterBank.tensors` names them: ``<path>.lora_A.weight`` (r, I) and
``<path>.lora_B.weight`` (O, r), or ``<path>.ia3_l``. A finetune that leaves a linear alone adds nothing there.

Methods, on the change that finetune i makes to a tensor (its A and its B; or l - 1):

- ``linear``: ``sum w_i t_i``. For LoRA a rough approximation, because A and B are summed apart.
- ``magnitude_prune``: linear, after keeping the largest share ``density`` of each t_i.
- ``ties``: the same pruning, then the mean of those that agree with the majority's sign (Yadav et al. 2023).
- ``dare_linear``, ``dare_ties``: a random share ``density``, rescaled by 1 / density, instead (Yu et al. 2023).
- ``cat`` (LoRA): ranks side by side, the exact ``sum w_i c_i B_i A_i``; the rank is the sum of the ranks.
- ``svd`` and ``..._svd`` (LoRA): the method on the products ``c_i B_i A_i``, cut to the closest of ``rank``.
- ``log`` (IA3): ``prod l_i ^ w_i``, so that halving and doubling cancel.

Source: PEFT's ``add_weighted_adapter`` and ``peft/utils/merge_utils.py``, whose results LoRA's methods have.
IA3 differs there: PEFT sums l itself, which shrinks activations when the weights do not sum to one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.entry import Entry
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.ia3 import IA3Config
from mmpeft.adapters.methods.lora import LoraConfig
from mmpeft.errors import RefusedError

State = dict[str, Tensor]
SUMS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
LORA_METHODS = (*SUMS, "cat", "svd", *(f"{method}_svd" for method in SUMS[1:]))
IA3_METHODS = (*SUMS, "log")


def combine(
    bank: AdapterBank,
    names: Sequence[str],
    new_name: str,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> Entry:
    """Adds the combination of the bank's finetunes ``names`` to the bank as ``new_name``.

    Args:
        method: one of `LORA_METHODS` or `IA3_METHODS`; the module's docstring explains them.
        weights: one per name, of any sign and sum; equal and summing to one by default.
        density: share in (0, 1] that pruning keeps.
        rank: of the svd methods; by default the largest of the finetunes'.
        seed: of the random pruning.

    Raises:
        RefusedError: finetunes of different kinds, an impossible setting, or what `AdapterBank.add` refuses.
    """
    configs: list[Any] = [bank.entry(name).config for name in names]
    kinds = {config.method for config in configs}
    if len(kinds) != 1:
        raise RefusedError(
            f"cannot combine {list(names)}: they are {sorted(kinds)}; all must be of one method"
        )
    if not kinds <= {LoraConfig.method, IA3Config.method}:
        raise RefusedError(
            f"cannot combine {list(names)}: there is no combination of {kinds.pop()}, only of lora and ia3"
        )
    states = [bank.tensors(name) for name in names]
    if isinstance(configs[0], LoraConfig):
        if patterned := [n for n, c in zip(names, configs, strict=True) if c.rank_pattern or c.alpha_pattern]:
            raise RefusedError(
                f"{patterned[0]} has ranks or scalings of its own in some linears (rank_pattern, alpha_pattern); "
                "combine finetunes of one rank and alpha"
            )
        scalings = [config.scaling for config in configs]
        state = combine_lora(states, scalings, method, weights, density, rank, seed)
    else:
        state = combine_ia3(states, method, weights, density, seed)
    new = bank.add(new_name, _config(configs[0], state))
    bank.fill(new_name, state)
    return new


def combine_lora(
    states: Sequence[State],
    scalings: Sequence[float],
    method: str,
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> State:
    """The combination as one LoRA with scaling 1 (alpha = rank); arguments as in `combine`.

    Args:
        scalings: alpha / rank of each state.

    Raises:
        RefusedError: an unknown method or impossible setting, or different ranks where ranks are summed.
    """
    weights = _checked(states, method, LORA_METHODS, weights, density)
    if rank is not None and not method.endswith("svd"):
        raise RefusedError(
            f"rank is {rank}, but {method} has no choice of rank; the methods ending in svd have"
        )
    ranks = [max(len(t) for key, t in state.items() if key.endswith("lora_A.weight")) for state in states]
    if method in SUMS and len(set(ranks)) > 1:
        raise RefusedError(f"{method} sums tensors of equal ranks, got ranks {ranks}; use cat or svd")
    new_rank = sum(ranks) if method == "cat" else max(ranks) if rank is None else rank
    generator = torch.Generator().manual_seed(seed)
    combined = {}
    for path in _paths(states, ".lora_"):
        key_A, key_B = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        own = [i for i, state in enumerate(states) if key_A in state]
        As, Bs = ([states[i][key].float().cpu() for i in own] for key in (key_A, key_B))
        w, c = ([values[i] for i in own] for values in (weights, scalings))
        A, B = _combine_factors(As, Bs, w, c, method, density, generator)
        if method.endswith("svd"):
            A, B = closest_of_rank(A, B, new_rank)
        combined[key_A] = F.pad(A, (0, 0, 0, new_rank - len(A)))
        combined[key_B] = F.pad(B, (0, new_rank - B.shape[1]))
    return combined


def _combine_factors(
    As: list[Tensor],
    Bs: list[Tensor],
    weights: Sequence[float],
    scalings: Sequence[float],
    method: str,
    density: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One linear's A (R, I) and B (O, R), before they are cut to a rank."""
    if method in SUMS:
        # either factor gets the square root of w c, and A the sign
        wc = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
        A = combine_tensors(As, [math.copysign(abs(x) ** 0.5, x) for x in wc], method, density, generator)
        return A, combine_tensors(Bs, [abs(x) ** 0.5 for x in wc], method, density, generator)
    scaled = [scaling * A for scaling, A in zip(scalings, As, strict=True)]
    if method in ("cat", "svd"):
        A = torch.cat([weight * A for weight, A in zip(weights, scaled, strict=True)])
        return A, torch.cat(Bs, dim=1)
    products = [B @ A for A, B in zip(scaled, Bs, strict=True)]
    A = combine_tensors(products, weights, method.removesuffix("_svd"), density, generator)
    return A, torch.eye(len(A))


def combine_ia3(
    states: Sequence[State],
    method: str,
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> State:
    """The combination as one IA3; arguments as in `combine`.

    Raises:
        RefusedError: an unknown method or impossible setting, a linear that one state scales at its input and
            another at its output, or for ``log`` an l that is not positive.
    """
    weights = _checked(states, method, IA3_METHODS, weights, density)
    generator = torch.Generator().manual_seed(seed)
    combined = {}
    for path in _paths(states, ".ia3_l"):
        key = f"{path}.ia3_l"
        w = [weight for weight, state in zip(weights, states, strict=True) if key in state]
        vectors = [state[key].float().cpu() for state in states if key in state]
        if len({vector.shape for vector in vectors}) > 1:
            raise RefusedError(f"{path}: some of the finetunes scale its input and some its output")
        if method != "log":
            delta = combine_tensors([vector - 1 for vector in vectors], w, method, density, generator)
            combined[key] = 1 + delta
        elif min(vector.min() for vector in vectors) > 0:
            combined[key] = combine_tensors([vector.log() for vector in vectors], w, "linear").exp()
        else:
            raise RefusedError(f"{key} has values <= 0, which have no logarithm; use linear")
    return combined


def combine_tensors(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    method: str,
    density: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Several finetunes' changes of one tensor into one, by one of `SUMS`; all tensors of one shape."""
    if method.startswith("dare"):
        keep = torch.full_like(deltas[0], density)
        deltas = [delta * torch.bernoulli(keep, generator=generator) / density for delta in deltas]
    elif method != "linear":
        deltas = [_largest(delta, density) for delta in deltas]
    stacked = torch.stack(list(deltas))
    weighted = stacked * torch.tensor(weights).view(-1, *[1] * deltas[0].dim())
    if not method.endswith("ties"):
        return weighted.sum(0)
    majority = torch.where(stacked.sum(0) >= 0, 1, -1)
    agree = stacked.sign() == majority
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def closest_of_rank(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the matrix of at most ``rank`` closest to ``B A`` (Eckart and Young).

    By the QR of the factors: the decomposition costs as the inner dimension does, not as I and O.

    Args:
        A: (R, I)
        B: (O, R)

    Returns:
        (rank, I) with orthonormal rows, and (O, rank); fewer than ``rank`` where the shapes do not have it.
    """
    basis_A, core_A = torch.linalg.qr(A.T)
    basis_B, core_B = torch.linalg.qr(B)
    U, S, V = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    return V[:rank] @ basis_A.T, basis_B @ (U * S)[:, :rank]


def federated_average(states: Sequence[State], num_examples: Sequence[float]) -> State:
    """The clients' tensors, averaged by their numbers of training examples: FedAvg's server step.

    It averages what was trained: for LoRA, A and B apart. ``mean(B) mean(A)`` is not ``mean(B A)``, the
    average of the clients' updates; the two agree only where all clients share A or B. For the exact average
    use `combine_lora` with ``cat``, or ``svd`` to keep the rank, and weights ``num_examples / total``.

    Raises:
        RefusedError: states of different names or shapes, or counts that are negative or sum to zero.

    Source: McMahan et al. 2017, algorithm 1.
    """
    if len(states) != len(num_examples) or min(num_examples, default=0) < 0 or sum(num_examples) <= 0:
        raise RefusedError(f"num_examples is {list(num_examples)}; wanted {len(states)} counts, not all zero")
    shapes = [{key: tensor.shape for key, tensor in state.items()} for state in states]
    for client, shape in enumerate(shapes):
        if shape != shapes[0]:
            different = min(key for key in shapes[0] | shape if shape.get(key) != shapes[0].get(key))
            raise RefusedError(
                f"client {client} differs from client 0 in {different}; all must train the same config"
            )
    shares = [count / sum(num_examples) for count in num_examples]
    return {
        key: combine_tensors([s[key].float().cpu() for s in states], shares, "linear") for key in states[0]
    }


def _config(example: AdapterConfig, state: State) -> AdapterConfig:
    """The new finetune's config, with its targets by path: the finetunes' targets may be of any form."""
    if isinstance(example, LoraConfig):
        rank = len(next(tensor for key, tensor in state.items() if key.endswith("lora_A.weight")))
        return LoraConfig(rank, alpha=rank, target_modules=_paths([state], ".lora_"))
    paths = _paths([state], ".ia3_l")
    return IA3Config(paths, [path for path in paths if len(state[f"{path}.ia3_l"]) == 1])


def _paths(states: Sequence[State], separator: str) -> list[str]:
    """The linears that any state changes, in order."""
    return list(dict.fromkeys(key.rsplit(separator, 1)[0] for state in states for key in state))


def _largest(delta: Tensor, density: float) -> Tensor:
    """``delta`` with all but its share ``density`` of largest magnitude set to zero."""
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    return torch.zeros_like(delta).flatten().index_fill(0, kept, 1).view_as(delta) * delta


def _checked(
    states: Sequence[State],
    method: str,
    methods: Sequence[str],
    weights: Sequence[float] | None,
    density: float,
) -> Sequence[float]:
    """The weights, equal ones by default."""
    if not states:
        raise RefusedError("no finetunes to combine")
    if method not in methods:
        raise RefusedError(f"method is {method!r}; for these finetunes there are {', '.join(methods)}")
    if not 0 < density <= 1:
        raise RefusedError(f"density is {density}; it is the share that pruning keeps, in (0, 1]")
    weights = [1 / len(states)] * len(states) if weights is None else weights
    if len(weights) != len(states):
        raise RefusedError(f"got {len(weights)} weights for {len(states)} finetunes")
    sick = [key for state in states for key, tensor in state.items() if not tensor.isfinite().all()]
    if sick:
        raise RefusedError(
            f"a finetune that diverged: {len(sick)} tensors hold NaN or infinity, such as {sick[0]}"
        )
    return weights
