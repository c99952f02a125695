"""The same guarantees on bitsandbytes' linears: NF4 with double quantisation, and int8."""

import peft
import pytest
import torch

from mmpeft.adapters import DoraConfig
from mmpeft.adapters.peft_format import save_adapter
from mmpeft.models.language import LanguageConfig, load_language_model
from tests.conftest import MIXED

bnb = pytest.importorskip("bitsandbytes")

NAMES = [*MIXED, None]


@pytest.fixture(scope="module", params=["nf4", "int8"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def make_quantised(kind, make_llama, tmp_path_factory):
    """Loads the tiny Llama with its linears in 4 or 8 bits; the head and the embedding stay dense."""
    path = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(path)
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

    def make(dtype=torch.float32):
        return load_language_model(LanguageConfig(str(path), names[dtype], quantization=kind))

    return make


def quantised_linears(model):
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]


only_nf4 = pytest.mark.parametrize("kind", ["nf4"], indirect=True)


def run(bank, names, ids, token_means):
    """Logits, and the gradient of the input embeddings for the sum of the rows' losses."""
    embeds = bank.model.get_input_embeddings()(ids).detach().requires_grad_()
    bank.route(names)
    logits = bank.model(inputs_embeds=embeds).logits
    token_means(logits, ids).sum().backward()
    return logits.detach(), embeds.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_slot_is_the_quantised_base_bitwise(make_quantised, make_bank, logits_of, tokens, dtype):
    ids = tokens(3)
    with torch.no_grad():
        base = make_quantised(dtype)(ids).logits
    bank = make_bank(model=make_quantised(dtype))
    assert len(quantised_linears(bank.model)) == 14, "wrapping must keep the quantised linears"
    assert torch.equal(logits_of(bank, [None] * 3, ids), base)
    assert not torch.equal(logits_of(bank, ["small", "tfew", None], ids)[:2], base[:2])


@pytest.mark.parametrize("kind", ["int8"], indirect=True)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_dora_on_int8_takes_its_norm_from_the_weight_that_is_read(
    make_quantised, make_bank, logits_of, tokens, tmp_path
):
    """PEFT too; the norm of what the 8-bit product makes of the rows of A was 0.1 off in the logits."""
    bank = make_bank({"a": DoraConfig(rank=4, alpha=4)}, model=make_quantised())
    save_adapter(bank, "a", tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(make_quantised(), tmp_path).eval()
    with torch.no_grad():
        want = theirs(tokens(2)).logits
    torch.testing.assert_close(logits_of(bank, ["a"] * 2, tokens(2)), want, rtol=1e-4, atol=1e-4)


@only_nf4  # int8 also rounds the activations
def test_forward_and_gradients_equal_those_on_the_dequantised_base(
    make_quantised, make_bank, tokens, token_means, gradients_of
):
    """4-bit changes the weight, not the maths; bitsandbytes dequantises and calls the plain product.

    It does so through another layout of the weight, hence fp32 rounding instead of bitwise."""
    ids, results = tokens(len(NAMES)), []
    for dequantise in (False, True):
        model = make_quantised()
        bank = make_bank(model=model.dequantize() if dequantise else model)
        assert bool(quantised_linears(bank.model)) is not dequantise
        logits, grad = run(bank, NAMES, ids, token_means)
        gradients = {f"{n} {k}": g for n in bank.names for k, g in gradients_of(bank, n).items()}
        results.append({"logits": logits, "inputs": grad, **gradients})
    quantised, dense = results
    for key, want in dense.items():
        assert quantised[key].any(), f"{key} has no gradient"
        torch.testing.assert_close(
            quantised[key], want, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sick", ["large", "tfew"])
def test_a_diverged_finetune_stays_in_its_row(
    make_quantised, make_bank, poison, tokens, token_means, sick, dtype
):
    ids, results = tokens(len(NAMES)), []
    others = [row for row, name in enumerate(NAMES) if name != sick]
    for diverged in (False, True):
        bank = make_bank(model=make_quantised(dtype))
        if diverged:
            poison(bank, sick)
        results.append(run(bank, NAMES, ids, token_means))
    (want, want_grad), (logits, grad) = results
    assert not logits[NAMES.index(sick)].isfinite().any()
    assert torch.equal(logits[others], want[others])
    assert grad[others].isfinite().all()
    assert torch.equal(grad[others], want_grad[others])


def test_training_works_after_an_evaluation_and_leaves_the_base_untouched(
    make_quantised, make_bank, train, logits_of, tokens
):
    """The order that triggers bitsandbytes' repacking; the run must be the one without an evaluation."""
    results = []
    for evaluate_first in (False, True):
        bank = make_bank(model=make_quantised(), fill=False)
        if evaluate_first:
            logits_of(bank, NAMES, tokens(len(NAMES)))
        before = [linear.weight.detach().clone() for linear in quantised_linears(bank.model)]
        train(bank, NAMES, [tokens(len(NAMES), seed=step) for step in range(2)])
        after = [linear.weight for linear in quantised_linears(bank.model)]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        results.append({f"{n} {k}": t for n in bank.names for k, t in bank.tensors(n).items()})
    for key, want in results[0].items():
        assert want.any(), f"{key} did not train"
        assert torch.equal(results[1][key], want), key
