"""Choosing targets by budget: ``target_modules: top-500000`` takes the linears the loss depends on most."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from mmpeft.adapters import AdapterConfig, HybridConfig
from mmpeft.adapters.architecture import block_linears
from mmpeft.adapters.places import num_parameters
from mmpeft.adapters.sensitivity import sensitivity, top_sites
from mmpeft.adapters.targets import settle
from mmpeft.data.batch import Batch
from mmpeft.models.multimodal import MultimodalModel

BUDGET = re.compile(r"top-(\d[\d_]*)")
BATCHES = 4
"""Batches of the training data that the sensitivity is the mean of."""


def budget_of(config: AdapterConfig) -> int | None:
    """Parameters that ``target_modules: top-N`` may spend; None where the places are named otherwise."""
    match = BUDGET.fullmatch(config.target_modules) if isinstance(config.target_modules, str) else None
    return int(match[1]) if match else None


def has_budget(config: AdapterConfig) -> bool:
    """Whether a part of the config leaves its places to be chosen."""
    return any(budget_of(part) is not None for part in config.parts())


def rank_linears(model: MultimodalModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Path of every linear of the decoder layers -> how sensitive the loss is to it, mean over the batches.

    Raises:
        RefusedError: no batch, or a quantised base, whose weights have no gradient.
    """
    language_model: Any = model.language_model
    paths = block_linears(language_model)
    return sensitivity(language_model, batches, paths, lambda batch: model.token_losses(batch).nll.mean())


def linear_costs(model: MultimodalModel, config: AdapterConfig) -> dict[str, int]:
    """Path of every linear of the decoder layers -> parameters that an adapter of this config has there."""
    language_model: Any = model.language_model
    settled = settle(language_model, config)
    return {path: num_parameters(language_model, path, settled) for path in block_linears(language_model)}


def choose_sites(
    config: AdapterConfig, model: MultimodalModel, batches: Callable[[int], Sequence[Batch]]
) -> AdapterConfig:
    """The config with the chosen linears by name.

    Args:
        model: before any adapter is added.
        batches: number -> so many batches of the training data.

    Raises:
        RefusedError: a quantised base, whose weights have no gradient, or a budget that pays for no linear.
    """
    if isinstance(config, HybridConfig):
        return HybridConfig([choose_sites(part, model, batches) for part in config.methods])
    budget = budget_of(config)
    if budget is None:
        return config
    base_batches = [
        replace(batch, adapters=[None] * len(batch.adapters)).to(model.device) for batch in batches(BATCHES)
    ]
    costs = linear_costs(model, config)
    chosen = top_sites(rank_linears(model, base_batches), costs, budget)
    spent = sum(costs[path] for path in chosen)
    print(f"{len(chosen)} of {len(costs)} linears chosen for {spent:,} of {budget:,} parameters")
    return replace(config, target_modules=chosen)  # pyright: ignore[reportArgumentType]
