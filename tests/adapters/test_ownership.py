"""The bank owns its stacks beside the base, whose module tree, state dict and files stay the base's own."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmpeft.adapters import HybridConfig, LoraConfig, PrefixConfig, PromptConfig
from mmpeft.adapters.layer import AdaptedForward
from mmpeft.adapters.merge import unwrap
from tests.conftest import MIXED

NAMES = [*MIXED, None]
WITH_INPUTS = MIXED | {"inputs": HybridConfig([PromptConfig(3), PrefixConfig(2)])}


def test_the_base_keeps_its_tree_its_tensors_and_the_types_of_its_layers(make_llama, make_bank):
    model = make_llama()
    tree = [(path, type(module)) for path, module in model.named_modules()]
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    make_bank(WITH_INPUTS, model=model)
    assert [(path, type(module)) for path, module in model.named_modules()] == tree
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert [name for name, _ in model.named_parameters()] == list(dict(make_llama().named_parameters()))


def test_an_adapted_base_is_saved_as_the_base(make_llama, make_bank, tokens, tmp_path):
    make_bank().model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens(2)).logits, make_llama()(tokens(2)).logits)


def test_the_bank_is_a_module_of_its_stacks_and_not_of_the_base(make_bank):
    bank = make_bank(WITH_INPUTS)
    assert not {id(p) for p in bank.parameters()} & {id(p) for p in bank.model.parameters()}
    stacks = {id(stack) for name in bank.names for _, stack, _ in bank.places(name)}
    assert {id(stack) for stack in bank.stacks.values()} == stacks
    assert "stacks.model/layers/1/self_attn/q_proj/lora.lora_A" in bank.state_dict()


def test_modes_reach_base_and_stacks_and_a_new_stack_takes_that_of_its_layer(make_bank):
    bank = make_bank({"a": LoraConfig()})
    for mode in (False, True):
        bank.train(mode)
        bank.add(f"wider {mode}".replace(" ", "-"), MIXED["large"])
        modules = [*bank.model.modules(), *(m for stack in bank.stacks.values() for m in stack.modules())]
        assert {module.training for module in modules} == {mode}


def test_a_copy_is_a_bank_of_its_own(make_bank, logits_of, randomise, tokens):
    bank, ids = make_bank(), tokens(len(NAMES))
    want = logits_of(bank, NAMES, ids)
    twin = copy.deepcopy(bank)
    assert torch.equal(logits_of(twin, NAMES, ids), want)
    twin.remove("large")
    bank.route([None] * len(NAMES))  # the copy has its own routing
    assert not torch.equal(twin.model(ids).logits[1], want[1])
    assert torch.equal(logits_of(bank, NAMES, ids), want)


def test_a_forward_that_was_replaced_before_is_called_and_comes_back(
    make_llama, make_bank, logits_of, tokens
):
    """Libraries that place weights on devices replace the forward of instances too."""
    model = make_llama()
    linear, calls = model.model.layers[0].self_attn.q_proj, []
    plain = linear.forward
    linear.forward = counting = lambda x: calls.append(1) or plain(x)
    bank = make_bank({"a": LoraConfig(rank=2)}, model=model)
    logits_of(bank, ["a"], tokens(1))
    assert len(calls) == 1
    bank.remove("a")
    assert unwrap(bank) is model
    assert linear.forward is counting


def test_unwrapping_leaves_nothing(make_bank, make_llama, tokens):
    bank = make_bank()
    for name in bank.names:
        bank.remove(name)
    model = unwrap(bank)
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(tokens(1)).logits, make_llama()(tokens(1)).logits)
    bank.add("again", LoraConfig())
    assert sum(isinstance(vars(m).get("forward"), AdaptedForward) for m in model.modules()) == 4


@pytest.mark.parametrize("name", MIXED)
def test_gradients_of_an_adapter_do_not_reach_the_base(make_bank, tokens, token_means, name):
    bank, ids = make_bank(), tokens(1)
    bank.route([name])
    token_means(bank.model(ids).logits, ids).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in bank.model.parameters())
