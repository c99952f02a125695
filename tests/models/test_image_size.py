"""Sizes of images: what an encoder cannot take or would cut is refused with sizes that fit; tokens go row by row."""

import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from mmpeft.errors import RefusedError
from mmpeft.models.cut_borders import CutBorders
from mmpeft.models.vision import VisionConfig, VisionEncoder
from mmpeft.tools.encoder_facts import encoder_facts, order_is_row_major, sees_borders


def encoder(name, **options):
    torch.manual_seed(0)
    return VisionEncoder(VisionConfig(name, **options), load_weights=False)


@pytest.mark.parametrize("name", ["hiera_tiny_224", "sam2_hiera_tiny"])
@torch.no_grad()
def test_models_without_a_final_norm_give_their_last_level(name):
    """`timm.models.hiera` and `hieradet_sam2` assert that no norm is asked for."""
    found = encoder(name, image_size=224)
    assert (found.num_tokens, found.dim, found.norm) == (49, 768, False)
    pixels = torch.randn(1, 3, 224, 224)
    (grid,) = found.model.forward_intermediates(pixels, indices=1, intermediates_only=True)
    assert torch.equal(found(pixels), grid.flatten(2).transpose(1, 2))
    assert order_is_row_major(found)


def left_out(size, **options):
    with CutBorders() as seen:
        nn.Conv2d(1, 1, **options)(torch.zeros(1, 1, size, size))
    return [cut.lost for cut in seen.cuts]


def brute_force(size, kernel_size, stride, padding=0):
    """Rows at the end that no window covers, by a convolution of ones and its gradient."""
    pixels = torch.zeros(1, 1, size, size, requires_grad=True)
    F.conv2d(pixels, torch.ones(1, 1, kernel_size, kernel_size), None, stride, padding).sum().backward()
    return int((pixels.grad[0, 0, :, 0] == 0).sum())


@pytest.mark.parametrize("size", range(20, 41))
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"), [(16, 16, 0), (4, 4, 0), (3, 2, 0), (7, 4, 3), (16, 8, 0)]
)
def test_what_a_convolution_leaves_out_is_what_has_no_gradient(size, kernel_size, stride, padding):
    lost = brute_force(size, kernel_size, stride, padding)
    found = left_out(size, kernel_size=kernel_size, stride=stride, padding=padding)
    assert found == ([lost, lost] if lost else [])


@pytest.mark.parametrize(
    ("operation", "lost"),
    [
        (nn.MaxPool2d(2), 1),
        (nn.AvgPool2d(2), 1),
        (nn.AvgPool2d(2, ceil_mode=True), 0),
        (nn.MaxPool2d(2, 2, ceil_mode=True), 0),
        (nn.MaxPool2d(3, 2, 1), 0),
        (nn.Unfold(2, stride=2), 1),
        (nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(2)), 0),
        (nn.Sequential(nn.ReflectionPad2d((0, 1, 0, 1)), nn.Conv2d(1, 1, 4, 4)), 0),
        (nn.Conv2d(1, 1, 1, 3), 0),  # gaps at every size
    ],
)
def test_every_windowed_operation_is_watched_and_padding_is_no_loss(operation, lost):
    with CutBorders() as seen:
        operation(torch.zeros(1, 1, 15, 15))
    assert [cut.lost for cut in seen.cuts] == [lost, lost][: 2 * bool(lost)]


