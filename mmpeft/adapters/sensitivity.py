"""Sensitivity (Taylor importance) of a loss to each linear: where a small budget of adapters is best spent."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmpeft.errors import RefusedError

Batch = TypeVar("Batch")


def sensitivity(
    model: nn.Module, batches: Iterable[Batch], paths: Sequence[str], loss_of: Callable[[Batch], Tensor]
) -> dict[str, float]:
    """First-order Taylor sensitivity of the loss to each linear's weight: ``mean over batches of sum |w dL/dw|``.

    ``|w dL/dw|`` is how much the loss would change, to first order, if that one number became zero. Each gradient
    is reduced to its sum as soon as the backward has it and then dropped, so the gradients of all weights are never
    there together. The weights, their ``requires_grad`` and any gradient of other parameters stay as they were.

    Args:
        model: the frozen model.
        batches: what ``loss_of`` takes.
        paths: linears of the model.
        loss_of: batch -> scalar loss, a mean over tokens so that batches of different size count the same.

    Raises:
        RefusedError: no batch, a weight without gradients (4-bit, 8-bit), or a loss that is not finite or does not
            depend on a weight.

    Source: after Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", whose criterion squares
    each term; the magnitude is not ruled by a few large weights.
    """
    weights = {path: _weight(model, path) for path in paths}
    count = 0
    with _summing_gradients(weights) as (totals, seen):
        for batch in batches:
            with torch.enable_grad():
                loss = loss_of(batch)
            if not bool(loss.isfinite()):
                raise RefusedError(
                    f"the loss of batch {count} is {loss.item()}; sensitivities need a finite one"
                )
            seen.clear()
            loss.backward()
            if unused := [path for path in paths if path not in seen]:
                raise RefusedError(
                    f"the loss of batch {count} does not depend on {unused[0]}; leave it out of paths"
                )
            count += 1
    if not count:
        raise RefusedError("no batch was given; sensitivities are means over batches")
    return {path: float(total) / count for path, total in totals.items()}


@contextmanager
def _summing_gradients(weights: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], set[str]]]:
    """Inside, every backward adds each weight's ``sum |w dL/dw|`` to its total and drops the gradient.

    Yields:
        The totals by path, fp64 scalars, and the paths whose weights had a gradient.
    """
    before = {path: weight.requires_grad for path, weight in weights.items()}
    totals = {path: torch.zeros((), dtype=torch.float64) for path in weights}
    seen: set[str] = set()

    def reduce(path: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None, "the hook runs once the gradient is accumulated"
            totals[path] += (weight.detach().float() * weight.grad.float()).abs().sum().double().cpu()
            weight.grad = None
            seen.add(path)

        return add

    hooks = []
    try:
        for path, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(reduce(path)))
        yield totals, seen
    finally:
        for hook in hooks:
            hook.remove()
        for path, weight in weights.items():
            weight.requires_grad_(before[path])


def top_sites(scores: Mapping[str, float], cost_per_site: Mapping[str, int], budget: int) -> list[str]:
    """The sites to adapt with at most ``budget`` parameters, best first.

    They are taken by score per parameter, since a large linear scores more for its size alone; one that no longer
    fits is passed over.

    Raises:
        RefusedError: a site without a cost or with one below 1, or a budget that pays for none.
    """
    wrong = [path for path in scores if cost_per_site.get(path, 0) < 1]
    if wrong:
        raise RefusedError(f"cost_per_site has no count of parameters for {wrong[0]}; give one of at least 1")
    chosen, left = [], budget
    for path in sorted(scores, key=lambda path: scores[path] / cost_per_site[path], reverse=True):
        if cost_per_site[path] <= left:
            chosen.append(path)
            left -= cost_per_site[path]
    if not chosen:
        cheapest = min(cost_per_site[path] for path in scores) if scores else "none given"
        raise RefusedError(
            f"a budget of {budget:,} parameters pays for no site (the cheapest: {cheapest}); raise it"
        )
    return chosen


def _weight(model: nn.Module, path: str) -> Tensor:
    weight = model.get_submodule(path).weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        dtype = getattr(weight, "dtype", type(weight).__name__)
        raise RefusedError(
            f"{path} holds its weight as {dtype}, which has no gradient; load the model without quantization"
        )
    return weight
