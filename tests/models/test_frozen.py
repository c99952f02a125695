"""A base in training computes what it does in evaluation, whatever its config drops, jitters or clamps."""

import pytest
import torch
from torch.nn import functional as F

from mmpeft.adapters import LoraConfig
from mmpeft.data.batch import collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IGNORE_INDEX, Encoded
from mmpeft.errors import RefusedError
from mmpeft.models.frozen import recompute
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import NoVision
from mmpeft.tools.tiny_models import tiny_model

SHARED, ANSWERS = [20, 31, 42, 53], ([64, 75, 86], [97, 108, 119, 130])
FAMILIES = {
    "gpt2": {},
    "opt": {"dropout": 0.3, "layerdrop": 0.5},
    "biogpt": {},
    "ctrl": {},
    "phimoe": {"input_jitter_noise": 0.3},
    "gemma3n_text": {"altup_coef_clip": 1e-3},
    "modernbert-decoder": {},
}
"""What each does in training mode alone: drop in modules and in functions, leave layers out, jitter what its routers
read, clamp its own weights; the last calls its head its decoder."""
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def built(family, recomputing, randomise, **lora):
    language = tiny_model(family, **FAMILIES[family])
    if recomputing:
        recompute(language)
    width = language.get_input_embeddings().weight.shape[1]
    model = MultimodalModel(NoVision(), Projector(NoVision().dim, width), language)
    model.bank.add("own", LoraConfig(rank=2, **lora))
    randomise(model.bank, "own")
    return model


def losses(model):
    packed = pack([Encoded([*SHARED, *own], [IGNORE_INDEX] * len(SHARED) + [*own[1:], 5]) for own in ANSWERS])
    return model.token_losses(collate([packed], None, ["own"])).nll.sum()


def own_losses(model):
    """By the model's own forward in eval mode, each conversation alone."""
    model.bank.route(["own"])
    total = 0
    for own in ANSWERS:
        logits = model.language_model(input_ids=torch.tensor([[*SHARED, *own]]), use_cache=False).logits[0]
        total += F.cross_entropy(logits[len(SHARED) :], torch.tensor([*own[1:], 5]), reduction="sum")
    return total


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.bank.parameters()))


@pytest.mark.parametrize(
    ("family", "recomputing"), [(f, r) for f in FAMILIES for r in (False, True) if (f, r) != ("ctrl", True)]
)
def test_training_has_the_losses_and_gradients_of_the_models_own_evaluation(family, recomputing, randomise):
    model = built(family, recomputing, randomise)
    before = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    own = own_losses(model.eval())
    wanted = gradients(model, own)
    loss = losses(model.train())
    torch.testing.assert_close(loss, own, **CLOSE)
    torch.testing.assert_close(gradients(model, loss), wanted, **CLOSE)
    after = model.language_model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_base_that_cannot_recompute_is_refused_by_its_setting():
    with pytest.raises(RefusedError, match=r"CTRLLMHeadModel .*gradient_checkpointing to false"):
        recompute(tiny_model("ctrl"))


def test_layers_recompute_in_training_and_adapters_drop_there(randomise):
    model, forwards = built("gpt2", True, randomise, dropout=0.5), []
    assert torch.equal(losses(model), losses(model)), "a model that nobody has trained drops"
    model.language_model.transformer.h[0].attn.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert not model.language_model.get_input_embeddings()(torch.tensor([1])).requires_grad
    for training, times in ((False, 1), (True, 2)):
        forwards.clear()
        gradients(model, losses(model.train(training)))
        assert len(forwards) == times
    torch.manual_seed(0)
    one, other = losses(model.train()), losses(model)
    assert not torch.equal(one, other)
    assert torch.equal(losses(model.eval()), losses(model))
