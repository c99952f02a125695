"""What vLLM 0.33 does with an adapter folder, read from its ``lora/peft_helper.py``, ``lora_model.py`` and
``utils.py``: which it refuses, which tensors it takes for which linear, and by what it scales them."""

import json
import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

OFF = {
    "use_dora": False,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_bdlora": None,
    "use_qalora": False,
    "modules_to_save": None,
}
"""Fields that must be absent or have a value that is as false as this."""
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")


def read_as_vllm(folder: Path, linears: set[str], max_lora_rank: int) -> dict[str, Tensor]:
    """Path of a linear -> the change of its weight, (out, in); AssertionError where vLLM would refuse.

    Args:
        folder: the adapter's.
        linears: last names of the base's linears, which vLLM expects updates of.
        max_lora_rank: of ``vllm serve``.
    """
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= fields.keys()
    assert not [name for name in OFF if fields.get(name)]
    assert fields.get("bias", "none") == "none"
    start = fields.get("init_lora_weights", True)
    assert not isinstance(start, str) or start.lower() in STARTS
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    assert 0 < max([fields["r"], *ranks.values()]) <= max_lora_rank
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = KEY.fullmatch(key)
        assert match, key
        assert match["path"].split(".")[-1] in linears
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    changes = {}
    for path, own in sides.items():
        rank, alpha = _of(ranks, path, fields["r"]), _of(alphas, path, fields["lora_alpha"])
        assert own["A"].shape[0] == own["B"].shape[1] == rank
        scaling = alpha / (rank**0.5 if fields.get("use_rslora") else rank)
        changes[path] = scaling * own["B"] @ own["A"]
    return changes


def _of(pattern: dict, path: str, otherwise: float) -> float:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)
