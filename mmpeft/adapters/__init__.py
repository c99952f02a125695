"""Parameter-efficient finetuning on stacked tensors: many finetunes on one frozen model, routed per row."""

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.methods.alora import ALoraConfig
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.bitfit import BitFitConfig
from mmpeft.adapters.methods.bottleneck import BottleneckConfig
from mmpeft.adapters.methods.dora import DoraConfig
from mmpeft.adapters.methods.full import FullConfig
from mmpeft.adapters.methods.hybrid import HybridConfig
from mmpeft.adapters.methods.ia3 import IA3Config
from mmpeft.adapters.methods.image_prompt import ImagePromptConfig
from mmpeft.adapters.methods.lora import LoraConfig
from mmpeft.adapters.methods.prefix import PrefixConfig
from mmpeft.adapters.methods.prompt import PromptConfig, PTuningConfig
from mmpeft.adapters.methods.token_rows import TokenRowsConfig

__all__ = [
    "ALoraConfig",
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
    "TokenRowsConfig",
]
