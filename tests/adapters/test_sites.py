"""Which linears a config names."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from mmpeft.adapters import AdapterBank, IA3Config, LoraConfig
from mmpeft.adapters.sites import find_sites, is_feedforward, linear_features


def last_names(sites) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in sites}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LoraConfig(), {"q_proj", "v_proj"}),
        (IA3Config(), {"k_proj", "v_proj", "down_proj"}),
        (LoraConfig(target_modules=["o_proj"]), {"o_proj"}),
        (LoraConfig(target_modules=r".*layers\.\d+\.mlp\.(gate|up)_proj"), {"gate_proj", "up_proj"}),
    ],
)
def test_targets_match_in_every_layer(tiny_llama, config, names):
    sites = find_sites(tiny_llama, config)
    assert last_names(sites) == names
    assert len(sites) == len(names) * tiny_llama.config.num_hidden_layers


def test_all_linear_is_every_linear_but_the_output_head(tiny_llama):
    """PEFT's meaning of the word; the head is often tied to the embedding."""
    sites = find_sites(tiny_llama, LoraConfig(target_modules="all-linear"))
    assert len(sites) == 7 * tiny_llama.config.num_hidden_layers
    assert "lm_head" not in sites


def test_a_full_path_names_one_module_and_a_part_of_a_name_none(tiny_llama):
    path = "model.layers.1.mlp.up_proj"
    assert list(find_sites(tiny_llama, LoraConfig(target_modules=[path]))) == [path]
    with pytest.raises(ValueError, match="matched no linear"):
        find_sites(tiny_llama, LoraConfig(target_modules=["proj"]))


def test_sites_are_the_same_once_modules_are_wrapped(make_llama):
    """Otherwise a second adapter would land inside the first one's wrapper."""
    everywhere = LoraConfig(rank=1, target_modules="all-linear")
    bank = AdapterBank(make_llama())
    before = list(find_sites(bank.model, everywhere))
    bank.add("first", everywhere)
    assert list(find_sites(bank.model, everywhere)) == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules=["q_prj"]), ["target_modules", "q_prj", "LlamaForCausalLM", "'q_proj'"]),
        (LoraConfig(target_modules=["q_proj", "wq"]), ["['wq']", "down_proj, gate_proj"]),
        (LoraConfig(target_modules=[]), ["target_modules []"]),
        (LoraConfig(target_modules="q_proj"), ["q_proj", "closest: 'q_proj'"]),
        (LoraConfig(target_modules="(q_proj"), ["(q_proj", "not a valid pattern"]),
        (IA3Config(feedforward_modules=["down_prj"]), ["feedforward_modules", "down_prj", "'down_proj'"]),
        (IA3Config(["k_proj"], ["down_proj"]), ["feedforward_modules", "down_proj"]),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_the_closest_names(tiny_llama, config, words):
    """Never a warning: the finetune would silently train less than it says."""
    with pytest.raises(ValueError, match=r"matched no linear|not a valid pattern") as error:
        find_sites(tiny_llama, config)
    assert all(word in str(error.value) for word in words), error.value


def test_feedforward_sites_follow_peft_rule():
    path = "model.layers.0.mlp.down_proj"
    assert is_feedforward(path, IA3Config())
    assert is_feedforward(path, IA3Config(feedforward_modules=r".*\.down_proj"))
    assert not is_feedforward(path, IA3Config(feedforward_modules=[]))
    assert not is_feedforward("model.layers.0.self_attn.k_proj", IA3Config())


def test_features_are_read_the_right_way_round():
    """GPT-2's Conv1D keeps its weight as (in, out)."""
    assert linear_features(torch.nn.Linear(3, 5)) == (3, 5)
    assert linear_features(Conv1D(5, 3)) == (3, 5)
    assert linear_features(torch.nn.LayerNorm(3)) is None
