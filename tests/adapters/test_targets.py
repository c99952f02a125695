"""Which linears a config names."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.pytorch_utils import Conv1D

from mmpeft.adapters import AdapterBank, IA3Config, LoraConfig
from mmpeft.adapters.architecture import find_layers, find_parts
from mmpeft.adapters.blocks import linear_features
from mmpeft.adapters.targets import (
    choose_layers,
    find_sites,
    trained_features,
)
from mmpeft.errors import RefusedError
from tests.tiny import make_model_config


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


WORDS = {
    "gpt2": {"attention": {"c_attn", "attn.c_proj"}, "mlp": {"c_fc", "mlp.c_proj"}, "gate+up": {"c_fc"}},
    "gpt_neox": {"attention": {"query_key_value", "attention.dense"}, "down": {"dense_4h_to_h"}},
    "phi3": {"q+v": {"qkv_proj"}, "o": {"o_proj"}, "gate+up": {"gate_up_proj"}, "down": {"down_proj"}},
    "llama": {
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mlp": {"gate_proj", "up_proj", "down_proj"},
        "up+gate": {"gate_proj", "up_proj"},
        "k": {"k_proj"},
    },
}
SIZES = {
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "phi3": {"intermediate_size": 64, "num_key_value_heads": 4, "pad_token_id": 0},
    "llama": {"intermediate_size": 64},
}


@pytest.mark.parametrize(("family", "word"), [(f, word) for f, words in WORDS.items() for word in words])
def test_a_word_means_the_same_places_of_every_base(family, word):
    model = AutoModelForCausalLM.from_config(make_model_config(family, **SIZES[family]))
    sites = find_sites(model, LoraConfig(target_modules=word))
    names = WORDS[family][word]
    assert all(path.endswith(tuple(f".{name}" for name in names)) for path in sites)
    assert len(sites) == len(names) * len(find_layers(model))


def test_a_word_for_what_a_base_does_not_have_is_refused():
    model = AutoModelForCausalLM.from_config(make_model_config("gpt2"))
    with pytest.raises(RefusedError, match=r"GPT2LMHeadModel has no linear that is gate$"):
        find_sites(model, LoraConfig(target_modules="gate"))
    with pytest.raises(RefusedError, match="matched no linear"):
        find_sites(model, LoraConfig(target_modules="gate+ups"))


def test_of_a_fused_linear_ia3_trains_the_features_that_its_word_means():
    model = AutoModelForCausalLM.from_config(make_model_config("gpt2"))
    path = "transformer.h.0.attn.c_attn"

    def features(word: str) -> torch.Tensor:
        found = trained_features(model, path, IA3Config(target_modules=word))
        assert found is not None
        return found

    usual, own, keys, whole = map(features, ("auto", "k+v+down", "k", "attention"))
    assert torch.equal(own, usual)
    assert torch.equal(keys, usual[: len(usual) // 2])
    assert torch.equal(whole, torch.arange(3 * len(keys)))


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
    assert IA3Config().scales_input(path)
    assert IA3Config(feedforward_modules=r".*\.down_proj").scales_input(path)
    assert not IA3Config(feedforward_modules=[]).scales_input(path)
    assert not IA3Config().scales_input("model.layers.0.self_attn.k_proj")
    assert IA3Config().scales_input("transformer.h.0.mlp.c_proj")
    assert not IA3Config().scales_input("transformer.h.0.attn.c_proj"), "the attention's, of the same name"


def test_features_are_read_the_right_way_round():
    """GPT-2's Conv1D keeps its weight as (in, out)."""
    assert linear_features(torch.nn.Linear(3, 5)) == (3, 5)
    assert linear_features(Conv1D(5, 3)) == (3, 5)
    assert linear_features(torch.nn.LayerNorm(3)) is None


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        (None, list(range(12))),
        ([3, 0], [0, 3]),
        ([-1, 0], [0, 11]),
        ("8-11", [8, 9, 10, 11]),
        ("8 - 8", [8]),
        ("9:", [9, 10, 11]),
        (":2", [0, 1]),
        ("4:6", [4, 5]),
        ("last 50%", [6, 7, 8, 9, 10, 11]),
        ("first 25%", [0, 1, 2]),
        ("middle 1/3", [4, 5, 6, 7]),
        ("first 12.5 %", [0, 1]),
        ("last 1%", [11]),
        ("middle 1/1", list(range(12))),
    ],
)
def test_layers_are_chosen(layers, numbers):
    assert choose_layers(12, layers) == numbers


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([12], r"\[12\] names no layer; the model has 12, numbered 0 to 11"),
        ([-13, 1], r"\[-13\] names no layer"),
        ([True], "names no layer"),
        ([1.0], "names no layer"),
        ([], "nothing names no layer"),
        ([11, -1], "names a layer twice"),
        ("8-12", "names layers 8 to 12; the model has 12"),
        ("5-4", "names layers 5 to 4"),
        ("12:", "the model has 12"),
        ("last 0%", "a share must be above 0"),
        ("last 101%", "a share must be above 0"),
        ("middle 3/2", "a share must be above 0"),
        ("middle 1/0", "is not understood"),
        ("upper half", "'upper half' is not understood; write a list"),
        ("", "is not understood"),
    ],
)
def test_layers_that_are_not_there_are_told(layers, words):
    with pytest.raises(ValueError, match=words):
        choose_layers(12, layers)


