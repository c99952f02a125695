"""Combinations of finetunes against PEFT's `add_weighted_adapter`, and against the slow formula where PEFT has none."""

import peft
import pytest
import torch
from peft.tuners.lora import model as peft_lora

from mmpeft.adapters import IA3Config, LoraConfig
from mmpeft.adapters.combine import (
    IA3_METHODS,
    LORA_METHODS,
    closest_of_rank,
    combine,
    combine_ia3,
    combine_lora,
    federated_average,
)
from mmpeft.adapters.peft_format import load_adapter, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SITE = "block.k_proj"
FINETUNES = {
    "one": LoraConfig(rank=4, alpha=6, target_modules=["q_proj", "v_proj"], rslora=True),
    "two": LoraConfig(rank=4, alpha=16, target_modules=["v_proj", "down_proj"]),
    "three": LoraConfig(rank=4, alpha=4, target_modules=["q_proj", "v_proj", "down_proj"]),
}
WEIGHTS = [0.7, -0.4, 1.2]
VECTORS = [torch.tensor([[0.5], [2.0], [1.0], [1.4]]), torch.tensor([[2.0], [2.0], [0.9], [1.0]])]


@pytest.fixture
def lora_states():
    """(states, scalings) of three random LoRAs of ranks 2, 3 and 4 on one linear of 7 inputs and 6 outputs."""
    generator = torch.Generator().manual_seed(3)
    states = [
        {
            f"{SITE}.lora_A.weight": torch.randn(rank, 7, generator=generator),
            f"{SITE}.lora_B.weight": torch.randn(6, rank, generator=generator),
        }
        for rank in (2, 3, 4)
    ]
    return states, [0.5, 2.0, 1.5]


def product(state):
    return state[f"{SITE}.lora_B.weight"] @ state[f"{SITE}.lora_A.weight"]


def ia3_states(*vectors):
    return [{f"{SITE}.ia3_l": vector} for vector in vectors]


def updates(model, name):
    """Path -> ``c B A`` of a PEFT adapter."""
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight(name)
        for path, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and name in layer.lora_A
    }


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("method", LORA_METHODS)
@pytest.mark.filterwarnings("ignore:The density")
def test_lora_is_pefts_weighted_adapter(make_llama, make_bank, tmp_path, monkeypatch, method, density):
    """Overlapping but unequal targets, unequal scalings, a negative weight. Random pruning included: drawn
    from the same seed in the same order, once PEFT's own initialisation is out of the way."""
    bank = make_bank(FINETUNES)
    # "three" names every linear, in the model's order, in which PEFT draws. And the first must not be rsLoRA:
    # PEFT 0.21 copies its config, and the factors that were made for scaling 1 then get sqrt(rank).
    order = ["three", "one", "two"]
    weights = dict(zip(FINETUNES, WEIGHTS, strict=True))
    model = None
    for name in order:
        save_adapter(bank, name, tmp_path / name, "tiny")
        if model is None:
            model = peft.PeftModel.from_pretrained(make_llama(), tmp_path / name, adapter_name=name)
        else:
            model.load_adapter(tmp_path / name, adapter_name=name)
    monkeypatch.setattr(peft_lora, "_freeze_adapter", lambda *_: torch.manual_seed(5))
    model.add_weighted_adapter(order, [weights[n] for n in order], "new", method, density=density)
    combine(bank, order, "new", method, [weights[n] for n in order], density, seed=5)
    want, got = updates(model, "new"), bank.tensors("new")
    assert sorted(want) == sorted(bank.entry("new").sites)
    for path, update in want.items():
        ours = bank.entry("new").config.scaling * got[f"{path}.lora_B.weight"] @ got[f"{path}.lora_A.weight"]
        largest = update.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(
            ours, update, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, path=path: f"{path}: {text}"
        )


def test_cat_is_the_exact_sum(lora_states):
    states, scalings = lora_states
    combined = combine_lora(states, scalings, "cat", WEIGHTS)
    want = sum(w * c * product(state) for w, c, state in zip(WEIGHTS, scalings, states, strict=True))
    torch.testing.assert_close(product(combined), want, **CLOSE)
    assert combined[f"{SITE}.lora_A.weight"].shape == (9, 7)


@pytest.mark.parametrize("rank", [1, 3, 6, 8])
def test_svd_is_the_closest_of_its_rank(lora_states, rank):
    """Eckart and Young: the error is what the left-out singular values say."""
    states, scalings = lora_states
    combined = combine_lora(states, scalings, "svd", WEIGHTS, rank=rank)
    exact = product(combine_lora(states, scalings, "cat", WEIGHTS))
    left_out = torch.linalg.svdvals(exact)[rank:]
    error = (product(combined) - exact).square().sum()
    torch.testing.assert_close(error, left_out.square().sum(), rtol=1e-4, atol=1e-8)
    assert combined[f"{SITE}.lora_A.weight"].shape == (rank, 7)
    assert combined[f"{SITE}.lora_B.weight"].shape == (6, rank)


