"""The frozen vision encoder: any timm model, with its own transform. Pixels -> patch features."""

import difflib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL.Image import Image
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mmpeft.data.images import ImageConfig
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_tensors
from mmpeft.models.cut_borders import Cut, CutBorders
from mmpeft.models.image_transform import FITS, make_transform, transform_image
from mmpeft.models.pooling import pool_tokens
from mmpeft.models.tiling import TiledImage, Tiling
from mmpeft.models.vision_config import VisionConfig as VisionConfig
from mmpeft.paths import resolve

FAILURES = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises of an image size that it cannot take; there is no one error for it in timm."""


class VisionEncoder(nn.Module):
    """A timm model without its head, frozen and always in eval mode. Class and register tokens are dropped.

    Raises:
        RefusedError: an unknown model name, a layer that it does not have, an image size that it cannot take or would
            cut, or weights that do not fit.
    """

    def __init__(self, config: VisionConfig, load_weights: bool = True, check: bool = True):
        super().__init__()
        if check:
            check_size(config)  # before any weights are fetched
        self.config = config
        self.model: Any = _create(config, load_weights).requires_grad_(False)
        self.num_layers = len(self.model.feature_info)
        self.layer = self._resolve_layer(config.layer)
        self.model.to(memory_format=torch.channels_last)  # convolutions run 2x faster
        self.data_config = _data_config(self.model, config)
        self.transform_image = make_transform(self.data_config)
        self.image_config = config.image
        super().train(False)
        self.norm = self.layer == self.num_layers - 1  # the final norm belongs to the last layer only
        first = self._first_features()
        self.grid: tuple[int, int] = (first.shape[2], first.shape[3])
        """Rows and columns of an image's features, before pooling."""
        num_tokens, self.dim = pool_tokens(first, config.pooling, config.pool).shape[1:]
        self.tiling: Tiling | None = None
        """How images are cut into tiles, if they are."""
        if config.max_tiles is not None:
            self.tiling = Tiling(self.data_config, self.transform_image, num_tokens, config.max_tiles)
        self.num_tokens: int | None = None if self.tiling else num_tokens
        """Of every image; None where it depends on an image's shape."""
        self.fingerprint: dict[str, Any] = {
            "name": config.name,
            "weights": hash_tensors(self.model.state_dict()) if load_weights else None,
            "layer": self.layer,
            "pooling": [config.pooling, config.pool if config.pooling != "none" else 1],
            "transform": " ".join(str(self.transform_image).split()),
            **({} if config.feature_dtype == "float16" else {"feature_dtype": config.feature_dtype}),
        }
        if config.image.identity:
            self.fingerprint["image"] = config.image.identity
        if self.tiling:
            self.fingerprint["tiles"] = self.tiling.told

    @property
    def feature_dtype(self) -> torch.dtype:
        return getattr(torch, self.config.feature_dtype)

    def train(self, mode: bool = True) -> "VisionEncoder":
        return super().train(False)  # frozen: its norms and dropout never see training mode

    def transform(self, image: Image) -> Tensor | TiledImage:
        """RGB image -> (3, height, width), or its tiles.

        Raises:
            RefusedError: an image so long that resizing its shorter side would fill the memory.
        """
        if self.tiling:
            return self.tiling.cut(image)
        return transform_image(image, self.transform_image, self.data_config)

    def forward(self, pixels: Tensor) -> Tensor:
        """(images, 3, height, width) -> (images, tokens, dim)."""
        return pool_tokens(self._features(pixels), self.config.pooling, self.config.pool)

    def _features(self, pixels: Tensor) -> Tensor:
        """(images, 3, height, width) -> (images, dim, rows, columns)."""
        reference = next(self.model.parameters())
        num_images = len(pixels)
        if (
            num_images == 1 and self._convolves
        ):  # else torch takes another kernel for it, and 2e-5 become visible
            pixels = pixels.expand(2, -1, -1, -1)
        pixels = pixels.to(reference.device, reference.dtype, memory_format=torch.channels_last)
        (features,) = self.model.forward_intermediates(
            pixels,
            indices=[self.layer],
            norm=self.norm,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",
        )
        return features[:num_images]

    @property
    def _convolves(self) -> bool:
        """Beyond a patch embedding."""
        return sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 1

    @torch.no_grad()
    def _first_features(self) -> Tensor:
        pixels = torch.zeros(1, *self.data_config["input_size"])
        try:
            return self._features(pixels)
        except AssertionError:
            if not self.norm:
                raise
            self.norm = False  # Hiera and SAM 2 have none there, and assert that none is asked for
            return self._features(pixels)

    def _resolve_layer(self, layer: int) -> int:
        if not hasattr(self.model, "forward_intermediates"):
            raise RefusedError(
                f"timm's {self.config.name!r} has no intermediate features; choose another model"
            )
        if not -self.num_layers <= layer < self.num_layers:
            raise RefusedError(
                f"vision layer {layer}: {self.config.name} has layers 0 to {self.num_layers - 1}"
            )
        return layer % self.num_layers


