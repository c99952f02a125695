"""The eight methods that `mmpeft compare-methods` compares: what of the config is each one's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmpeft.errors import RefusedError


@dataclass(frozen=True)
class Method:
    """What of the config is one method's own."""

    title: str
    adapter: str
    """Config class of mmpeft.adapters."""
    learning_rate: float
    """Of AdamW, the adapter's; the projector has the config's in every method."""
    source: str
    """Where the learning rate comes from, and what the settings are."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the config class."""
    warmup: float | None = None
    """In place of the config's."""
    quantization: str | None = None
    """Of the base, in place of the config's."""


# T-Few's paper trains all its baselines with Adafactor, whose steps are relative to the size of what they change, and
# AdamW's are absolute: its rates stand here for comparison.
METHODS = {
    "full": Method(
        "full fine-tuning",
        "FullConfig",
        5e-5,
        "a quarter of what Schulman et al. 2025 (LoRA Without Regret) advise, a tenth of LoRA's, with which the first "
        "step without warm-up took the loss from 2.1 to 4.8; all linears of the blocks",
    ),
    "lora": Method(
        "LoRA",
        "LoraConfig",
        2e-3,
        "as configs/easy_vqa/instruct_lora.yaml (T-Few's LoRA: 3e-3); rank 16 on q and v",
        {"rank": 16, "alpha": 32},
    ),
    "qlora": Method(
        "QLoRA",
        "LoraConfig",
        2e-3,
        "as configs/easy_vqa/instruct_qlora.yaml; rank 16 on all linears over a base in 4-bit NormalFloat",
        {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        quantization="nf4",
    ),
    "tfew": Method(
        "T-Few (IA3)",
        "IA3Config",
        1e-2,
        "as configs/easy_vqa/instruct_tfew.yaml (T-Few: 3e-3 for 1,000 steps); with the right answer's loss alone",
        warmup=0.25,
    ),
    "prompt": Method(
        "prompt tuning",
        "PromptConfig",
        4e-2,
        "T-Few's relative 0.3, times the 0.136 that the embeddings it begins with have as root mean square; 20 tokens",
        {"num_virtual_tokens": 20},
    ),
    "prefix": Method(
        "prefix tuning",
        "PrefixConfig",
        1e-2,
        "T-Few's number taken as absolute, since a fresh prefix is near zero; 20 tokens, without a network",
        {"num_virtual_tokens": 20},
    ),
    "bitfit": Method(
        "BitFit",
        "BitFitConfig",
        3e-3,
        "ten times T-Few's BitFit, 3e-4, for few steps from biases of zero; all linears of the blocks",
    ),
    "bottleneck": Method(
        "bottleneck adapters",
        "BottleneckConfig",
        1e-3,
        "half of LoRA's, which like it begins as the base (T-Few's adapters: 3e-3); width 64 after each feed-forward",
        {"width": 64},
    ),
}


def common_settings(config: str, steps: int, start_from: str | None) -> dict[str, Any]:
    """The config of all methods.

    Raises:
        RefusedError: it has no data.test, or the run to start from is not there.
    """
    settings = yaml.safe_load(Path(config).read_text())
    model, data, trainer = settings["model"], settings["data"], settings["trainer"]
    for section, key in ((model, "adapters"), (trainer, "val_check_interval"), (trainer, "logger")):
        section.pop(key, None)
    if not data.get("test"):
        raise RefusedError(
            f"{config} has no data.test; the methods are compared on held-out questions: add some"
        )
    if start_from:
        model["start_from"] = start_from
    if (start := model.get("start_from")) and not Path(start).is_dir():
        raise RefusedError(
            f"start_from is {start!r}, and there is no such run: make it with `mmpeft fit --config "
            "configs/easy_vqa/caption.yaml`, or name another with --start_from"
        )
    trainer |= {
        "max_steps": steps,
        "max_epochs": -1,
        "limit_val_batches": 0,  # between two steps there must be nothing else
        "log_every_n_steps": 1,
        "enable_checkpointing": False,  # nobody resumes these runs, and full fine-tuning's state is a gigabyte
    }
    return settings


def method_settings(name: str, common: Mapping[str, Any], folder: Path, limit_test: int) -> dict[str, Any]:
    """All that decides about a method's result: its config, and how many questions are answered."""
    method = METHODS[name]
    adapter = {"class_path": f"mmpeft.adapters.{method.adapter}", "init_args": dict(method.settings)}
    model = common["model"] | {
        "adapter": adapter,
        "adapter_name": name,
        "learning_rate": method.learning_rate,
    }
    if method.warmup is not None:
        model["warmup"] = method.warmup
    if method.quantization is not None:
        model["language"] = model.get("language", {}) | {"quantization": method.quantization}
    trainer = common["trainer"] | {"default_root_dir": str(folder)}
    return {"config": {**common, "model": model, "trainer": trainer}, "limit_test": limit_test}
