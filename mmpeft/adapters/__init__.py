"""Parameter-efficient finetuning on stacked tensors: many finetunes on one frozen model, routed per row."""

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.bitfit import BitFitConfig
from mmpeft.adapters.bottleneck import BottleneckConfig
from mmpeft.adapters.dora import DoraConfig
from mmpeft.adapters.full import FullConfig
from mmpeft.adapters.hybrid import HybridConfig
from mmpeft.adapters.ia3 import IA3Config
from mmpeft.adapters.image_prompt import ImagePromptConfig
from mmpeft.adapters.lora import LoraConfig
from mmpeft.adapters.prefix import PrefixConfig
from mmpeft.adapters.prompt import PromptConfig, PTuningConfig
from mmpeft.adapters.stack import AdapterConfig

__all__ = [
    "AdapterBank",
    "AdapterConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "DoraConfig",
    "FullConfig",
    "HybridConfig",
    "IA3Config",
    "ImagePromptConfig",
    "LoraConfig",
    "PTuningConfig",
    "PrefixConfig",
    "PromptConfig",
]