def test_the_closest_factors_have_orthonormal_rows():
    A, B = torch.randn(5, 9), torch.randn(8, 5)
    new_A, new_B = closest_of_rank(A, B, 5)
    torch.testing.assert_close(new_B @ new_A, B @ A, **CLOSE)
    torch.testing.assert_close(new_A @ new_A.T, torch.eye(5), **CLOSE)


def test_weights_are_equal_shares_by_default(lora_states):
    states, scalings = lora_states
    default = combine_lora(states, scalings, "cat")
    assert torch.equal(product(default), product(combine_lora(states, scalings, "cat", [1 / 3] * 3)))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_random_pruning_follows_its_seed(lora_states, method):
    states, scalings = [lora_states[0][1]] * 2, [1.0, 1.0]
    first, again, other = (combine_lora(states, scalings, method, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(9)
    assert torch.equal(product(first), product(again))
    assert not torch.equal(product(first), product(other))


def test_random_pruning_keeps_the_mean():
    state = ia3_states(torch.full((20_000, 1), 1.5))
    combined = combine_ia3(state, "dare_linear", density=0.2)[f"{SITE}.ia3_l"]
    assert set(combined.flatten().tolist()) == {1.0, 3.5}
    assert combined.mean() == pytest.approx(1.5, abs=0.03)


def test_ia3_is_weighted_around_one():
    """PEFT's sum of l is the same where the weights sum to one; elsewhere it shrinks the activations."""
    linear = combine_ia3(ia3_states(*VECTORS), "linear", [0.25, 0.75])[f"{SITE}.ia3_l"]
    torch.testing.assert_close(linear, 0.25 * VECTORS[0] + 0.75 * VECTORS[1])
    halved = combine_ia3(ia3_states(*VECTORS), "linear", [0.1, 0.1])[f"{SITE}.ia3_l"]
    torch.testing.assert_close(halved, 1 + 0.1 * (VECTORS[0] - 1) + 0.1 * (VECTORS[1] - 1))


def test_ia3_in_the_log_is_the_weighted_geometric_mean():
    got = combine_ia3(ia3_states(*VECTORS), "log")[f"{SITE}.ia3_l"]
    torch.testing.assert_close(got, (VECTORS[0] * VECTORS[1]).sqrt())
    assert got[0] == pytest.approx(1.0), "halving and doubling cancel"
    weighted = combine_ia3(ia3_states(*VECTORS), "log", [2.0, -1.0])[f"{SITE}.ia3_l"]
    torch.testing.assert_close(weighted, VECTORS[0] ** 2 / VECTORS[1])


def test_ia3_by_ties_averages_those_that_agree():
    """Deltas (-.5, 1, 0, .4) and (1, 1, -.1, 0) with all kept: signs +, +, -, +."""
    got = combine_ia3(ia3_states(*VECTORS), "ties", [1.0, 1.0], density=1.0)[f"{SITE}.ia3_l"]
    torch.testing.assert_close(got.flatten(), torch.tensor([2.0, 2.0, 0.9, 1.4]))


@pytest.mark.parametrize("method", IA3_METHODS)
def test_ia3_in_a_bank(make_bank, logits_of, tokens, method):
    """A linear that one finetune leaves alone counts as unchanged by it."""
    configs = {"a": IA3Config(["k_proj", "down_proj"]), "b": IA3Config(["v_proj", "down_proj"])}
    bank = make_bank(configs)
    for name in configs:  # log wants positive vectors
        for _, stack, slot in bank.places(name):
            stack.fill(slot, {"ia3_l": stack.tensors(slot)["ia3_l"].abs() + 0.1})
    entry = combine(bank, ["a", "b"], "new", method, [0.5, 0.7], seed=1)
    assert sorted({path.rsplit(".", 1)[1] for path in entry.sites}) == ["down_proj", "k_proj", "v_proj"]
    want = combine_ia3([bank.tensors("a"), bank.tensors("b")], method, [0.5, 0.7], seed=1)
    got = bank.tensors("new")
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].shape == want[key].shape, "the side that is scaled"
        torch.testing.assert_close(got[key], want[key])
    logits = logits_of(bank, ["new", "a", None], tokens(1).expand(3, -1))
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_a_combination_is_a_finetune_like_any(make_bank, logits_of, tokens, tmp_path):
    """It serves, and goes to PEFT's files and back."""
    bank = make_bank({"a": LoraConfig(rank=2, alpha=3), "b": LoraConfig(rank=8, alpha=16)})
    combine(bank, ["a", "b"], "sum", "cat", [1.0, 1.0])
    config = bank.entry("sum").config
    assert (config.rank, config.scaling) == (10, 1.0)
    save_adapter(bank, "sum", tmp_path, "tiny")
    load_adapter(bank, "again", tmp_path)
    logits = logits_of(bank, ["sum", "again"], tokens(1).expand(2, -1))
    assert torch.equal(logits[0], logits[1])


def test_one_round_of_federated_averaging_is_the_weighted_mean(make_bank):
    """N clients from one start, each trained elsewhere (here: random), averaged by their examples."""
    clients = [make_bank({f"client{n}": LoraConfig(rank=4)}) for n in range(3)]
    states = [bank.tensors(f"client{n}") for n, bank in enumerate(clients)]
    average = federated_average(states, [100, 300, 600])
    assert average.keys() == states[0].keys()
    for key, tensor in average.items():
        a, b, c = (state[key].double() for state in states)
        torch.testing.assert_close(tensor.double(), 0.1 * a + 0.3 * b + 0.6 * c, rtol=1e-6, atol=1e-7)
    same = federated_average(states[:1] * 3, [1, 2, 3])
    assert all(torch.allclose(same[key], states[0][key]) for key in same), "equal clients stay as they are"
    alone = federated_average(states, [0, 5, 0])
    assert all(torch.equal(alone[key], states[1][key]) for key in alone)


def test_averaging_factors_is_not_averaging_updates(lora_states):
    """What the docstring warns of, and the exact alternative it offers; with a shared A the two agree."""
    state = lora_states[0][2]
    other = {
        key: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for key, t in state.items()
    }
    mean = (product(state) + 3 * product(other)) / 4
    assert (product(federated_average([state, other], [1, 3])) - mean).abs().max() > 0.1
    exact = combine_lora([state, other], [1.0, 1.0], "cat", [1 / 4, 3 / 4])
    torch.testing.assert_close(product(exact), mean, **CLOSE)
    shared = other | {f"{SITE}.lora_A.weight": state[f"{SITE}.lora_A.weight"]}
    torch.testing.assert_close(
        product(federated_average([state, shared], [1, 3])),
        (product(state) + 3 * product(shared)) / 4,
        **CLOSE,
    )


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["small", "tfew"], {}, r"they are \['ia3', 'lora'\]; all must be of one method"),
        (["small", "large"], {}, r"sums tensors of equal ranks, got ranks \[2, 8\]; use cat or svd"),
        (["small", "large"], {"method": "mean"}, r"method is 'mean'; .* linear, magnitude_prune, ties"),
        (["small"], {"method": "log"}, "method is 'log'"),
        (["tfew"], {"method": "cat"}, "method is 'cat'"),
        (["small"], {"density": 0}, r"density is 0; .* in \(0, 1\]"),
        (["small"], {"density": 1.5}, "density is 1.5"),
        (["small"], {"weights": [1, 2]}, "got 2 weights for 1 finetunes"),
        (["small"], {"method": "cat", "rank": 3}, "rank is 3, but cat has no choice of rank"),
        (["small"], {"method": "svd", "rank": 0}, "rank is 0"),
        (["tfew", "outputs"], {}, "some of the finetunes scale its input and some its output"),
        (["tfew"], {"method": "log"}, "have no logarithm; use linear"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(make_bank, names, options, message):
    bank = make_bank()
    _, stack, slot = next(bank.places("tfew"))
    stack.fill(slot, {"ia3_l": -stack.tensors(slot)["ia3_l"].abs()})
    if "outputs" in names:  # the same linear, at its other side
        bank.remove("outputs")
        bank.add("outputs", IA3Config(["down_proj"], []))
    before = bank.names
    with pytest.raises(ValueError, match=message):
        combine(bank, names, "new", **options)
    assert bank.names == before


def test_a_diverged_finetune_is_refused(make_bank, poison):
    bank = make_bank()
    poison(bank, "large")
    with pytest.raises(
        ValueError, match=r"diverged: 28 tensors hold NaN or infinity, such as model.layers.0"
    ):
        combine(bank, ["small", "large"], "new", "cat")


def test_no_finetunes_and_taken_names_are_refused(make_bank):
    bank = make_bank()
    with pytest.raises(ValueError, match="cannot combine"):
        combine(bank, [], "new")
    with pytest.raises(ValueError, match="no finetunes to combine"):
        combine_lora([], [], "cat")
    with pytest.raises(KeyError, match="no finetune 'other'"):
        combine(bank, ["other"], "new")
    with pytest.raises(ValueError, match="already has an adapter 'large'"):
        combine(bank, ["small"], "large")


@pytest.mark.parametrize("counts", [[1], [1, -1], [0, 0], [1, 2, 3]])
def test_impossible_counts_are_refused(lora_states, counts):
    with pytest.raises(ValueError, match="wanted 2 counts, not all zero"):
        federated_average([lora_states[0][0]] * 2, counts)


def test_clients_of_different_configs_are_refused(lora_states):
    with pytest.raises(ValueError, match=r"client 1 differs from client 0 in block.k_proj.lora_A.weight"):
        federated_average(lora_states[0][:2], [1, 1])


def test_ranks_by_pattern_have_no_combination(make_bank):
    """Their scaling is no longer one number a finetune."""
    bank = make_bank({"a": LoraConfig(rank=2), "b": LoraConfig(rank=2, alpha_pattern={"q_proj": 3})})
    with pytest.raises(ValueError, match=r"b has ranks or scalings of its own .*alpha_pattern"):
        combine(bank, ["a", "b"], "c")
