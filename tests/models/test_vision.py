"""The vision encoder: frozen, its layers and pooling against naive loops, its transform against timm's."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config

from mmpeft.data.images import ImageConfig
from mmpeft.models.image_transform import FITS, cut_share, make_transform
from mmpeft.models.pooling import pool_tokens
from mmpeft.models.vision import VisionConfig, VisionEncoder


@pytest.fixture(scope="module")
def weights(tiny_base):
    return str(tiny_base / "vision.safetensors")


@pytest.fixture(scope="module")
def encoder(weights):
    return VisionEncoder(VisionConfig("test_vit", weights))


@pytest.fixture(scope="module")
def reference(weights):
    model = timm.create_model("test_vit")
    model.load_state_dict(load_file(weights))
    return model.eval()


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    path = tmp_path_factory.mktemp("cnn") / "cnn.safetensors"
    model = timm.create_model("test_efficientnet").eval()
    save_file(model.state_dict(), path)
    return model, str(path)


def pixels(side=160, images=2):
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_is_frozen_and_in_eval_mode_whatever_it_is_told(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@torch.no_grad()
def test_last_layer_is_timms_own_without_the_class_token(encoder, reference):
    whole = reference.forward_features(pixels())
    assert whole.shape[1] == 101
    torch.testing.assert_close(encoder(pixels()), whole[:, 1:], atol=1e-5, rtol=1e-5)
    assert (encoder.num_tokens, encoder.dim) == (100, 64)


@torch.no_grad()
def test_layer_minus_two_is_the_block_before_the_last_without_norm(weights, reference):
    outputs = []
    hook = reference.blocks[-2].register_forward_hook(lambda _, __, output: outputs.append(output))
    reference(pixels())
    hook.remove()
    encoder = VisionEncoder(VisionConfig("test_vit", weights, layer=-2))
    torch.testing.assert_close(encoder(pixels()), outputs[0][:, 1:], atol=1e-5, rtol=1e-5)
    assert encoder.layer == len(reference.blocks) - 2


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
def test_stages_of_a_convolutional_network_give_their_grid_row_by_row(cnn, layer):
    model, path = cnn
    encoder = VisionEncoder(VisionConfig("test_efficientnet", path, layer=layer))
    stage = timm.create_model("test_efficientnet", features_only=True).eval()
    stage.load_state_dict(model.state_dict(), strict=False)
    grid = stage(pixels())[layer]
    tokens = encoder(pixels())
    width = grid.shape[3]
    for row, column in ((0, 0), (0, 1), (grid.shape[2] - 1, 2)):
        torch.testing.assert_close(tokens[:, row * width + column], grid[:, :, row, column])


def test_an_image_alone_is_what_it_is_among_others(cnn, encoder):
    convolutional = VisionEncoder(VisionConfig("test_efficientnet", cnn[1], image_size=32))
    for each in (convolutional, encoder):
        pixels = torch.randn(3, *each.data_config["input_size"], generator=torch.Generator().manual_seed(0))
        assert torch.equal(each(pixels[:1]), each(pixels)[:1])


def test_pooling_modes_against_naive_loops():
    grid = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    average = pool_tokens(grid, "average", 2)
    shuffled = pool_tokens(grid, "pixel_shuffle", 2)
    assert average.shape == (2, 8, 3)
    assert shuffled.shape == (2, 8, 12)
    for row in range(2):
        for column in range(4):
            square = grid[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            token = row * 4 + column
            torch.testing.assert_close(average[:, token], square.mean((2, 3)))
            # channel by channel, the square's four values in reading order
            assert torch.equal(shuffled[:, token], square.reshape(2, -1))


def test_consecutive_pooling_is_minigpt_v2s_view():
    """`image_embeds.view(bs, int(pn / 4), int(hs * 4))`: four tokens in reading order side by side."""
    grid = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    tokens = grid.flatten(2).transpose(1, 2)
    pooled = pool_tokens(grid, "consecutive", 4)
    assert torch.equal(pooled, tokens.reshape(2, 8, 12))
    assert torch.equal(pooled[:, 1], torch.cat([tokens[:, n] for n in (4, 5, 6, 7)], dim=1))


def test_no_pooling_keeps_every_token():
    grid = torch.randn(1, 3, 2, 5)
    assert torch.equal(pool_tokens(grid, "none", 2)[0, 7], grid[0, :, 1, 2])


@pytest.mark.parametrize("pooling", ["average", "pixel_shuffle", "consecutive"])
def test_a_grid_that_does_not_divide_is_refused(pooling):
    with pytest.raises(ValueError, match=rf"5x5 tokens cannot be pooled by 2 \({pooling}\).*image_size"):
        pool_tokens(torch.randn(1, 3, 5, 5), pooling, 2)


def test_image_size_changes_the_number_of_tokens(weights, cnn):
    assert VisionEncoder(VisionConfig("test_vit", weights, image_size=64)).num_tokens == 16
    assert VisionEncoder(VisionConfig("test_vit", weights, image_size=64, pooling="average")).num_tokens == 4
    assert VisionEncoder(VisionConfig("test_efficientnet", cnn[1], image_size=64)).num_tokens == 4


def test_position_embeddings_of_another_image_size_are_interpolated_as_timm_does(weights, tmp_path):
    torch.save(load_file(weights), tmp_path / "vision.pth")
    overlay = {"file": str(tmp_path / "vision.pth")}
    timms = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=64)
    ours = VisionEncoder(VisionConfig("test_vit", weights, image_size=64))
    assert torch.equal(ours.model.pos_embed, timms.pos_embed)


def test_transform_is_timms_evaluation_transform(encoder, reference):
    transform = create_transform(**resolve_data_config({}, model=reference), is_training=False)
    image = Image.effect_mandelbrot((200, 120), (-2, -1, 1, 1), 50).convert("RGB")
    assert torch.equal(encoder.transform(image), transform(image))


STRIPE = Image.new("RGB", (400, 100), (0, 0, 0))
STRIPE.paste((255, 255, 255), (0, 0, 40, 100))  # which a centre crop cuts off


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_without_crop_the_borders_count(weights, fit):
    seen = VisionEncoder(VisionConfig("test_vit", weights, fit=fit)).transform(STRIPE)
    cropped = VisionEncoder(VisionConfig("test_vit", weights)).transform(STRIPE)
    assert seen.shape == cropped.shape == (3, 160, 160)
    assert float(seen.max()) > float(cropped.max())


def test_crop_is_the_old_name_of_fit(weights):
    assert VisionConfig("test_vit", crop=False) == VisionConfig("test_vit", fit="squash")
    assert VisionConfig("test_vit", crop=True) == VisionConfig("test_vit")
    with pytest.raises(ValueError, match=r"vision\.crop \(False\) is an old name of vision\.fit \(pad\)"):
        VisionConfig("test_vit", fit="pad", crop=False)


def test_pad_keeps_the_shape_on_the_mean_colour(encoder, weights):
    padded = VisionEncoder(VisionConfig("test_vit", weights, fit="pad"))
    mean, std = (np.array(encoder.data_config[name])[:, None, None] for name in ("mean", "std"))
    whole = STRIPE.resize((160, 40), Image.Resampling.BICUBIC)
    expected = np.empty((3, 160, 160))
    expected[:] = np.round(mean * 255) / 255
    expected[:, 60:100] = np.asarray(whole).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(padded.transform(STRIPE), (expected - mean) / std, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1), (3, 2), (160, 160)])
@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_thin_and_tiny_images_fit(weights, size, fit):
    pixels = VisionEncoder(VisionConfig("test_vit", weights, fit=fit)).transform(
        Image.new("RGB", size, "red")
    )
    assert pixels.shape == (3, 160, 160)
    assert float(pixels[0].max()) > 0.9, "the image is in it"


def test_an_image_that_a_crop_would_enlarge_beyond_memory_is_refused(encoder):
    with pytest.raises(ValueError, match=r"1 x 60000 pixels would be resized to .*model\.vision\.fit to pad"):
        encoder.transform(Image.new("RGB", (1, 60_000)))


SIZES = [(160, 160), (3000, 200), (200, 3000), (640, 480), (481, 641), (37, 90), (161, 160)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("settings", [{}, {"input_size": (3, 96, 160)}, {"crop_pct": 1.0}, {"crop_pct": 0.7}])
def test_the_share_that_is_cut_is_what_the_transform_leaves_out(encoder, size, fit, settings):
    data_config = encoder.data_config | settings | FITS[fit]
    steps = make_transform(data_config).transforms
    resized = steps[0](Image.new("RGB", size, "white"))
    cut = steps[1](resized)
    height, width = data_config["input_size"][1:]
    assert cut.size == (width, height)
    seen = min(width, resized.width) * min(height, resized.height) / (resized.width * resized.height)
    assert cut_share(size, SimpleNamespace(data_config=data_config)) == pytest.approx(1 - seen, abs=1e-12)


def test_what_is_cut_of_wide_and_ordinary_images(encoder, weights):
    assert cut_share((3000, 200), encoder) > 0.93
    assert cut_share((3000, 200), VisionEncoder(VisionConfig("test_vit", weights, fit="pad"))) == 0
    assert cut_share((3000, 200), VisionEncoder(VisionConfig("test_vit", weights, fit="squash"))) == 0


def test_fingerprint_tells_what_changes_features(weights, tmp_path):
    configs = {
        "as it is": VisionConfig("test_vit", weights),
        "layer": VisionConfig("test_vit", weights, layer=-2),
        "pooling": VisionConfig("test_vit", weights, pooling="average"),
        "consecutive": VisionConfig("test_vit", weights, pooling="consecutive"),
        "image size": VisionConfig("test_vit", weights, image_size=64),
        "squash": VisionConfig("test_vit", weights, fit="squash"),
        "pad": VisionConfig("test_vit", weights, fit="pad"),
        "scale": VisionConfig("test_vit", weights, image=ImageConfig(scale="percentile")),
        "frame": VisionConfig("test_vit", weights, image=ImageConfig(frame="middle")),
    }
    other = {key: tensor.clone() for key, tensor in load_file(weights).items()}
    other["norm.bias"][0] += 1e-3
    save_file(other, tmp_path / "other.safetensors")
    configs["weights"] = VisionConfig("test_vit", str(tmp_path / "other.safetensors"))
    fingerprints = [VisionEncoder(config).fingerprint for config in configs.values()]
    assert all(one != two for n, one in enumerate(fingerprints) for two in fingerprints[:n])
    assert VisionEncoder(VisionConfig("test_vit", weights)).fingerprint == fingerprints[0]
    limits = VisionConfig("test_vit", weights, image=ImageConfig(max_pixels=10**6))
    assert VisionEncoder(limits).fingerprint == fingerprints[0], "limits change no pixel"
    same_layer = VisionEncoder(VisionConfig("test_vit", weights, layer=5))
    assert same_layer.fingerprint == fingerprints[0], "-1 and 5 are one layer"


def test_unknown_model_is_refused_with_similar_names():
    with pytest.raises(ValueError, match=r"timm has no model 'test_vitt'.*test_vit"):
        VisionEncoder(VisionConfig("test_vitt"), load_weights=False)


@pytest.mark.parametrize("layer", [6, -7])
def test_a_layer_that_the_model_does_not_have_is_refused(weights, layer):
    with pytest.raises(ValueError, match=f"vision layer {layer}: test_vit has layers 0 to 5"):
        VisionEncoder(VisionConfig("test_vit", weights, layer=layer))


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none.safetensors: no such file"):
        VisionEncoder(VisionConfig("test_vit", str(tmp_path / "none.safetensors")))


def test_weights_that_do_not_fit_are_refused(weights, tmp_path):
    state = load_file(weights)
    del state["norm.weight"]
    state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"][:3].clone()
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing \['norm.weight'\].*1 have another shape"):
        VisionEncoder(VisionConfig("test_vit", str(tmp_path / "half.safetensors")))
