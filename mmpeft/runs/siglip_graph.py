"""A ViT as llama.cpp's SigLIP graph: timm's tensors under llama.cpp's names, and what it makes of them, in torch.

Source: llama.cpp, ``tools/mtmd/models/siglip.cpp`` and ``build_vit`` of ``tools/mtmd/clip.cpp``.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpeft.models.vision import VisionEncoder

AROUND = {"patch_embed.proj": "v.patch_embd", "norm_pre": "v.pre_ln", "norm": "v.post_ln"}
"""Layers around the blocks, by timm's names."""
IN_A_BLOCK = {
    "norm1": "ln1",
    "attn.proj": "attn_out",
    "norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
BEHIND = ("attn_pool", "fc_norm", "head")
"""What makes one vector of the features: not part of them."""
GELUS = ("GELU", "GELUTanh")
CLASS_TOKEN = (
    "it has a class token, which llama.cpp puts behind the patches and drops as if it stood before them: the first "
    "patch is lost and every position is another's (ggml-org/llama.cpp#25814). SigLIP's encoders have none"
)


@dataclass
class SiglipGraph:
    """The graph of one encoder."""

    tensors: dict[str, Tensor]
    """llama.cpp's name -> tensor."""
    num_blocks: int
    num_heads: int
    eps: float

    def __call__(self, pixels: Tensor) -> Tensor:
        """(images, 3, height, width) -> (images, tokens, dim)."""
        patches = self.tensors["v.patch_embd.weight"]
        hidden = F.conv2d(pixels, patches, self.tensors.get("v.patch_embd.bias"), stride=patches.shape[-1])
        hidden = hidden.flatten(2).transpose(1, 2) + self.tensors["v.position_embd.weight"]
        hidden = self._norm("v.pre_ln", hidden)
        for block in (f"v.blk.{number}" for number in range(self.num_blocks)):
            hidden = hidden + self._attention(block, self._norm(f"{block}.ln1", hidden))
            up = self._linear(f"{block}.ffn_up", self._norm(f"{block}.ln2", hidden))
            hidden = hidden + self._linear(f"{block}.ffn_down", F.gelu(up, approximate="tanh"))
        return self._norm("v.post_ln", hidden)

    def _attention(self, block: str, hidden: Tensor) -> Tensor:
        heads = (self._linear(f"{block}.attn_{each}", hidden) for each in "qkv")
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self._linear(f"{block}.attn_out", mixed)

    def _linear(self, name: str, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        """Layer normalisation, where the encoder has one there."""
        if (weight := self.tensors.get(f"{name}.weight")) is None:
            return hidden
        return F.layer_norm(hidden, weight.shape, weight, self.tensors.get(f"{name}.bias"), self.eps)


def read_graph(encoder: VisionEncoder) -> SiglipGraph:
    """The graph of an encoder, up to its feature layer, of which `misfit` finds nothing."""
    tensors, _ = _named(encoder)
    first = encoder.model.blocks[0]
    return SiglipGraph(tensors, encoder.layer + 1, first.attn.num_heads, first.norm1.eps)


@torch.no_grad()
def difference(encoder: VisionEncoder, graph: SiglipGraph) -> float:
    """Between an encoder's features of a noise image and the graph's, as a share of their size."""
    noise = torch.randn(1, *encoder.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    features = encoder(noise)
    return float((graph(noise) - features).norm() / features.norm())


def misfit(encoder: VisionEncoder) -> str | None:
    """What the graph has no place for, in words; None where every layer has one."""
    model = encoder.model
    if (kind := type(model).__name__) != "VisionTransformer":
        return (
            f"it is a {kind}, and of encoders behind one linear projection llama.cpp has the plain ViT alone"
        )
    if model.cls_token is not None:
        return CLASS_TOKEN
    _, unknown = _named(encoder)
    if unknown:
        return f"llama.cpp's SigLIP has no place for its {unknown[0]}"
    patches = model.patch_embed.proj
    if len({*patches.kernel_size, *patches.stride}) > 1:
        return (
            f"its patches of {patches.kernel_size} in steps of {patches.stride} are no squares side by side"
        )
    if model.pos_embed is None:
        return "it has no learned position embedding"
    first = model.blocks[0]
    if not isinstance(first.norm1, nn.LayerNorm):
        return f"its norms are {type(first.norm1).__name__}, and llama.cpp's are LayerNorm"
    if (activation := type(first.mlp.act).__name__) not in GELUS:
        return f"its activation is {activation}, and llama.cpp's SigLIP has GELU"
    eps = {
        norm.eps
        for path, norm in model.named_modules()
        if isinstance(norm, nn.LayerNorm) and path.split(".")[0] not in BEHIND
    }
    if len(eps) > 1:
        return (
            f"its norms have several epsilons ({', '.join(map(str, sorted(eps)))}), and llama.cpp takes one"
        )
    return None


def _named(encoder: VisionEncoder) -> tuple[dict[str, Tensor], list[str]]:
    """llama.cpp's name -> tensor of what makes the features, and timm's names of what has none there."""
    tensors: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in encoder.model.state_dict().items():
        path, _, part = key.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", path)
        if key.split(".")[0] in BEHIND or (path == "norm" and not encoder.norm):
            continue
        if block and int(block[1]) > encoder.layer:
            continue
        if key == "pos_embed":
            tensors["v.position_embd.weight"] = tensor[0]
        elif path in AROUND:
            tensors[f"{AROUND[path]}.{part}"] = tensor
        elif block and block[2] == "attn.qkv":
            names = [f"v.blk.{block[1]}.attn_{each}.{part}" for each in "qkv"]
            tensors |= zip(names, tensor.chunk(3), strict=True)
        elif block and block[2] in IN_A_BLOCK:
            tensors[f"v.blk.{block[1]}.{IN_A_BLOCK[block[2]]}.{part}"] = tensor
        else:
            unknown.append(key)
    return tensors, unknown