class NoVision(nn.Module):
    """In place of an encoder in models of text alone: it refuses every image."""

    num_tokens: int | None = 1
    dim, feature_dtype, tiling = 1, torch.float16, None

    def __init__(self):
        super().__init__()
        self.fingerprint: dict[str, Any] = {"name": None}
        self.image_config = ImageConfig()

    def transform(self, image: Image) -> Tensor:
        raise RefusedError(
            "this model has no vision encoder (model.vision is null), but it was given an image; name an encoder in "
            "the config to train on images"
        )


def make_encoder(config: VisionConfig | None, load_weights: bool = True) -> VisionEncoder | NoVision:
    """The encoder of a config; None is text alone."""
    return NoVision() if config is None else VisionEncoder(config, load_weights)


def check_size(config: VisionConfig) -> VisionEncoder:
    """The encoder without weights or memory, which has run once: what fails or would cut a border is refused.

    Raises:
        RefusedError: says what is wrong and which sizes near it fit.
    """
    try:
        encoder, cuts = _dry_run(config)
        if not cuts:
            return encoder
        found = f"{cuts[0]}, and would not be seen"
    except RefusedError:
        raise
    except FAILURES as error:
        found = f"timm fails with {type(error).__name__}: {str(error) or 'no message'}"
    if config.image_size is None:
        raise RefusedError(
            f"{config.name} gives no features of layer {config.layer}: {found}; choose another"
        )
    fitting = ", ".join(map(str, _sizes_near(config))) or "none near it; choose another model"
    raise RefusedError(
        f"{config.name} cannot take images of {config.image_size} px (image_size): {found}. Sizes that fit: {fitting}"
    )


def _dry_run(config: VisionConfig) -> tuple[VisionEncoder, list[Cut]]:
    """Also what it would leave out of images of another size than its own; at its own that is its design."""
    encoder = _without_weights(config)
    if encoder.data_config["input_size"] == resolve_model_data_config(encoder.model)["input_size"]:
        return encoder, []
    with torch.no_grad(), CutBorders() as seen:
        encoder(torch.zeros(1, *encoder.data_config["input_size"]))
    return encoder, seen.cuts


def _without_weights(config: VisionConfig) -> VisionEncoder:
    """On torch's meta device, which computes shapes only; on the CPU where a model reads values (Gemma 4's grid)."""
    try:
        with torch.device("meta"):
            return VisionEncoder(config, load_weights=False, check=False)
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        return VisionEncoder(config, load_weights=False, check=False)


def _sizes_near(config: VisionConfig) -> list[int]:
    """Sizes that fit: the model's own, and its neighbours of the wanted one in whole tokens from there."""
    own = _without_weights(replace(config, image_size=None))
    side, step = own.data_config["input_size"][-1], own.model.feature_info[own.layer].get("reduction", 32)
    wanted = config.image_size or side
    below = side + (wanted - side) // step * step
    return sorted(size for size in {below, below + step, side} if size > 0 and _fits(config, size))


def _fits(config: VisionConfig, size: int) -> bool:
    try:
        return not _dry_run(replace(config, image_size=size))[1]
    except FAILURES:
        return False


def _create(config: VisionConfig, load_weights: bool) -> Any:
    if not timm.is_model(config.name.split(":")[-1].split("/")[-1].split(".")[0]) and ":" not in config.name:
        close = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        raise RefusedError(
            f"timm has no model {config.name!r}; similar: {', '.join(close) or 'see timm.list_models()'}"
        )
    pretrained = load_weights and config.weights is None
    size: dict[str, Any] = {"img_size": config.image_size} if config.image_size else {}
    try:
        model = timm.create_model(config.name, pretrained=pretrained, num_classes=0, **size)
    except TypeError as error:  # convolutional models take any size and no img_size
        if "img_size" not in str(error):
            raise
        model = timm.create_model(config.name, pretrained=pretrained, num_classes=0)
    if load_weights and config.weights is not None:
        _load(model, resolve(config.weights))
    return model


def _load(model: nn.Module, path: str) -> None:
    if not Path(path).is_file():
        raise RefusedError(f"vision weights {path}: no such file")
    state = load_file(path)
    wanted = model.state_dict()
    _fit_positions(model, state)
    missing = sorted(wanted.keys() - state.keys())
    wrong = sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape)
    if missing or wrong:
        raise RefusedError(
            f"vision weights {path} do not fit: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(wrong)} have another shape {wrong[:3]}"
        )
    model.load_state_dict({key: state[key] for key in wanted})


def _fit_positions(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Interpolates a ViT's position embeddings to the grid of another image size, as timm does for its own files."""
    own, given = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or given is None or given.shape == own.shape or given.shape[-1] != own.shape[-1]:
        return
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    if math.isqrt(given.shape[1] - prefix) ** 2 == given.shape[1] - prefix:  # only a square grid can be known
        grid = list(model.patch_embed.grid_size)  # pyright: ignore
        state["pos_embed"] = resample_abs_pos_embed(given, grid, num_prefix_tokens=prefix)


def _data_config(model: nn.Module, config: VisionConfig) -> dict[str, Any]:
    data = dict(resolve_model_data_config(model))
    channels = data["input_size"][0]
    if channels != 3:
        raise RefusedError(
            f"{config.name} takes images of {channels} channels, and gets RGB of 3; choose another model"
        )
    if config.image_size:
        data["input_size"] = (3, config.image_size, config.image_size)
    return data | FITS[config.fit]
