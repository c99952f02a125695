"""Tiny random ViTs under names of timm's registry: one as SigLIP's, and some that differ from it in one thing."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import QuickGELU
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 3}
SIGLIP = {"class_token": False, "global_pool": "map"}
HALF = (0.5, 0.5, 0.5)
TRANSFORM = {
    "input_size": (3, 64, 64),
    "mean": HALF,
    "std": HALF,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "fixed_input_size": True,
}
BLOCKS: dict[str, Any] = {
    "tiny_siglip": {},
    "tiny_tanh": {"act_layer": "gelu_tanh"},
    "tiny_clip": {"class_token": True, "global_pool": "token", "pre_norm": True},
    "tiny_pre_norm": {"pre_norm": True},
    "tiny_scaled": {"init_values": 0.1},
    "tiny_registers": {"reg_tokens": 2},
    "tiny_quick": {"act_layer": QuickGELU},
    "tiny_rms": {"norm_layer": "rmsnorm"},
    "tiny_placeless": {"pos_embed": "none"},
    "tiny_oblong": {"patch_size": (16, 8)},
}
TRANSFORMS: dict[str, Any] = {
    "tiny_bilinear": {"interpolation": "bilinear"},
    "tiny_cut": {"crop_pct": 0.9},
}


def _register(name: str, transform: dict[str, Any], **changes: Any) -> None:
    def entry(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **own):
        model = VisionTransformer(**SIZES | SIGLIP | changes | own)
        model.pretrained_cfg = TRANSFORM | transform
        return model

    entry.__name__ = name
    register_model(entry)


for each, given in BLOCKS.items():
    _register(each, {}, **given)
for each, given in TRANSFORMS.items():
    _register(each, given)


@torch.no_grad()
def save_weights(model: nn.Module, path: Path) -> Path:
    """Random weights under which every layer shows: norms are not the identity, attention is not uniform."""
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for key, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("weight") and tensor.dim() > 1:
            tensor.copy_(2 * noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(0.3 * noise + float("norm" in key and key.endswith("weight")))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path
