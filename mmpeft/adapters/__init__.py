"""Parameter-efficient finetuning on stacked tensors: many finetunes on one frozen model, routed per row."""

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.ia3 import IA3Config
from mmpeft.adapters.lora import LoraConfig
from mmpeft.adapters.stack import AdapterConfig

__all__ = ["AdapterBank", "AdapterConfig", "IA3Config", "LoraConfig"]
