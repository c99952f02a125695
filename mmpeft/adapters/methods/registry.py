"""The registry of methods: a new one is its own file and one line here."""

from mmpeft.adapters.methods.alora import ALoraConfig
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.bitfit import BitFitConfig
from mmpeft.adapters.methods.bottleneck import BottleneckConfig
from mmpeft.adapters.methods.dora import DoraConfig
from mmpeft.adapters.methods.full import FullConfig
from mmpeft.adapters.methods.ia3 import IA3Config
from mmpeft.adapters.methods.image_prompt import ImagePromptConfig
from mmpeft.adapters.methods.lora import LoraConfig
from mmpeft.adapters.methods.norm_weights import NormWeightsConfig
from mmpeft.adapters.methods.prefix import PrefixConfig
from mmpeft.adapters.methods.prompt import PromptConfig, PTuningConfig
from mmpeft.adapters.methods.token_rows import TokenRowsConfig

METHODS: list[type[AdapterConfig]] = [
    LoraConfig,
    ALoraConfig,
    DoraConfig,
    IA3Config,
    BitFitConfig,
    BottleneckConfig,
    PromptConfig,
    PTuningConfig,
    PrefixConfig,
    FullConfig,
    NormWeightsConfig,
    ImagePromptConfig,
    TokenRowsConfig,
]
"""Every method, in the order of tables; the first that recognises a file reads it."""
