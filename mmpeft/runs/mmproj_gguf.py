"""A frozen SigLIP and the linear projector behind it as llama.cpp's mmproj: one GGUF file, in float32.

llama.cpp has no projector of one linear layer with a bias. Its ``janus_pro`` has two with a GELU between them, and a
GELU and its mirror image are a straight line::

    GELU(z) - GELU(-z) = z      z = s (W x + b)
    mm.0 = s [W; -W]            mm.1 = [1, -1] / s

llama.cpp reads that GELU, on CPUs, from a table of 16-bit floats between -10 and 10, and has it exact beyond: with
``s`` = 1024 what the table rounds is below 1e-5.

Source: llama.cpp, ``tools/mtmd``: ``models/siglip.cpp``, ``load_hparams`` of ``clip.cpp``, ``mtmd-image.cpp``.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import RefusedError
from mmpeft.models.vision import VisionEncoder
from mmpeft.runs.gguf_file import finish_gguf
from mmpeft.runs.siglip_graph import SiglipGraph, difference, misfit, read_graph

PROJECTOR_TYPE = "janus_pro"
SCALE = 1024.0
MOST_DIFFERENT = 0.01
"""Share of the features' size. GELU's two forms differ by less, another layer by far more."""


def require_mmproj(encoder: VisionEncoder, name: str, square_images: bool) -> None:
    """Whether llama.cpp does with an image what a finetune's encoder and its transform do.

    Args:
        encoder: the finetune's; its weights are not looked at.
        name: the finetune's.
        square_images: whether it is going to be given squares alone.

    Raises:
        RefusedError: llama.cpp computes something else, or treats images otherwise; the first such thing is named.
    """
    reason = misfit(encoder) or _other_pixels(encoder, square_images)
    if reason:
        raise RefusedError(
            f"{name!r} reads images through a projector behind timm's {encoder.config.name}, and no mmproj of that is "
            "written here; --text_only writes the language model's part, for questions without an image. The reason: "
            + reason
        )


def write_mmproj(path: Path, name: str, encoder: VisionEncoder, projector: dict[str, Tensor]) -> float:
    """Writes the file.

    Args:
        path: to write to.
        name: of the finetune.
        encoder: one that `require_mmproj` lets pass, with its weights.
        projector: ``weight`` (out, in) and ``bias`` (out,).

    Returns:
        How far llama.cpp's features are from the encoder's, as a share of their size.

    Raises:
        RefusedError: the encoder does not compute what its layers say.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

    graph = read_graph(encoder)
    if (found := difference(encoder, graph)) > MOST_DIFFERENT:
        raise RefusedError(
            f"timm's {encoder.config.name} has the layers of llama.cpp's SigLIP and computes something else: features "
            f"of a noise image differ by {found:.2g} of their size; --text_only writes the language model's part"
        )
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ])
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTOR_TYPE)
    _add_sizes(writer, encoder, graph, len(projector["bias"]))
    finish_gguf(writer, graph.tensors | _as_mlp(projector))
    return found


def image_remark(found: float) -> str:
    """What is not the same in llama.cpp, ``found`` being what `write_mmproj` found."""
    return (
        "images in llama.cpp: give it squares alone, it pads others in its own way, whatever vision.fit is; its tanh "
        f"for GELU changes features by {found:.1g} of their size. It ignores transparency and the EXIF turn of a "
        "photograph"
    )


def _other_pixels(encoder: VisionEncoder, square_images: bool) -> str | None:
    """What llama.cpp does otherwise between the image and the encoder: it resizes to one square, bicubic as Pillow."""
    config, data = encoder.config, encoder.data_config
    _, height, width = data["input_size"]
    resized = math.floor(height / data["crop_pct"])
    if config.pooling != "none":
        return (
            f"vision.pooling is {config.pooling}, and llama.cpp pools no patches before a linear projection"
        )
    if config.fit == "tile":
        return "vision.fit is tile, and llama.cpp makes one square of an image there"
    if config.image.identity:
        setting = next(iter(config.image.identity))
        return f"image.{setting} is {getattr(config.image, setting)}, and llama.cpp reads pixels of 8 bits as they are"
    if height != width:
        return f"it takes images of {width}x{height}, and llama.cpp makes squares"
    if data["interpolation"] != "bicubic":
        return f"its transform resizes by {data['interpolation']}, and llama.cpp is bicubic there"
    if resized != height:
        return (
            f"its transform resizes to {resized} pixels and cuts out {height}, and llama.cpp cuts nothing; train with "
            "vision.fit pad or squash"
        )
    if not square_images:
        return (
            "llama.cpp resizes squares as here and pads all else to one in its own way, and vision.fit is "
            f"{config.fit}; --square_images writes it for images that are squares"
        )
    return None


def _add_sizes(writer: Any, encoder: VisionEncoder, graph: SiglipGraph, dim: int) -> None:
    data = encoder.data_config
    writer.add_vision_image_size(data["input_size"][-1])
    writer.add_vision_patch_size(graph.tensors["v.patch_embd.weight"].shape[-1])
    writer.add_vision_embedding_length(encoder.dim)
    writer.add_vision_feed_forward_length(len(graph.tensors["v.blk.0.ffn_up.weight"]))
    writer.add_vision_block_count(graph.num_blocks)
    writer.add_vision_head_count(graph.num_heads)
    writer.add_vision_attention_layernorm_eps(graph.eps)
    writer.add_vision_projection_dim(dim)
    writer.add_vision_image_mean([float(each) for each in data["mean"]])
    writer.add_vision_image_std([float(each) for each in data["std"]])
    writer.add_vision_use_gelu(True)


def _as_mlp(projector: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two linears that are the projection, as the head of this file says."""
    weight, bias = projector["weight"].float(), projector["bias"].float()
    both = torch.eye(len(bias)) / SCALE
    return {
        "mm.0.weight": torch.cat([weight, -weight]) * SCALE,
        "mm.0.bias": torch.cat([bias, -bias]) * SCALE,
        "mm.1.weight": torch.cat([both, -both], dim=1),
        "mm.1.bias": torch.zeros_like(bias),
    }
