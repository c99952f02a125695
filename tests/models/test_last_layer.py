"""Nothing is computed above the last attention but for labelled tokens, and nothing is kept below the first adapter."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mmpeft.adapters import LoraConfig
from mmpeft.inference.last_layer_check import token_by_token
from mmpeft.inference.self_check import check_language_model
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import NoVision, VisionConfig
from mmpeft.tools.tiny_models import tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LAST = ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp"]
QUESTIONS = [("what color is it?", "red"), ("is it red?", "yes"), ("a?", "b")]


@pytest.fixture
def batch(make_batch, conversations):
    rows = [conversations(images, *QUESTIONS[: 1 + n]) for n, images in enumerate(["a", "bc", ""])]
    return make_batch(rows, ["lora", None, "other"])


@pytest.fixture
def make_adapted(tiny_base, randomise):
    """Finetunes of attention's inputs, in some of the two layers."""

    def make(layers=None):
        torch.manual_seed(0)
        language = LanguageConfig(str(tiny_base / "language"), dtype="float32")
        vision = VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=32, crop=False)
        model = build_model(language, vision)
        for name, targets in (("lora", ["q_proj", "v_proj"]), ("other", ["k_proj"])):
            model.bank.add(name, LoraConfig(rank=2, target_modules=targets, layers=layers))
            randomise(model.bank, name)
        return model.eval()

    return make


def step(model, batch):
    """Losses and all gradients, and how many tokens the last feed-forward saw."""
    seen = []
    mlp = model.language_model.get_submodule(LAST[1])
    handle = mlp.gate_proj.register_forward_hook(lambda *call: seen.append(call[2].shape[:-1].numel()))
    losses = model.token_losses(batch).nll
    losses.sum().backward()
    handle.remove()
    return [losses, *(p.grad for p in (*model.projector.parameters(), *model.bank.parameters()))], seen


def test_gradients_are_those_of_all_tokens(make_adapted, batch):
    results = []
    for paths in ([], LAST):
        model = make_adapted()
        model.reader.last_modules = paths
        results.append(step(model, batch))
    (wanted, whole), (found, some) = results
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        assert theirs.abs().max() > 0
    assert whole == [batch.input_ids.numel()]
    assert some == [int((batch.targets >= 0).sum())]


def test_what_a_finetune_changes_sees_all_tokens(make_model, make_batch, conversations):
    model = make_model()  # its IA3 is in the feed-forward
    model.reader.last_modules = LAST
    batch = make_batch([conversations("a", *QUESTIONS)], ["lora"])
    assert step(model, batch)[1] == [batch.input_ids.numel()]


def wrapped(language_model):
    width = language_model.get_input_embeddings().weight.shape[1]
    return MultimodalModel(NoVision(), Projector(NoVision().dim, width), language_model).eval()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "qwen3", "gemma3_text"])
def test_the_check_finds_what_works_token_by_token(model_type):
    checked = check_language_model(wrapped(tiny_model(model_type)))
    assert len(checked.last_modules) == 2
    assert not check_language_model(wrapped(tiny_model("bloom"))).last_modules, "read unpacked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_attention_that_another_follows_computes_all_tokens(dtype):
    """LongCat-Flash has two in a layer. What the second reads of the first is less than 16 bits round."""
    model = wrapped(tiny_model("longcat_flash").to(dtype))
    checked = check_language_model(model)
    assert not [path for path in checked.last_modules if "self_attn.0" in path]
    assert [path for path in checked.last_modules if "self_attn.1" in path]


class Shifted(nn.Module):
    """A feed-forward that reads the token before, too."""

    def __init__(self, own):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.own = (
            own.gate_proj,
            own.up_proj,
            own.down_proj,
            [own],
        )

    def forward(self, x):
        return self.own[0](x + x.roll(1, 1))


def test_a_feedforward_that_reads_other_tokens_is_left_alone():
    model = wrapped(tiny_model("llama"))
    check_language_model(model)
    assert len(model.reader.last_modules) == 2
    layer = model.language_model.model.layers[-1]
    layer.mlp = Shifted(layer.mlp)
    with torch.no_grad():
        assert token_by_token(model) == [], "what it reads of the attention is of all tokens too"


@pytest.mark.parametrize("images", ["a", ""])
def test_below_the_first_adapter_nothing_is_kept_where_the_projector_is_frozen(
    make_adapted, make_batch, conversations, images
):
    model = make_adapted("1:")
    model.projector.requires_grad_(False)
    batch = make_batch([conversations(images, *QUESTIONS)], ["lora"])
    kept, counts = [], []
    first = model.language_model.model.layers[0]
    first.register_forward_hook(lambda *_: counts.append(len(kept)))
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = model.token_losses(batch).nll.sum()
    assert counts == [0]
    assert len(kept) > 0
    loss.backward()
    kept.clear()
    model.projector.requires_grad_(True)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model.token_losses(batch)
    assert (counts[1] > 0) is bool(images)
