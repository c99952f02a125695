"""The finetunes of a run: what each is called, its method, settings, data, slots and projector.

A run is a dict of them. `model.adapter` in the YAML is short for one entry, called `model.adapter_name`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, Literal

from torch import Tensor

from mmpeft.adapters import AdapterConfig
from mmpeft.data.batch import Conversations
from mmpeft.data.preferred import Sides
from mmpeft.data.records import Record
from mmpeft.data.sequences import parts_of
from mmpeft.errors import RefusedError
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.token_losses import TokenLosses
from mmpeft.training.objectives import ChoiceLosses, Sum, objective
from mmpeft.training.optim import Slice, SlotParameters
from mmpeft.training.preferences import KINDS, Kind, Objective, PreferenceConfig, preference_terms

Schedule = Literal["cosine", "linear", "constant"]
Split = Literal["train", "val", "test", "predict"]


@dataclass
class FinetuneConfig:
    """One of several finetunes that train together; what is not given is as for the whole run."""

    adapter: AdapterConfig
    """Its method."""
    train: str | list[str] | None = None
    """Its own training data."""
    val: str | list[str] | None = None
    """Its own validation data."""
    test: str | list[str] | None = None
    """Its own held-out data."""
    learning_rate: float | None = None
    """Of its adapter."""
    projector_learning_rate: float | None = None
    """Of its projector."""
    weight_decay: float | None = None
    """Of both."""
    schedule: Schedule | None = None
    """Decay of both learning rates after warm-up."""
    warmup: float | None = None
    """Share of its steps over which they rise from zero."""
    max_steps: int | None = None
    """It leaves after so many steps while the others go on."""
    shots_seed: int | None = None
    """Which few-shot examples it trains on, where data.shots is given."""
    choice_losses: ChoiceLosses | None = None
    """Weights of what it learns from wrong choices."""
    lora_b_ratio: float | None = None
    """Of LoRA's B, in multiples of its A's learning rate."""
    objective: Objective | None = None
    """What it learns: answers ("likelihood"), or what is preferred."""
    preferences: PreferenceConfig | None = None
    """Settings of its objective, all of them."""
    seed: int | None = None
    """Start of its adapter, order of its data, and what dropout drops; a fresh projector starts as the run's."""


@dataclass
class Settings:
    """How a finetune trains: its own settings, and the run's where it has none."""

    learning_rate: float = 1e-3
    projector_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    choice_losses: ChoiceLosses = field(default_factory=ChoiceLosses)
    lora_b_ratio: float = 1.0
    objective: Objective = "likelihood"
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)
    where: InitVar[str] = "model"
    """Section of the config, for errors."""

    def __post_init__(self, where: str):
        for name in ("learning_rate", "projector_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RefusedError(
                    f"{where}.{name} is {getattr(self, name)}; it must be a number of at least 0"
                )
        if not 0 < self.lora_b_ratio < math.inf:
            raise RefusedError(f"{where}.lora_b_ratio is {self.lora_b_ratio}; it must be a number above 0")
        if not 0 <= self.warmup <= 1:
            raise RefusedError(f"{where}.warmup is {self.warmup}; it is a share of the steps, from 0 to 1")
        if self.objective == "likelihood":
            return
        self.preferences.check(self.objective, where)
        if self.choice_losses.wanted and self.choice_losses != ChoiceLosses():
            raise RefusedError(
                f"{where}.choice_losses are T-Few's, and {where}.objective is {self.objective}, which learns from "
                "wrong answers by itself: take one of them, or set both losses to 0"
            )

    @property
    def kind(self) -> Kind:
        """What the objective asks for."""
        return KINDS[self.objective]

    def terms(
        self,
        policy: TokenLosses,
        reference: TokenLosses | None,
        conversations: Conversations,
        point: Tensor | None = None,
    ) -> dict[str, Sum]:
        """The loss terms of some rows, and of preferences what is told beside them; see `objective` and
        `preference_terms`."""
        if self.objective == "likelihood":
            return objective(policy, reference, conversations, self.choice_losses)
        return preference_terms(self.objective, self.preferences, policy, reference, conversations, point)


