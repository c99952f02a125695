"""What is IA3's own: the two sides, the start at one, the slots that take no part."""

import pytest
import torch

from mmpeft.adapters import AdapterBank, IA3Config
from mmpeft.adapters.methods.ia3 import IA3Stack
from tests.conftest import slot_of, stack_at


@pytest.mark.parametrize(("side", "shape"), [("input", (1, 6)), ("output", (6, 1))])
def test_a_slot_holds_the_vector_less_one_and_reads_as_peft_stores_it(side, shape):
    stack = IA3Stack(6, side, num_slots=2)
    stack.open(1, IA3Config(), torch.Generator())
    assert torch.equal(stack.tensors(1)["ia3_l"], torch.ones(shape))
    assert not stack.ia3_delta.any()
    vector = torch.arange(6.0).view(shape)
    stack.fill(1, {"ia3_l": vector})
    assert torch.equal(stack.tensors(1)["ia3_l"], vector)
    assert torch.equal(stack.ia3_delta[1], vector.flatten() - 1)
    assert not stack.ia3_delta[0].any()


def test_growing_keeps_what_the_slots_hold():
    stack = IA3Stack(6, "output", num_slots=1)
    stack.fill(0, {"ia3_l": torch.arange(6.0).view(6, 1)})
    stack.resize(3, 0)
    assert torch.equal(stack.tensors(0)["ia3_l"].flatten(), torch.arange(6.0))
    assert stack.ia3_delta.shape == (3, 6)
    assert not stack.ia3_delta[1:].any()


def test_each_site_is_scaled_on_its_own_side(make_bank):
    """Keys and values at the output (GQA: fewer than hidden), the feed-forward at the input of its last
    linear: three vectors a layer and none elsewhere."""
    bank = make_bank({"tfew": IA3Config()})
    sides = {
        path.removeprefix("model.layers.0."): (
            "ia3_input" in layer.stacks,
            "ia3_output" in layer.stacks,
            "lora" in layer.stacks,
        )
        for path, layer in bank.layers.items()
        if ".0." in path
    }
    only_input, only_output = (True, False, False), (False, True, False)
    assert sides == {
        "self_attn.k_proj": only_output,
        "self_attn.v_proj": only_output,
        "mlp.down_proj": only_input,
    }
    assert sum(p.numel() for p in bank.parameters()) == 2 * (32 + 32 + 128)


def test_scaling_the_input_of_down_is_scaling_the_output_of_up(make_llama, logits_of, tokens):
    """The paper's place for the feed-forward vector (T5's wi_1) and ours are the same function."""
    vector, logits = torch.rand(128) + 0.5, []
    for target, feedforward in (("down_proj", ["down_proj"]), ("up_proj", [])):
        bank = AdapterBank(make_llama())
        bank.add("a", IA3Config([target], feedforward))
        for path in bank.entry("a").sites:
            stack = stack_at(bank, "a", path)
            stack.fill(0, {"ia3_l": vector})
        logits.append(logits_of(bank, ["a"], tokens(1)))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-6)


def test_a_slot_on_a_module_it_does_not_target_stays_zero_under_training(make_bank, train, tokens):
    """Unlike LoRA's, a zero IA3 slot would learn: only the mask of active slots keeps it out."""
    configs = {"keys": IA3Config(["k_proj"]), "values": IA3Config(["v_proj", "down_proj"])}
    bank = make_bank(configs, fill=False)
    train(bank, list(configs), [tokens(2)] * 3)
    for name, other in (("keys", "values"), ("values", "keys")):
        for path in bank.entry(name).sites:
            delta = stack_at(bank, name, path).ia3_delta
            assert delta[slot_of(bank, name)].all(), f"{name} did not train"
            assert not delta[slot_of(bank, other)].any()
