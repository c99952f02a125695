"""What `mmpeft compare-methods` compares: eight methods, and presets; what of the config is each one's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmpeft.config_files import comment_of, presets
from mmpeft.errors import RefusedError
from mmpeft.experiments.steps import read_settings
from mmpeft.experiments.sweep_plan import ADAPTER, OWN

RATE = "model.learning_rate"
OF_A_PRESET = (ADAPTER, *(key for key in OWN if key.startswith("model.")))
"""Settings in which a preset may differ from the other rows of a table."""


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


@dataclass(frozen=True)
class Preset:
    """What a preset's file says."""

    title: str
    """Of its comment what stands before the first colon."""
    learning_rate: float
    source: str
    """The rest of its comment."""
    settings: Mapping[str, Any]
    """What `mmpeft fit --preset` puts over the config."""


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


def find_method(name: str) -> Method | Preset:
    """A method, or a preset by its name.

    Raises:
        RefusedError: there is neither, or the preset is none that can be compared.
    """
    if name in METHODS:
        return METHODS[name]
    files = presets()
    if name not in files:
        raise RefusedError(
            f"--methods has {name!r}, which is none of {', '.join(METHODS)}, nor of the presets {', '.join(files)}"
        )
    return _read_preset(files[name])


def _read_preset(path: Path) -> Preset:
    """A preset as a row of a table, in which nothing but the method and its settings may differ.

    Raises:
        RefusedError: it sets something else, or has no adapter or rate.
    """
    settings = yaml.safe_load(path.read_text())
    given = [
        key
        for section, own in settings.items()
        for key in ([f"{section}.{name}" for name in own] if isinstance(own, dict) else [section])
    ]
    others = [key for key in given if key not in OF_A_PRESET]
    missing = [key for key in (ADAPTER, RATE) if key not in given]
    if others or missing:
        found = f"sets {', '.join(others)}" if others else f"has no {missing[0]}"
        raise RefusedError(
            f"{path} {found}; presets that are compared under one budget set {ADAPTER} and {RATE}, and beside them at "
            f"most {', '.join(key for key in OF_A_PRESET if key not in (ADAPTER, RATE))}: leave {path.stem} out of "
            f"--methods, and train it by itself with `mmpeft fit --preset {path.stem}`"
        )
    title, _, source = comment_of(path).partition(": ")
    return Preset(title, float(settings["model"]["learning_rate"]), source, settings)


def common_settings(config: str, steps: int, start_from: str | None) -> dict[str, Any]:
    """The config of all methods.

    Raises:
        RefusedError: it is no config of a fit, has no data.test, or the run to start from is not there.
    """
    settings = read_settings(config)
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
    """All that decides about a method's result: "config", "limit_test", how many questions are answered, and of a
    preset "preset", which is put over the config where that is read.
    """
    method = find_method(name)
    own = _model_section(method, common["model"]) if isinstance(method, Method) else {}
    config = {
        **common,
        "model": common["model"] | {"adapter_name": name} | own,
        "trainer": common["trainer"] | {"default_root_dir": str(folder)},
    }
    over = {"preset": method.settings} if isinstance(method, Preset) else {}
    return {"config": config, "limit_test": limit_test, **over}


def _model_section(method: Method, common: Mapping[str, Any]) -> dict[str, Any]:
    """What is the method's own of the section."""
    adapter = {"class_path": f"mmpeft.adapters.{method.adapter}", "init_args": dict(method.settings)}
    own: dict[str, Any] = {"adapter": adapter, "learning_rate": method.learning_rate}
    if method.warmup is not None:
        own["warmup"] = method.warmup
    if method.quantization is not None:
        own["language"] = common.get("language", {}) | {"quantization": method.quantization}
    return own