@dataclass
class Finetune:
    """One finetune of a run. What is None or empty comes with the data, or with the model."""

    name: str
    adapter: AdapterConfig | None
    """Its method; None trains the projector alone."""
    settings: Settings
    paths: dict[Split, list[str]] = field(default_factory=dict)
    """Its own data files, where they are not the run's."""
    max_steps: int | None = None
    shots_seed: int | None = None
    seed: int | None = None
    records: dict[Split, Sequence[Record]] = field(default_factory=dict)
    """What it trains on and is asked, once that was read."""
    mix: list[tuple[int, float]] | None = None
    """(examples, weight) of every training file, where they are mixed by weight."""
    parameters: SlotParameters | None = None
    """What of the stacks and of the projector is its own, once it trains."""

    def keep(self, split: Split, records: Sequence[Record]) -> None:
        """Goes on with some of its records of a split, file by file."""
        if records is self.records[split]:
            return
        self.records[split] = records
        if split == "train" and self.mix is not None:
            weights = [weight for _, weight in self.mix]
            self.mix = [(len(part), weight) for part, weight in zip(parts_of(records), weights, strict=True)]

    @property
    def learns_from_choices(self) -> bool | Sides:
        """Whether it does where there are some; or what every row must have."""
        if self.settings.objective == "likelihood":
            return self.settings.choice_losses.wanted
        return self.settings.kind.sides

    @property
    def learns_from_labels(self) -> bool:
        """Whether it learns from answers that are labelled as good or bad."""
        return self.learns_from_choices == "labels"

    def adapter_in(self, model: MultimodalModel) -> str | None:
        """Whose rows its rows are; None is the base, where the projector alone trains."""
        return self.name if self.name in model.bank else None

    def train_in(self, model: MultimodalModel, train_projector: bool) -> SlotParameters:
        """Takes hold of its slots."""
        adapter: list[Slice] = []
        if self.adapter is not None:
            seconds = {(part.method, part.second_factor) for part in self.adapter.parts()}
            for _, stack, slot in model.bank.places(self.name):
                adapter += [
                    Slice(
                        *(parameter, slot, stack.origin, stack.own_dims(key, slot), stack.of_images),
                        is_second_factor=(stack.method, key) in seconds,
                    )
                    for key, parameter in stack.named_parameters()
                ]
        slot = model.projector_slots.get(self.name, 0)
        projector = list(model.projector.parameters()) if train_projector else []
        own = [Slice(parameter, slot, of_images=True) for parameter in projector]
        self.parameters = SlotParameters(self.name, adapter, own)
        return self.parameters


def make_finetunes(
    adapter: AdapterConfig | None,
    adapter_name: str,
    adapters: Mapping[str, FinetuneConfig] | None,
    defaults: Settings,
) -> dict[str, Finetune]:
    """The finetunes that a config names.

    Raises:
        RefusedError: both ways of naming them are used, or none is named.
    """
    if adapters is None:
        _check_ratio(adapter, defaults, "model")
        return _checked({adapter_name: Finetune(adapter_name, adapter, defaults)}, defaults)
    if adapter is not None or not adapters:
        raise RefusedError(
            "model.adapters holds the finetunes of a joint run: give at least one, and no model.adapter beside them"
        )
    return _checked({name: _finetune(name, config, defaults) for name, config in adapters.items()}, defaults)


def _checked(finetunes: dict[str, Finetune], defaults: Settings) -> dict[str, Finetune]:
    """Raises:
    RefusedError: settings of preferences that no finetune has a use for.
    """
    given = defaults.preferences.given
    if given and all(own.settings.objective == "likelihood" for own in finetunes.values()):
        raise RefusedError(
            f"model.preferences.{given[0]} is given, but nothing learns from preferences: set model.objective to "
            f"{', '.join(name for name in KINDS if name != 'likelihood')}, or take it out"
        )
    return finetunes


def _finetune(name: str, config: FinetuneConfig, defaults: Settings) -> Finetune:
    where = f"model.adapters.{name}"
    if config.max_steps is not None and config.max_steps < 1:
        raise RefusedError(f"{where}.max_steps is {config.max_steps}; it must be at least 1, or null")
    if config.preferences is not None and (config.objective or defaults.objective) == "likelihood":
        raise RefusedError(
            f"{where}.preferences are given, but its objective is likelihood: set {where}.objective"
        )
    settings: dict[str, Any] = {"where": where}
    for each in fields(Settings):
        own = getattr(config, each.name)
        settings[each.name] = getattr(defaults, each.name) if own is None else own
    _check_ratio(config.adapter, trains := Settings(**settings), where)
    given: dict[Split, str | list[str] | None] = {
        "train": config.train,
        "val": config.val,
        "test": config.test,
    }
    paths: dict[Split, list[str]] = {
        split: [path] if isinstance(path, str) else path for split, path in given.items() if path is not None
    }
    return Finetune(*(name, config.adapter, trains, paths, config.max_steps, config.shots_seed, config.seed))


def _check_ratio(adapter: AdapterConfig | None, settings: Settings, where: str) -> None:
    """Raises:
    RefusedError: a rate of LoRA's B is given to what has none.
    """
    parts = adapter.parts() if adapter else []
    if settings.lora_b_ratio != 1 and not any(part.second_factor for part in parts):
        named = ", ".join(type(part).__name__ for part in parts) or "no adapter"
        raise RefusedError(
            f"{where}.lora_b_ratio is {settings.lora_b_ratio:g}, the rate of LoRA's B in multiples of A's, but the "
            f"finetune has {named}: take a LoraConfig, or leave the ratio at 1"
        )
