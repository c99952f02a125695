"""What one of several finetunes of a joint run has of its own."""

from dataclasses import dataclass
from typing import Literal

from mmpeft.adapters import AdapterConfig
from mmpeft.training.objectives import ChoiceLosses

Schedule = Literal["cosine", "linear", "constant"]


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
