"""Tiles: the grid by transformers' rule, tokens in their places, and what a model reads of images of any shape."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from mmpeft.adapters import ImagePromptConfig, LoraConfig
from mmpeft.data.batch import collate, concatenate
from mmpeft.data.encoding import encode_images
from mmpeft.data.features import FeatureCache
from mmpeft.data.image_tokens import TokensByShape, image_tokens
from mmpeft.data.packing import pack
from mmpeft.data.template import IMAGE_TOKEN, Template
from mmpeft.errors import RefusedError
from mmpeft.inference.prefill import _select
from mmpeft.models.build import build_model
from mmpeft.models.image_transform import cut_share
from mmpeft.models.language import LanguageConfig
from mmpeft.models.tiling import Tiling
from mmpeft.models.vision import VisionConfig, VisionEncoder
from tests.tiny import make_record

SIDE, CELLS = 32, 2
"""Of `test_vit` at 32 px: patches of 16."""
WIDE, TALL, SMALL, SQUARE = (300, 40), (40, 300), (20, 12), (200, 190)
TOKENS = {
    WIDE: 4 + 8 * 2,  # 1x4 tiles; the 17 rows in their middle lie in both rows of tokens
    TALL: 4 + 2 * 8,
    SMALL: 4,  # it fits into one tile, which is the overview
    SQUARE: 4 + 4 * 4,
    (3000, 200): 4 + 8 * 2,
    (10_000, 1): 4,  # no pixel of it would be left in any grid: the smallest
    (640, 480): 4 + 4 * 4,
}


@pytest.fixture(scope="module")
def config(tiny_base):
    return VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=SIDE, fit="tile")


@pytest.fixture(scope="module")
def encoder(config):
    return VisionEncoder(config)


def picture(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def files(tmp_path):
    """A PNG of every shape."""
    made = {}
    for size in TOKENS:
        made[size] = str(tmp_path / f"{size[0]}x{size[1]}.png")
        picture(size).save(made[size])
    return made


def tiling(side=336, cells=24, most=4):
    data_config = {"input_size": (3, side, side), "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5)}
    return Tiling(data_config, lambda image: torch.zeros(3, side, side), cells**2, most)


@pytest.mark.parametrize("most", [1, 2, 4, 9])
def test_the_grid_is_the_one_of_transformers_rule(most):
    every = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]
    rng = np.random.default_rng(0)
    for width, height in np.exp(rng.uniform(0, math.log(6000), (400, 2))).astype(int).tolist():
        best = select_best_resolution((height, width), [(336 * r, 336 * c) for r, c in every])
        assert tiling(most=most).grid((width, height)) == (best[0] // 336, best[1] // 336), (width, height)


def test_four_tiles_are_llava_nexts_grids():
    found = {tiling().grid((w, h)) for w in range(50, 4000, 97) for h in range(50, 4000, 97)}
    assert found == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)}


@pytest.mark.parametrize("size", TOKENS)
def test_an_image_has_the_tokens_of_its_shape(encoder, files, size):
    assert encoder.num_tokens is None
    assert encoder.tiling.num_tokens(size) == TOKENS[size]
    assert image_tokens(encoder)(files[size]) == TOKENS[size]
    (features,) = encode_images(encoder, [files[size]])
    assert features.shape == (TOKENS[size], 64)


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, (640, 480), (333, 100), (97, 201)])
@pytest.mark.parametrize(("side", "cells"), [(SIDE, CELLS), (336, 24), (384, 27), (224, 7)])
def test_tokens_that_are_left_out_hold_padding_alone(size, side, cells):
    """An image of white; what its tokens do not cover must be the colour of the padding."""
    own = tiling(side, cells)
    own._transform = lambda image: torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1)
    size = (size[0] * side // 32, size[1] * side // 32)
    parts = own.cut(Image.new("RGB", size, "white")).parts
    rows, columns = own.grid(size)
    whole = (
        parts[1:]
        .view(rows, columns, 3, side, side)
        .permute(2, 0, 3, 1, 4)
        .reshape(3, rows * side, columns * side)
    )
    is_picture = (whole == 255).all(0)
    places = torch.arange(max(rows, columns) * side) * cells // side
    seen_rows = sorted(set(places[: rows * side][is_picture.any(1)].tolist()))
    seen_columns = sorted(set(places[: columns * side][is_picture.any(0)].tolist()))
    found = own._seen(size, (rows, columns))
    assert [*range(found[0].start, found[0].stop)] == seen_rows
    assert [*range(found[1].start, found[1].stop)] == seen_columns
    assert own.num_tokens(size) == cells**2 + len(seen_rows) * len(seen_columns)


@torch.no_grad()
def test_tokens_lie_as_in_one_picture_behind_the_overview(encoder):
    """A tile whose patch is bright changes the tokens of that place; the overview is what "squash" sees."""
    seen = encoder.tiling.cut(picture(SQUARE))
    assert seen.parts.shape == (5, 3, SIDE, SIDE)
    features = encoder(seen.parts)
    (found,) = encoder.tiling.encode(encoder, [seen])
    assert torch.equal(found[:4], features[0])
    grid = found[4:].view(4, 4, -1)
    for row in range(4):
        for column in range(4):
            tile, place = 2 * (row // 2) + column // 2, 2 * (row % 2) + column % 2
            torch.testing.assert_close(grid[row, column], features[1 + tile, place])
    squashed = VisionEncoder(
        VisionConfig("test_vit", encoder.config.weights, image_size=SIDE, fit="squash")
    ).transform(picture(SQUARE))
    assert torch.equal(seen.parts[0], squashed)


def test_nothing_is_cut_off(encoder):
    assert all(cut_share(size, encoder) == 0 for size in TOKENS)


def test_what_changes_features_is_in_the_fingerprint(config, encoder):
    more = VisionEncoder(VisionConfig("test_vit", config.weights, image_size=SIDE, fit="tile", max_tiles=6))
    squash = VisionEncoder(VisionConfig("test_vit", config.weights, image_size=SIDE, fit="squash"))
    told = [each.fingerprint.get("tiles") for each in (encoder, more, squash)]
    assert "2 to 4 tiles" in told[0]
    assert "2 to 6 tiles" in told[1]
    assert told[2] is None, "encoders of before are what they were"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "consecutive"}, "vision.pooling consecutive lie in no grid"),
        ({"max_tiles": 1}, "vision.max_tiles is 1, which cuts nothing"),
        ({"fit": "pad", "max_tiles": 4}, "vision.max_tiles is 4, but vision.fit is pad"),
        ({"fit": "stretch"}, "vision.fit is 'stretch'; wanted one of crop, pad, squash, tile"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(RefusedError, match=message):
        VisionConfig("test_vit", **{"fit": "tile"} | settings)


def test_an_encoder_of_images_that_are_not_square_is_refused():
    with (
        torch.device("meta"),
        pytest.raises(RefusedError, match="3072 tokens of 1024x768 pixels; wanted squares"),
    ):
        VisionEncoder(VisionConfig("vit_base_patch16_sapiens2", fit="tile"), load_weights=False)


def test_features_of_different_lengths_are_cached_as_they_are_encoded(
    encoder, files, tmp_path, monkeypatch, capsys
):
    images = list(files.values())
    fresh = encode_images(encoder, images)
    cache = FeatureCache(tmp_path / "cache", encoder)
    assert cache.build(images) == len(images)
    told = capsys.readouterr().err
    assert f"{len(images)} images of {sum(TOKENS.values())} tokens x 64 in float16" in told
    (shard,) = cache.directory.glob("*.safetensors")
    monkeypatch.setattr(VisionEncoder, "forward", lambda *_: pytest.fail("encoded again"))
    for again in (cache, FeatureCache(tmp_path / "cache", encoder)):
        for own, wanted in zip(again(images[::-1]), fresh[::-1], strict=True):
            assert torch.equal(own, wanted)
    assert shard.stat().st_size < sum(TOKENS.values()) * 64 * 2 + 300, "nothing is padded on disk"
    alike = [files[WIDE], files[3000, 200]]
    assert cache(alike).shape == (2, TOKENS[WIDE], 64), "together where all have as many"


def test_a_shard_of_images_that_are_alike_is_read_back(encoder, files, tmp_path):
    images = [files[WIDE], files[3000, 200]]
    FeatureCache(tmp_path, encoder).build(images)
    again = FeatureCache(tmp_path, encoder)
    assert again.build(images) == 0
    assert torch.equal(again(images), encode_images(encoder, images))


# -- what the model reads -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_base, config, make_bank, randomise):
    torch.manual_seed(0)
    model = build_model(
        LanguageConfig(str(tiny_base / "language"), dtype="float32"), config, projector_slots={"own": 1}
    )
    with torch.no_grad():
        model.projector.weight[1].normal_(std=0.1)
    model.bank.add("own", LoraConfig(rank=2))
    randomise(model.bank, "own")
    return model.eval()


@pytest.fixture(scope="module")
def template(tiny_tokenizer, encoder):
    return Template(tiny_tokenizer, image_tokens(encoder), max_length=400)


def rows_about(files, template):
    asked = {
        "wide": [[files[WIDE]], ["what?", "is it red?"]],
        "small": [[files[SMALL]], ["what color?"]],
        "both": [[files[TALL], files[SMALL]], ["<image> like <image>?", "<image>or<image>?"]],
    }
    return [
        [template.encode(make_record(question, images=images)) for question in questions]
        for images, questions in asked.values()
    ]


def batch_of(rows, encoder, adapters):
    packed = [pack(row) for row in rows]
    return collate(packed, encode_images(encoder, [i for row in packed for i in row.images]), adapters)


@torch.no_grad()
def test_packed_rows_of_images_of_any_shape_have_the_losses_of_rows_of_their_own(
    model, encoder, files, template
):
    rows, names = rows_about(files, template), [None, "own", "own"]
    packed = batch_of(rows, encoder, names)
    assert packed.image_tokens.tolist() == [TOKENS[s] for s in (WIDE, SMALL, TALL, SMALL, SMALL)]
    alone = [
        model.token_losses(batch_of([[own]], encoder, [name])).nll
        for row, name in zip(rows, names, strict=True)
        for own in row
    ]
    together = model.token_losses(packed)
    order = (together.rows * 100 + together.segments).argsort(kind="stable")
    torch.testing.assert_close(together.nll[order], torch.cat(alone), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_features_stand_where_their_tokens_are(model, encoder, files, template):
    """Every row's image embeddings are its own images' projected features, in order."""
    rows, names = rows_about(files, template), [None, "own", "own"]
    batch = batch_of(rows, encoder, names)
    embeds = model.inputs(batch).embeds
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        found = embeds[number][batch.input_ids[number] == IMAGE_TOKEN]
        slot = torch.tensor([model.projector_slots.get(name or "", 0)])
        images = pack(row).images
        wanted = [model.projector(f[None], slot, torch.float32)[0] for f in encode_images(encoder, images)]
        torch.testing.assert_close(found, torch.cat(wanted))


@torch.no_grad()
def test_batches_are_joined_and_parted_with_the_tokens_of_each_image(model, encoder, files, template):
    rows, names = rows_about(files, template), [None, "own", "own"]
    whole = batch_of(rows, encoder, names)
    joined = concatenate([batch_of([row], encoder, [name]) for row, name in zip(rows, names, strict=True)])
    assert torch.equal(joined.features, whole.features)
    assert joined.image_tokens.tolist() == whole.image_tokens.tolist()
    alike = [batch_of([rows[1]], encoder, [None])] * 2
    assert concatenate(alike).image_tokens is None
    part = _select(whole, [0, 2], whole.input_ids.shape[1])
    assert part.image_tokens.tolist() == [TOKENS[s] for s in (WIDE, TALL, SMALL, SMALL)]


def test_an_image_that_changed_between_counting_and_encoding_is_refused(encoder, files, template):
    packed = pack([template.encode(make_record(images=[files[WIDE], files[SMALL]]))])
    swapped = encode_images(encoder, [files[SMALL], files[WIDE]])
    with pytest.raises(
        RefusedError, match=rf"{WIDE[0]}x{WIDE[1]}\.png' has 20 places in its row, but features of 4"
    ):
        collate([packed], swapped, [None])


def test_a_cut_conversation_keeps_the_images_that_lie_in_it(encoder, files, tiny_tokenizer):
    record = make_record(images=[files[WIDE]], answer="red")
    record["turns"] += [("<image>and this?", "blue " * 30)]
    record["images"] += [files[TALL]]
    short, long = (
        Template(tiny_tokenizer, image_tokens(encoder), max_length=n).encode(record) for n in (60, 90)
    )
    assert (short.images, short.image_tokens) == ([files[WIDE]], [20])
    assert (long.images, long.image_tokens) == (record["images"], [20, 20])
    assert long.truncated


def test_image_prompts_are_refused(model):
    with pytest.raises(RefusedError, match=r"set model\.vision\.fit to crop, pad or squash"):
        model.bank.add("patches", ImagePromptConfig())


def test_how_tokens_are_told_is_asked_once_a_file(encoder, files, monkeypatch):
    tokens = TokensByShape(encoder.tiling, encoder.image_config)
    tokens(files[WIDE])
    monkeypatch.setattr(tokens, "_count", lambda _: pytest.fail("looked at again"))
    assert tokens(files[WIDE]) == 20
