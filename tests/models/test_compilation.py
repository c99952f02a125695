"""Compiled layers compute what they compute by themselves, gradients included, and are compiled once."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from mmpeft.adapters import (
    BottleneckConfig,
    DoraConfig,
    HybridConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from mmpeft.errors import RefusedError
from mmpeft.inference.self_check import check_language_model
from mmpeft.models.build import build_model
from mmpeft.models.compilation import CompiledLayers
from mmpeft.models.language import LanguageConfig

FEW = {
    "dropping": LoraConfig(rank=2, dropout=0.3, target_modules=["v_proj", "up_proj"]),
    "tfew": IA3Config(),
    "nan": LoraConfig(rank=3, target_modules=["q_proj", "v_proj"]),
}
ALL = FEW | {
    "everywhere": LoraConfig(rank=2, dropout=0.1, target_modules="all-linear"),
    "dora": DoraConfig(rank=2, target_modules=["q_proj", "down_proj"]),
    "after": BottleneckConfig(width=4),
    "virtual": HybridConfig([PrefixConfig(2), PromptConfig(3)]),
}
SHORT = [("what color is it?", "red"), ("is it red?", "yes")]
LONG = [("what color is it? is it red or green?", "it is a red square on nothing else"), *SHORT]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def adapted(make_model, randomise, poison):
    """A model in training with finetunes, of which one is given up; ``language`` goes into its config."""

    def make(finetunes=FEW, **language):
        model = make_model(**language)
        for name in ("lora", "ia3"):
            model.bank.remove(name)
        check_language_model(model)
        for name, config in finetunes.items():
            model.bank.add(name, config)
            randomise(model.bank, name)
        poison(model.bank, "nan")
        return model.train()

    return make


@pytest.fixture
def deep(make_llama, tmp_path):
    """Five layers, without images."""
    make_llama(num_hidden_layers=5, vocab_size=400).save_pretrained(tmp_path)
    model = build_model(LanguageConfig(str(tmp_path), "float32"), None)
    check_language_model(model)
    for name, config in FEW.items():
        model.bank.add(name, config)
    return model.train()


@pytest.fixture
def batch_for(conversations, make_batch):
    """A row for every name, all of the same questions."""

    def make(names, questions, images="a"):
        batch = make_batch([conversations(images, *questions) for _ in names], list(names))
        batch.dropout_seeds = {name: 3 for name in names if name is not None}
        return batch.to("cpu")

    return make


def learnt(model, batch):
    """The loss of every token, and the gradient of all that trains."""
    losses = model.token_losses(batch).nll
    losses.sum().backward()
    trained = {**dict(model.projector.named_parameters()), **dict(model.bank.named_parameters())}
    gradients = {name: each.grad for name, each in trained.items() if each.grad is not None}
    model.zero_grad()
    return {"loss": losses.detach(), **gradients}


def compare(model, batches, backend):
    layers = CompiledLayers(model.reader, model.bank, backend)
    for batch in batches:
        wanted = learnt(model, batch)
        layers.use()
        found = learnt(model, batch)
        layers.leave()
        assert found.keys() == wanted.keys()
        for name, each in wanted.items():
            bound = (2e-5 if backend == "inductor" else 1e-5) * float(each.nan_to_num().abs().max())
            torch.testing.assert_close(
                found[name], each, rtol=0, atol=bound, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert torch.isnan(wanted["loss"]).any() == ("nan" in batch.adapters)


@pytest.mark.parametrize("recomputes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_learns_what_it_learns_by_itself(adapted, batch_for, recomputes):
    """Of several finetunes in one pass, one of them given up, dropout and rows of the base among them."""
    batches = batch_for(["dropping", None, "nan", "tfew"], SHORT), batch_for(["tfew", "dropping"], LONG)
    compare(adapted(gradient_checkpointing=recomputes), batches, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_method_learns_what_it_learns_by_itself(adapted, batch_for, backend, recomputes):
    names = [*ALL, None]
    batches = batch_for(names, SHORT), batch_for(names[3:], LONG), batch_for(["virtual", None], SHORT)
    compare(adapted(ALL, gradient_checkpointing=recomputes), batches, backend)


def test_layers_share_their_graphs_and_nothing_is_compiled_anew(deep, batch_for):
    """For other rows, lengths and finetunes."""
    counter = CompileCounter()
    CompiledLayers(deep.reader, deep.bank, counter).use()
    learnt(deep, batch_for(["dropping", None, "nan", "tfew"], SHORT, ""))
    compiled = counter.frame_count
    assert 0 < compiled < 10, "of five layers"
    others = [
        (["tfew", "dropping"], LONG),
        ([None, None, "dropping"], LONG[1:]),
        (["nan"] * 7, SHORT),
    ]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names, questions in others:
            learnt(deep, batch_for(names, questions, ""))
    assert counter.frame_count == compiled


def test_it_is_for_learning_alone_and_leaves_nothing(adapted, batch_for):
    model, counter = adapted(), CompileCounterWithBackend("aot_eager")
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    layers = CompiledLayers(model.reader, model.bank, counter)
    layers.use()
    layers.use()
    with torch.no_grad():
        model.token_losses(batch_for(["tfew", None], SHORT))
    assert counter.frame_count == 0
    layers.leave()
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == before
    learnt(model, batch_for(["tfew", None], SHORT))
    assert counter.frame_count == 0


def test_a_quantised_base_is_refused_by_name(make_model):
    pytest.importorskip("bitsandbytes")
    model = make_model(quantization="nf4")
    with pytest.raises(
        RefusedError, match=r"model.compile: the base's linears are Linear4bit.*quantization to null"
    ):
        CompiledLayers(model.reader, model.bank)
