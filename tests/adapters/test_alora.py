"""Activated LoRA is PEFT's, on plain rows, packed ones and while answers are written."""

import json

import peft
import pytest
import torch

from mmpeft.adapters import ALoraConfig, HybridConfig, IA3Config, LoraConfig
from mmpeft.adapters.merge import merge
from mmpeft.adapters.peft_format import load_adapter, save_adapter
from mmpeft.data.batch import collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IGNORE_INDEX, Encoded
from mmpeft.errors import RefusedError
from mmpeft.inference.adapter_check import check_adapters
from mmpeft.inference.decoding import generate
from mmpeft.inference.self_check import check_language_model
from tests.adapters.test_peft_format import peft_gradients
from tests.inference.test_self_check import wrapped

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CALL = [7, 8, 9]
PREFIX = [20, 31, 42, 53]
PROMPTS = [[*PREFIX, *CALL, 75], [*PREFIX, 61, *CALL, 62, *CALL], [*PREFIX, 63, 64]]
"""Called once, twice, and not at all."""
NEW = 4
NO_END = -5


def theirs_of(model, folder=None, **fields):
    """PEFT's adapter on a model, far from the base, written to the folder."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", alora_invocation_tokens=CALL, **fields
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    if folder is not None:
        theirs.save_pretrained(folder)
    return theirs


@pytest.fixture
def called(tokens):
    """Ids (3, 9): a row with the tokens once, one with them twice, one without."""
    ids = tokens(3)
    ids[0, 3:6] = ids[1, 1:4] = ids[1, 5:8] = torch.tensor(CALL)
    return ids


def test_numbers_and_gradients_are_those_of_peft(make_bank, make_llama, called, tmp_path):
    theirs = theirs_of(make_llama(), tmp_path)
    want = theirs(called).logits
    want.logsumexp(-1).sum().backward()
    bank = make_bank({"other": LoraConfig(rank=2)})
    load_adapter(bank, "a", tmp_path)
    bank.route(["a", "a", "a"], called)
    got = bank.model(called).logits
    got.logsumexp(-1).sum().backward()
    torch.testing.assert_close(got, want, **CLOSE)
    ours = {f"{path}.lora_A.weight": stack.lora_A.grad[slot] for path, stack, slot in bank.places("a")}
    gradients = peft_gradients(theirs)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-3, atol=1e-4)
    assert max(gradient.abs().max() for gradient in ours.values()) > 0.1


def test_peft_reads_our_file(make_bank, make_llama, called, tmp_path):
    bank = make_bank({"a": ALoraConfig(rank=4, alpha=8, invocation_tokens=CALL)})
    save_adapter(bank, "a", tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(make_llama(), tmp_path)
    bank.route(["a"] * 3, called)
    torch.testing.assert_close(bank.model(called).logits, theirs(called).logits, **CLOSE)


@torch.no_grad()
def test_what_stands_before_the_call_is_the_base_to_the_bit(make_bank, called, poison):
    bank = make_bank({"a": ALoraConfig(invocation_tokens=CALL, target_modules="all-linear")})
    bank.route([None] * 3)
    base = bank.model(called, output_hidden_states=True).hidden_states[-1]
    bank.route(["a", "a", None], called)
    own = bank.model(called, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(own[0, :3], base[0, :3])
    assert torch.equal(own[1, :5], base[1, :5])
    assert torch.equal(own[2], base[2])
    assert ((own - base)[0, 3:].abs().amax(-1) > 1e-3).all()
    poison(bank, "a")
    assert torch.equal(bank.model(called, output_hidden_states=True).hidden_states[-1][2], base[2])


def test_where_nobody_shows_the_ids_or_others_it_is_refused(make_bank, called):
    bank = make_bank({"a": ALoraConfig(invocation_tokens=CALL), "b": LoraConfig()})
    bank.route(["a", None, None])
    with pytest.raises(RefusedError, match=r"call bank\.route\(names, ids\)"):
        bank.model(called)
    bank.route(["a", None, None], called)
    with pytest.raises(RefusedError, match=r"\(3, 5, 64\) came where tokens of shape \(3, 9\)"):
        bank.model(called[:, :5])
    bank.route(["b", None, None])
    bank.model(called)


@pytest.mark.parametrize("tokens", [[], None, [-3], ["a"], 7])
def test_other_things_than_ids_are_refused(tokens):
    with pytest.raises(RefusedError, match=r"invocation_tokens is .* wanted a list of ids"):
        ALoraConfig(invocation_tokens=tokens)


def test_what_has_no_meaning_for_a_part_of_the_tokens_is_refused(make_bank, make_llama, tmp_path):
    theirs_of(make_llama(), tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    for field in ("use_dora", "lora_bias"):
        path.write_text(json.dumps(raw | {field: True}))
        with pytest.raises(RefusedError, match=f"alora_invocation_tokens is set beside {field}"):
            load_adapter(make_bank({}), "a", tmp_path)
    bank = make_bank({"a": ALoraConfig(invocation_tokens=CALL)})
    with pytest.raises(RefusedError, match="alora is no change of a weight and cannot be merged"):
        merge(bank, "a")
    names = (["q_proj"], ["v_proj"])
    twice = HybridConfig([ALoraConfig(target_modules=own, invocation_tokens=CALL) for own in names])
    with pytest.raises(RefusedError, match="two alora parts of one adapter"):
        bank.add("b", twice)


# -- packed rows and answers ----------------------------------------------------------------------------------


def encoded(ids):
    targets = [*ids[1:], 7]
    return Encoded(ids, [IGNORE_INDEX] * (len(ids) - 2) + targets[-2:])


def batch_of(rows, names):
    return collate([pack([encoded(ids) for ids in row]) for row in rows], None, names)


@pytest.fixture(params=["llama", "gemma3_text", "granitemoehybrid", "recurrent_gemma"])
def served(request, tmp_path):
    """A model packed, one with masks by layer type, one unpacked and one without a cache, with PEFT's adapter as "a"
    beside a LoRA, and PEFT's own of the same."""
    fields = {"exclude_modules": r".*(experts|router).*"}
    theirs = theirs_of(wrapped(request.param).language_model, tmp_path, **fields).eval()
    model = wrapped(request.param)
    check_language_model(model)
    load_adapter(model.bank, "a", tmp_path)
    model.bank.add("b", LoraConfig(target_modules="all-linear"))
    return model, theirs