@pytest.mark.parametrize(
    ("name", "size", "why", "fitting"),
    [
        (
            "test_vit_relpos",
            149,
            "last 5 of 149 rows or columns",
            "144, 160",
        ),  # a plain ViT cuts without a word
        ("test_vit", 149, "divisible by patch size", "144, 160"),  # one that asserts
        ("test_convnext", 149, "last 1 of 149", "128, 160"),
        ("test_convnext", 80, "last 1 of 5", "64, 96, 160"),  # a stage, not the patches
        ("test_coatnet", 149, "RuntimeError", "128, 160"),  # a raw error of torch
        ("tnt_s_legacy_patch16_224", 213, "last 1 of 53|last 2 of 54", "208, 224"),  # patches by unfolding
        ("crossvit_tiny_240", 160, "RuntimeError", "240"),
        ("efficientformer_l1", 160, "RuntimeError", "224"),
        ("halonet_h1", 192, "AssertionError: no message", "256"),  # an error without a word
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_some_that_do(name, size, why, fitting):
    with pytest.raises(
        RefusedError, match=rf"{name} cannot take images of {size} px.*({why}).*fit: {fitting}$"
    ):
        encoder(name, image_size=size)


def test_a_size_is_refused_before_weights_are_looked_for(tmp_path):
    with pytest.raises(RefusedError, match=r"cannot take images of 149 px"):
        VisionEncoder(VisionConfig("test_vit", str(tmp_path / "none.safetensors"), image_size=149))


def test_sizes_that_fit_leave_room_for_the_pooling():
    with pytest.raises(RefusedError, match=r"fit: 96, 160$"):
        encoder("test_vit", image_size=100, pooling="average", layer=0, pool=2)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("crossvit_tiny_240", 120, 49),
        ("crossvit_tiny_240", 480, 784),
        ("efficientformer_l1", None, 49),
        ("test_efficientnet", 149, 25),  # padded: every pixel counts
        ("test_vit", 96, 36),
        ("test_coatnet", 96, 9),
    ],
)
def test_other_sizes_work_where_the_model_can_take_them(name, size, tokens):
    found = encoder(name, image_size=size)
    assert found.num_tokens == tokens
    assert order_is_row_major(found)
    assert sees_borders(found)


def test_an_early_stage_of_efficientformer_takes_any_multiple():
    assert encoder("efficientformer_l1", image_size=160, layer=2).num_tokens == 100


def test_images_that_are_not_square_keep_their_rows_and_columns():
    with torch.device("meta"):
        found = VisionEncoder(VisionConfig("vit_base_patch16_sapiens2"), load_weights=False)
    assert found.data_config["input_size"] == (3, 1024, 768)
    assert found.num_tokens == 64 * 48


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("test_vit", 1),
        ("test_vit2", 1),
        ("test_vit3", 1),
        ("test_vit4", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_tiny_patch16_dinov3_qkvb", 5),
    ],
)
@torch.no_grad()
def test_the_tokens_dropped_are_the_prefix(name, prefix):
    found = encoder(name, image_size=64)
    pixels = torch.randn(1, 3, 64, 64)
    whole = found.model.forward_features(pixels)
    assert found.model.num_prefix_tokens == prefix
    torch.testing.assert_close(found(pixels), whole[:, prefix:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "is_final"), [("test_vit", True), ("test_resnet", True), ("test_efficientnet", False)]
)
def test_facts_say_whether_more_follows_the_last_level(name, is_final):
    facts = encoder_facts(encoder(name))
    assert facts.is_final == is_final
    assert ("not the output of timm's forward_features" in str(facts)) != is_final


def test_a_scrambled_order_of_tokens_is_seen():
    found = encoder("test_vit")
    forward = found.forward
    assert order_is_row_major(found)
    found.forward = lambda pixels: forward(pixels).unflatten(1, (10, 10)).transpose(1, 2).flatten(1, 2)
    assert not order_is_row_major(found)


def test_a_model_of_one_channel_is_refused(tmp_path):
    config = timm.get_pretrained_cfg("test_resnet").to_dict() | {"input_size": [1, 160, 160]}
    text = {"architecture": "test_resnet", "pretrained_cfg": config, "model_args": {"in_chans": 1}}
    (tmp_path / "config.json").write_text(json.dumps(text, default=str))
    with pytest.raises(RefusedError, match="takes images of 1 channels, and gets RGB of 3"):
        encoder(f"local-dir:{tmp_path}")