def test_sites_of_some_layers(make_llama):
    model = make_llama(num_hidden_layers=4)
    layers = find_layers(model)
    for chosen, numbers in (([0, -1], [0, 3]), ("last 50%", [2, 3]), ("1-1", [1])):
        sites = find_sites(model, LoraConfig(target_modules="all-linear", layers=chosen))
        assert len(sites) == 7 * len(numbers)
        assert {path.rsplit(".", 2)[0] for path in sites} == {layers[number] for number in numbers}
    assert len(find_sites(model, LoraConfig(layers=[1]))) == 2
    with pytest.raises(ValueError, match="leaves none of the 1 linears"):
        find_sites(model, LoraConfig(target_modules=["layers.0.mlp.up_proj"], layers=[1]))


def test_layer_ten_is_not_layer_one(make_llama):
    """Paths share their beginning."""
    model = make_llama(num_hidden_layers=11, hidden_size=16, intermediate_size=16)
    assert len(find_sites(model, LoraConfig(layers=[1]))) == 2


def neox() -> GPTNeoXForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


def test_by_default_a_fused_projection_stands_for_its_parts():
    model = neox()
    assert last_names(find_sites(model, LoraConfig())) == {"query_key_value"}
    assert last_names(find_sites(model, IA3Config())) == {"query_key_value", "dense_4h_to_h"}


def test_ia3_trains_keys_and_values_of_a_fused_projection_alone():
    model = neox()
    path = "gpt_neox.layers.1.attention.query_key_value"
    queries = {part.path: part.features for part in find_parts(model, ["q"])}[path]
    trained = trained_features(model, path, IA3Config())
    assert trained.tolist() == sorted(set(range(96)) - set(queries.tolist()))
    AdapterBank(model).add("a", LoraConfig(rank=1))
    assert torch.equal(trained_features(model, path, IA3Config()), trained), "also once it is wrapped"


def test_everything_else_is_trained_whole(tiny_llama):
    model = neox()
    path = "gpt_neox.layers.1.attention.query_key_value"
    assert trained_features(model, path, IA3Config(target_modules=["query_key_value"])) is None, "as in PEFT"
    assert trained_features(model, path, LoraConfig()) is None
    assert trained_features(model, "gpt_neox.layers.1.mlp.dense_4h_to_h", IA3Config()) is None
    assert trained_features(tiny_llama, "model.layers.0.self_attn.k_proj", IA3Config()) is None
