"""What an encoder gives: how many tokens, in which order, and whether its last level is all before the head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.models.vision import VisionEncoder

BRIGHT = 4.0
"""Of a patch, in standard deviations of the noise around it."""


@dataclass
class EncoderFacts:
    """Of one encoder at one size; weights do not matter and are random."""

    size: tuple[int, int]
    """Height and width of the images in pixels."""
    tokens: int
    dim: int
    layer: int
    num_layers: int
    is_final: bool
    """The tokens are those of timm's ``forward_features``; otherwise more follows before the head."""

    def __str__(self) -> str:
        height, width = self.size
        where = f"layer {self.layer} of 0 to {self.num_layers - 1}"
        if self.is_final:
            where += ", the output of timm's forward_features"
        elif self.layer == self.num_layers - 1:
            where += (
                "; not the output of timm's forward_features: more follows before the head, or it has no grid"
            )
        return f"{self.tokens} tokens of {self.dim} from images of {height}x{width} px: {where}"


@torch.no_grad()
def encoder_facts(encoder: VisionEncoder) -> EncoderFacts:
    """Runs the encoder on noise, and timm's ``forward_features`` beside it."""
    _, height, width = encoder.data_config["input_size"]
    pixels = _noise(height, width)
    tokens = encoder(pixels)
    is_final = encoder.config.pooling == "none" and _is_final(encoder, pixels, tokens)
    return EncoderFacts(
        (height, width), tokens.shape[1], encoder.dim, encoder.layer, encoder.num_layers, is_final
    )


def print_facts(encoders: Sequence[VisionEncoder], images_are_decoded: bool) -> None:
    """Prints what is to know of each before data is looked at."""
    for each in encoders:
        of_tiles = f"; of each tile: {each.tiling.told}" if each.tiling else ""
        print(f"{each.config.name}: {encoder_facts(each)}{of_tiles}")
    if encoders and not images_are_decoded:
        print("--decode false: how large images are, and what an encoder cuts off, is not looked at")


@torch.no_grad()
def order_is_row_major(encoder: VisionEncoder) -> bool:
    """Whether a bright patch changes most the token of its place, counted row by row.

    Random weights make some tokens answer strongly to any patch, so each change is weighed by its share of the token's
    changes for four places. A neighbour may win, as windows overlap. Of square images and unpooled tokens.
    """
    _, height, width = encoder.data_config["input_size"]
    noise = _noise(height, width)
    before = encoder(noise)
    side = int(before.shape[1] ** 0.5)
    near, far = side // 4, side - 1 - side // 4
    places = [(near, near), (near, far), (far, near), (far, far)]
    images = noise.repeat(len(places), 1, 1, 1)
    for image, (row, column) in zip(images, places, strict=True):
        top, left = row * height // side, column * width // side
        image[:, top : top + height // side, left : left + width // side] += BRIGHT
    changes = (encoder(images) - before).norm(dim=-1)
    answers = changes * (changes / changes.sum(0).clamp_min(1e-30))
    reach = max(1, side // 6)
    for answer, (row, column) in zip(answers, places, strict=True):
        found_row, found_column = divmod(int(answer.argmax()), side)
        if abs(found_row - row) > reach or abs(found_column - column) > reach:
            return False
    return True


@torch.no_grad()
def sees_borders(encoder: VisionEncoder) -> bool:
    """Whether the last row and the last column of pixels change the features."""
    _, height, width = encoder.data_config["input_size"]
    noise = _noise(height, width)
    images = noise.repeat(2, 1, 1, 1)
    images[0, :, -1, :] += 100 * BRIGHT  # one line of many, and random weights pass little on
    images[1, :, :, -1] += 100 * BRIGHT
    return bool((encoder(images) - encoder(noise)).abs().amax((1, 2)).gt(0).all())


def _noise(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def _is_final(encoder: VisionEncoder, pixels: Tensor, tokens: Tensor) -> bool:
    final = encoder.model.forward_features(
        pixels.expand(2, -1, -1, -1)
    )  # as `VisionEncoder` does a single one
    if not isinstance(final, Tensor):
        return False  # a feature of each scale or a dictionary, and no grid
    if final.dim() == 4:
        channels_last = final.shape[-1] == tokens.shape[-1] and final.shape[1] != tokens.shape[-1]
        final = final.flatten(1, 2) if channels_last else final.flatten(2).transpose(1, 2)
    elif final.dim() == 3:
        final = final[:, getattr(encoder.model, "num_prefix_tokens", 0) :]
    final = final[:1]
    return final.shape == tokens.shape and torch.allclose(final, tokens, atol=1e-4, rtol=1e-4)
