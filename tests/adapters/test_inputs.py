"""Prompts and prefixes on families whose embeddings are scaled and whose keys are of other sizes than the queries."""

import pytest
import torch

from mmpeft.adapters import AdapterBank, PrefixConfig, PromptConfig, PTuningConfig
from mmpeft.adapters.inputs import model_inputs
from mmpeft.errors import RefusedError
from mmpeft.tools.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma", "minicpm3", "inkling_text", "opt"])
@pytest.mark.parametrize("config", [PromptConfig, PTuningConfig])
def test_a_prompt_begins_as_embeddings_that_the_model_would_read(family, config):
    """Gemma multiplies its table by the root of its width, MiniCPM3 by 12, Inkling normalises it."""
    bank = AdapterBank(tiny_model(family))
    bank.add("a", config(3))
    [stack] = bank.inputs.values()
    with torch.no_grad():
        read = bank.model.get_input_embeddings()(torch.arange(bank.model.config.vocab_size))
    for token in stack.get_parameter("prompt")[0]:
        assert (read == token).all(1).any()


@pytest.mark.parametrize(
    ("family", "heads", "head_dim"),
    [
        ("llama", 2, 16),
        ("gpt2", 4, 16),
        ("falcon", 1, 16),
        ("gpt_bigcode", 1, 16),
        ("gptj", 4, 16),
        ("bert", 4, 16),
        ("phi3", 2, 16),
        ("xglm", 4, 16),
    ],
)
def test_prefixes_are_as_large_as_what_a_layer_keeps(family, heads, head_dim):
    """The model's own cache is the oracle."""
    model = tiny_model(family)
    sizes = model_inputs(model, None)
    assert (sizes.num_key_heads, sizes.head_dim) == (heads, head_dim)
    if family != "bert":
        with torch.no_grad():
            kept = model(torch.tensor([[5]]), use_cache=True).past_key_values
        assert len(kept.layers) == sizes.num_layers
        for layer in kept.layers:
            for tensor in (layer.keys, layer.values):
                assert tensor.shape == (1, sizes.num_key_heads, 1, sizes.head_dim)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("minicpm3", "MiniCPM3ForCausalLM: model.layers.0 has keys of 96 features and values of 64"),
        ("gemma4_text", "heads of several sizes: 2 of 16 in model.layers.0, 2 of 512 in model.layers.1"),
        ("gemma3n_text", "model.layers.2 has no keys and values of its own"),
        ("jamba", "JambaForCausalLM has layers of linear_attention"),
        ("mamba", "MambaForCausalLM has layers of linear_attention"),
        ("dots3_note_text", "Dots3NoteForCausalLM names no one number of attention heads"),
        ("xlstm", "xLSTMForCausalLM names no one number of attention heads"),
        ("hrm_text", "no single list of decoder layers"),
    ],
)
def test_a_prefix_without_a_place_is_refused_and_a_prompt_is_not(family, words):
    bank = AdapterBank(tiny_model(family))
    with pytest.raises(RefusedError, match=words):
        bank.add("a", PrefixConfig(3))
    assert not bank.names
    bank.add("a", PromptConfig(3))
