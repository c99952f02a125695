"""Which linears of a language model an adapter goes to."""

import difflib
import re
from collections.abc import Iterable

from torch import nn

from mmpeft.adapters.ia3 import IA3Config
from mmpeft.adapters.linear import AdapterLinear
from mmpeft.adapters.stack import AdapterConfig

ATTENTION_QV = ["q_proj", "v_proj"]
"""LoRA's default places (Hu et al., table 5)."""
KEYS_VALUES_FEEDFORWARD = ["k_proj", "v_proj", "down_proj"]
"""IA3's places in models with a gated feed-forward: Llama, Mistral, Qwen, Gemma, SmolLM."""
FEEDFORWARD_OUT = ["down_proj", "fc2", "c_proj", "dense_4h_to_h"]
"""Names of the feed-forward's last linear, where IA3 scales the input."""


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a module that can be adapted; None for any other."""
    if isinstance(module, AdapterLinear | nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear of transformers keeps its weight as (in, out)
        rows, columns = module.weight.shape  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
        return int(rows), int(columns)
    return None


def find_sites(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The linears that ``config.target_modules`` names, by their path in ``model``.

    Raises:
        ValueError: a name matches nothing; the message has the closest names of this model.
    """
    linears = dict(_linears(model))
    targets = config.target_modules
    if targets == "all-linear":
        sites = linears
    else:
        if targets == "auto":
            targets = KEYS_VALUES_FEEDFORWARD if isinstance(config, IA3Config) else ATTENTION_QV
        sites = _chosen(model, linears, "target_modules", targets)
    if isinstance(config, IA3Config) and config.feedforward_modules not in ("auto", []):
        _chosen(model, sites, "feedforward_modules", config.feedforward_modules)
    return sites


def is_feedforward(path: str, config: IA3Config) -> bool:
    """Whether IA3 scales this site's input rather than its output."""
    modules = FEEDFORWARD_OUT if config.feedforward_modules == "auto" else config.feedforward_modules
    return names_module(path, modules)


def names_module(path: str, names: str | list[str]) -> bool:
    """PEFT's rule: a list names modules by their path or the end of it, a string is a pattern for the whole
    path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _linears(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Every linear inside the model's blocks: the output head and what sits inside an adapted linear do not
    count."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, AdapterLinear))
    for path, module in model.named_modules():
        if module is not head and linear_features(module) and not path.startswith(inside):
            yield path, module


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field} {pattern!r} is not a valid pattern: {error}") from None


def _chosen(
    model: nn.Module, linears: dict[str, nn.Module], field: str, names: str | list[str]
) -> dict[str, nn.Module]:
    alternatives = [names] if isinstance(names, str) else [[name] for name in names]
    for pattern in alternatives:
        if isinstance(pattern, str):
            _check_pattern(field, pattern)
    unmatched = [each for each in alternatives if not any(names_module(path, each) for path in linears)]
    if unmatched or not names:
        wrong = [each if isinstance(each, str) else each[0] for each in unmatched]
        known = sorted({path.rsplit(".", 1)[-1] for path in linears})
        closest = sorted({hit for name in wrong for hit in difflib.get_close_matches(name, known, n=1)})
        hint = f"closest: {', '.join(map(repr, closest))}; " if closest else ""
        raise ValueError(
            f"{field} {wrong or names!r} matched no linear of {type(model).__name__}; {hint}"
            f"its linears are called {', '.join(known) or '(it has none)'}"
        )
    return {path: module for path, module in linears.items() if names_module(path, names)}
