"""Survey: which causal LM classes of the installed transformers are read exactly, and which methods adapt them.

Every class as a tiny random model, judged by the checks that a run makes of its own base.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from mmpeft.adapters import (
    AdapterConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from mmpeft.errors import RefusedError
from mmpeft.inference.adapter_check import check_adapters
from mmpeft.inference.self_check import check_language_model
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.reader import Reading
from mmpeft.models.vision import NoVision
from mmpeft.tools.tiny_models import causal_lm_types, tiny_model

METHODS: dict[str, Callable[[], AdapterConfig]] = {
    "LoRA": LoraConfig,
    "IA3": IA3Config,
    "bottleneck": BottleneckConfig,
    "prefix": PrefixConfig,
    "prompt": PromptConfig,
}
"""With the targets that "auto" means."""
WORKS, REFUSED, CRASHED = "yes", "refused", "CRASHED"


@dataclass
class Surveyed:
    """What came out for one class."""

    model_type: str
    reading: str
    """How its rows are read: "packed", "unpacked", "unpacked, no cache", "refused", "CRASHED" or "not built"."""
    why: str = ""
    methods: dict[str, str] = field(default_factory=dict)
    """Method -> whether it works."""
    refusals: dict[str, str] = field(default_factory=dict)
    """Method -> why it does not."""

    @property
    def exact(self) -> bool:
        return self.reading in (name_of(Reading(packed, cached=cached)) for packed, cached in _WAYS)


_WAYS = ((True, True), (False, True), (False, False))


def name_of(reading: Reading) -> str:
    """In a word."""
    if reading.packed:
        return "packed"
    return "unpacked" if reading.cached else "unpacked, no cache"


def survey(model_types: Sequence[str] = ()) -> Iterator[Surveyed]:
    """One class after the other.

    Args:
        model_types: of transformers; by default all that have a causal LM.
    """
    for model_type in model_types or causal_lm_types():
        yield _survey(model_type)


def count(found: Sequence[Surveyed]) -> dict[str, int]:
    """How many classes are read in which way, and on how many each method works."""
    ways = Counter(each.reading for each in found)
    return {
        "exact": sum(each.exact for each in found),
        **dict(ways.most_common()),
        **{method: sum(each.methods.get(method) == WORKS for each in found) for method in METHODS},
    }


def table(found: Sequence[Surveyed]) -> str:
    """In Markdown, one row a class."""
    lines = ["| model type | rows | " + " | ".join(METHODS) + " | why |", "|---" * (len(METHODS) + 3) + "|"]
    for each in found:
        marks = [each.methods.get(method, "") for method in METHODS]
        why = each.why or "; ".join(f"{method}: {reason}" for method, reason in each.refusals.items())
        lines.append(f"| {each.model_type} | {each.reading} | {' | '.join(marks)} | {_short(why)} |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Of what was surveyed."""
    return ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))


def _survey(model_type: str) -> Surveyed:
    try:
        language_model = tiny_model(model_type)
    except Exception as error:  # of transformers: a class that it cannot build says nothing about us
        return Surveyed(model_type, "not built", _told(error))
    try:
        model = _wrapped(language_model)
        checked = check_language_model(model)
    except Exception as error:
        return Surveyed(model_type, REFUSED if isinstance(error, RefusedError) else CRASHED, _told(error))
    found = Surveyed(model_type, name_of(checked.reading))
    if not checked.reading.packed:
        found.why = (*checked.failures.values(), "")[max(0, len(checked.failures) - 1)]
    for method, config in METHODS.items():
        found.methods[method], why = _adapted(model_type, checked.reading, config())
        if why:
            found.refusals[method] = why
    return found


def _adapted(model_type: str, reading: Reading, config: AdapterConfig) -> tuple[str, str]:
    """Whether a method works on a class, and why not."""
    try:
        model = _wrapped(tiny_model(model_type))
        model.reader.reading = reading
        model.bank.add("one", config)
        check_adapters(model, {})
    except RefusedError as error:
        return REFUSED, _told(error)
    except Exception as error:
        return CRASHED, _told(error)
    return WORKS, ""


def _wrapped(language_model: Any) -> MultimodalModel:
    encoder = NoVision()
    width = language_model.get_input_embeddings().weight.shape[1]
    return MultimodalModel(encoder, Projector(encoder.dim, width), language_model)


def _told(error: Exception) -> str:
    return f"{error}" if isinstance(error, RefusedError) else f"{type(error).__name__}: {error}"


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 160 else f"{line[:157]}..."
