"""One finetune of several methods: LoRA beside a prompt, or other methods on other layers."""

from dataclasses import dataclass, field
from typing import ClassVar

from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.errors import RefusedError


@dataclass
class HybridConfig(AdapterConfig):
    """Several methods that are trained, stored and routed as one finetune."""

    method: ClassVar[str] = "hybrid"
    peft_type: ClassVar[str] = "MMPEFT_HYBRID"
    composed: ClassVar[bool] = True

    methods: list[AdapterConfig] = field(default_factory=list)
    """The parts. Two of one method must not share a layer."""

    def __post_init__(self):
        if not self.methods:
            raise RefusedError("HybridConfig.methods is empty; name at least one method")
        if any(isinstance(part, HybridConfig) for part in self.methods):
            raise RefusedError("HybridConfig.methods holds another hybrid; list its methods instead")

    def parts(self) -> list[AdapterConfig]:
        return self.methods
