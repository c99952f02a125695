"""Where tokens lie in a picture: what is painted into a token's boxes is what the token sees."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mmpeft.models.patch_places import patch_places
from mmpeft.models.pooling import cells_of_tokens, pool_tokens
from mmpeft.models.vision import VisionConfig, VisionEncoder

SIDE, PATCH = 64, 16
WIDE, TALL, SQUARE, SMALL = (300, 150), (90, 240), (128, 128), (40, 30)


@pytest.fixture(scope="module")
def make_encoder(tiny_base):
    weights = str(tiny_base / "vision.safetensors")

    def make(**how):
        return VisionEncoder(VisionConfig("test_vit", weights, **{"image_size": SIDE} | how))

    return make


def brightness(encoder, picture):
    """(tokens,) how bright what each token is made of is, through the encoder's own transform and order of tokens."""
    pooling = encoder.config.pooling

    def of_squares(pixels):
        cells = F.avg_pool2d(pixels.double().mean(1, keepdim=True), PATCH)
        return pool_tokens(cells, pooling, encoder.config.pool).mean(-1, keepdim=True)

    seen = encoder.transform(picture)
    if encoder.tiling:
        return encoder.tiling.encode(of_squares, [seen])[0][:, 0].numpy()
    return of_squares(seen[None])[0, :, 0].numpy()


def painted(size, boxes):
    values = np.zeros((size[1], size[0], 3), np.uint8)
    for left, top, right, bottom in np.rint(boxes).astype(int).clip(0):
        values[top:bottom, left:right] = 255
    return Image.fromarray(values)


HOWS = {
    "crop": {"fit": "crop"},
    "pad": {"fit": "pad"},
    "squash": {"fit": "squash"},
    "tile": {"fit": "tile"},
    "average": {"fit": "crop", "pooling": "average"},
    "shuffled pad": {"fit": "pad", "pooling": "pixel_shuffle"},
    "consecutive": {"fit": "squash", "pooling": "consecutive"},
    "pooled tiles": {"fit": "tile", "pooling": "average"},
}


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, SMALL])
@pytest.mark.parametrize("how", HOWS)
def test_what_is_painted_into_a_token_is_what_it_sees(make_encoder, how, size):
    encoder = make_encoder(**HOWS[how])
    places = patch_places(encoder, size)
    inside = places.inside()
    black = brightness(encoder, painted(size, []))
    assert len(inside) == len(black), "as many tokens as the encoder gives"
    for token in np.flatnonzero(inside > 0.2):
        own = places.boxes[places.tokens == token]
        gains = brightness(encoder, painted(size, own)) - black
        white = brightness(encoder, painted(size, [[0, 0, *size]])) - black
        assert gains[token] > 0.85 * white[token], "all that it sees was painted"
        rest = painted(size, [[0, 0, *size]])
        rest.paste(0, mask=painted(size, own).convert("1"))
        assert (brightness(encoder, rest) - black)[token] < 0.15 * white[token], "and nothing else"
    assert (white[inside == 0] < 0.1 * white.max()).all(), "padding sees nothing of the picture"


def test_a_crop_is_seen_in_the_middle_alone(make_encoder):
    places = patch_places(make_encoder(fit="crop"), WIDE)
    assert places.boxes[:, 0].min() > 70
    assert places.boxes[:, 2].max() < 230
    assert (places.inside() == 1).all()


def test_a_padded_picture_has_tokens_of_padding(make_encoder):
    inside = patch_places(make_encoder(fit="pad"), WIDE).inside()
    assert inside.reshape(4, 4)[:, 0].tolist() == [0, 1, 1, 0]


def test_a_heat_map_keeps_what_it_spreads(make_encoder):
    for how in HOWS.values():
        places = patch_places(make_encoder(**how), SQUARE)
        values = np.random.default_rng(0).normal(size=len(places.inside()))
        heat = places.heat(values, SQUARE)
        assert np.nansum(heat) == pytest.approx((values * places.inside()).sum(), rel=0.05, abs=0.05)
        large = places.heat(values, (512, 512))
        assert np.nanmax(large) == pytest.approx(np.nanmax(heat))


def test_patches_that_leave_a_border_are_as_large_as_they_are(make_encoder):
    """A patch embedding of 14 pixels sees 56 of 64; the last 8 lie in no box."""
    encoder = make_encoder(fit="squash")
    encoder.grid, encoder.model.feature_info = (4, 4), [{"reduction": 14}] * encoder.num_layers
    assert patch_places(encoder, (64, 64)).boxes.max() == 56


def test_cells_of_tokens_are_those_that_are_pooled():
    grid = torch.randn(1, 3, 4, 6)
    flat = grid.flatten(2)[0]
    for pooling, pool in (("none", 2), ("average", 2), ("consecutive", 4)):
        cells = cells_of_tokens((4, 6), pooling, pool)
        pooled = pool_tokens(grid, pooling, pool)[0]
        for token, own in zip(pooled, cells, strict=True):
            of_cells = flat[:, own]
            expected = of_cells.mean(1) if pooling == "average" else of_cells.T.flatten()
            torch.testing.assert_close(token, expected)