@pytest.mark.filterwarnings("ignore:a row of 'a' has its invocation tokens")
@torch.no_grad()
def test_packed_losses_are_those_of_peft_on_rows_alone(served):
    model, theirs = served
    got = model.token_losses(batch_of([PROMPTS[:2], PROMPTS[1:2], PROMPTS], ["a", "a", "b"]))
    want = []
    for ids in (*PROMPTS[:2], PROMPTS[1]):
        logits = theirs(torch.tensor([ids])).logits[0, -2:].log_softmax(-1)
        want += [-logits[0, ids[-1]], -logits[1, 7]]
    torch.testing.assert_close(got.nll[got.rows < 2], torch.stack(want), **CLOSE)


@pytest.mark.filterwarnings("ignore:a row of 'a' has its invocation tokens")
def test_answers_are_those_of_peft(served):
    model, theirs = served
    rows = [[encoded(ids) for ids in PROMPTS[:2]], [encoded(PROMPTS[2])], [encoded(PROMPTS[0])]]
    batch = collate([pack(row) for row in rows], None, ["a", "a", None])
    answers = generate(model, batch, NO_END, NEW)
    own = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def of_peft(ids):
        return theirs.generate(input_ids=torch.tensor([ids]), **own)[0, len(ids) :].tolist()

    assert answers[0] == [of_peft(PROMPTS[0]), of_peft(PROMPTS[1])]
    assert answers[1] == [of_peft(PROMPTS[2])]
    with theirs.disable_adapter():
        assert answers[2] == [of_peft(PROMPTS[0])]
    assert answers[2] != [answers[0][0]]


def test_a_call_that_only_some_conversations_share_is_refused():
    model = wrapped("llama")
    model.bank.add("a", ALoraConfig(invocation_tokens=CALL))
    shared = [*PREFIX, *CALL]
    with pytest.raises(RefusedError, match=r"\[7, 8, 9\] stand in what they share.*max_conversations: 1"):
        model.token_losses(batch_of([[[*shared, 50, 51, 52], [*shared, 60, *CALL, 61]]], ["a"]))
    model.token_losses(batch_of([[[*shared, 50, 51, 52], [*shared, 60, 61, 62]]], ["a"]))


def test_kept_tokens_that_a_later_call_would_turn_off_are_refused():
    model = wrapped("llama")
    model.bank.add("a", ALoraConfig(invocation_tokens=CALL))
    whole, new = batch_of([[[*PREFIX, *CALL, 50, 51, *CALL, 52]]], ["a"]), 4
    with pytest.raises(RefusedError, match="cannot be asked behind kept examples"):
        model.inputs(whole, new)
    assert model.inputs(batch_of([[[*PREFIX, *CALL, 50, 51, 52]]], ["a"]), 3).invoked.all()


def test_a_row_without_a_call_is_told():
    model = wrapped("llama")
    model.bank.add("a", ALoraConfig(invocation_tokens=CALL))
    with pytest.warns(UserWarning, match=r"a row of 'a' has its invocation tokens \[7, 8, 9\] nowhere"):
        model.token_losses(batch_of([[PROMPTS[2]]], ["a"]))


def test_the_check_of_finetunes_calls_it():
    model = wrapped("llama")
    model.bank.add("a", HybridConfig([IA3Config(["k_proj"]), ALoraConfig(invocation_tokens=CALL)]))
    model.bank.add("b", ALoraConfig(invocation_tokens=CALL))
    assert len(check_adapters(model, {})["adapters"]) == 2
