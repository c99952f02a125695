"""Names, slots and routing."""

import pytest
import torch

from mmpeft.adapters import AdapterBank, IA3Config, LoraConfig

EVERYWHERE = LoraConfig(rank=4, target_modules="all-linear")


def snapshot(bank, names):
    """Copies of every tensor of the named adapters."""
    return {f"{name} {key}": t.clone() for name in names for key, t in bank.tensors(name).items()}


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", ".hidden", "a b", "a\n", "a\0", "ä", "x" * 65, "x" * 10_000, None, 3]
)
def test_names_that_cannot_be_a_folder_are_refused(make_llama, name):
    bank = AdapterBank(make_llama())
    with pytest.raises(ValueError, match=r"adapter name .*: use 1 to 64 of"):
        bank.add(name, LoraConfig())
    assert bank.names == []


def test_a_name_is_taken_once(make_bank):
    bank = make_bank({"a": LoraConfig()})
    before = snapshot(bank, ["a"])
    with pytest.raises(ValueError, match="already has an adapter 'a'"):
        bank.add("a", IA3Config())
    assert all(torch.equal(t, before[key]) for key, t in snapshot(bank, ["a"]).items())


@pytest.mark.parametrize("call", ["route", "remove", "entry", "tensors"])
def test_an_unknown_name_is_a_key_error_that_lists_the_known(make_bank, call):
    """Never served by the base or by another adapter."""
    bank = make_bank({"first": LoraConfig(), "second": IA3Config()})
    with pytest.raises(KeyError, match="no finetune 'frist'; there are: first, second"):
        getattr(bank, call)(["first", "frist"] if call == "route" else "frist")


def test_a_failed_route_leaves_the_last_one_standing(make_bank):
    bank = make_bank({"a": LoraConfig()})
    bank.route(["a", None])
    with pytest.raises(KeyError):
        bank.route(["a", "b"])
    assert bank.routing.slots["lora"].tolist() == [0, -1]


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["q_prj"]), IA3Config(["k_proj", "nothing"])])
def test_an_add_that_fails_changes_nothing(make_llama, config):
    bank = AdapterBank(make_llama())
    with pytest.raises(ValueError, match="matched no linear"):
        bank.add("a", config)
    assert (bank.names, bank.layers) == ([], {})


def test_adding_removing_and_replacing_leave_the_bits_of_the_others(make_bank, randomise, logits_of, tokens):
    """Growth of rank, slots and sites included."""
    bank, ids = make_bank(), tokens(3)
    kept = ["small", "outputs"]
    before, logits = snapshot(bank, kept), logits_of(bank, [*kept, None], ids)

    def check():
        assert all(torch.equal(t, before[key]) for key, t in snapshot(bank, kept).items())
        torch.testing.assert_close(logits_of(bank, [*kept, None], ids), logits, rtol=1e-5, atol=2e-6)
        assert torch.equal(logits_of(bank, [*kept, None], ids)[2], logits[2]), "the base row moved"

    for change in (
        lambda: bank.add("wider", LoraConfig(rank=16, target_modules="all-linear")),
        lambda: randomise(bank, "wider"),
        lambda: bank.remove("large"),
        lambda: bank.remove("tfew"),
        lambda: bank.add("large", EVERYWHERE),
        lambda: bank.add("another", IA3Config()),
        lambda: randomise(bank, "another"),
    ):
        change()
        check()


def test_a_removed_slot_is_the_base_and_the_next_to_be_taken(make_bank, logits_of, tokens):
    bank, ids = make_bank(), tokens(2)
    (part,) = bank.entry("small").parts
    slot = part.slot
    bank.route(["small", "large"])
    bank.remove("small")
    with torch.no_grad():
        stale = bank.model(ids).logits
    assert torch.equal(stale[0], logits_of(bank, [None, "large"], ids)[0])
    assert bank.add("next", LoraConfig()).parts[0].slot == slot


def test_slots_count_per_method(make_bank):
    bank = make_bank()
    slots = {n: {p.config.method: p.slot for p in bank.entry(n).parts} for n in bank.names}
    assert [slots[name] for name in ("small", "large", "tfew", "outputs", "bias", "last")] == [
        {"lora": 0},
        {"lora": 1},
        {"ia3": 0},
        {"ia3": 1},
        {"bitfit": 0},
        {"ia3": 2, "lora": 2, "bitfit": 1},
    ]
    bank.route(["large", None, "tfew", "last"])
    routed = {method: slots.tolist() for method, slots in bank.routing.slots.items()}
    assert routed["lora"] == [1, -1, -1, 2]
    assert routed["ia3"] == [-1, -1, 0, 2]
    assert routed["full"] == [-1] * 4


@pytest.mark.parametrize("config", [LoraConfig(rank=4), EVERYWHERE])
def test_the_start_depends_on_seed_and_config_alone(make_bank, config):
    """Not on the slot, the rank of the stack, or torch's global generator; so runs can be repeated."""
    alone = make_bank({"a": config}, fill=False).tensors("a")
    torch.manual_seed(1234)
    crowded = make_bank()
    crowded.add("a", config)
    assert all(torch.equal(t, alone[key]) for key, t in crowded.tensors("a").items())
    crowded.add("b", config, seed=1)
    assert not any(
        torch.equal(t, alone[key]) for key, t in crowded.tensors("b").items() if key.endswith("lora_A.weight")
    )


def test_adding_does_not_draw_from_the_global_generator(make_llama):
    state = torch.get_rng_state()
    AdapterBank(make_llama()).add("a", EVERYWHERE)
    assert torch.equal(torch.get_rng_state(), state)


def test_reserved_slots_are_filled_without_new_parameters(make_bank):
    """Optimisers and compiled graphs hold the Parameters: within a reserve, add and remove are copies."""
    bank = make_bank({"a": EVERYWHERE, "b": IA3Config()}, reserve={"lora": (3, 16), "ia3": (3, 0)})
    before = list(bank.parameters())
    bank.add("c", LoraConfig(rank=16))
    bank.add("d", IA3Config(["k_proj"]))
    bank.remove("a")
    bank.add("e", EVERYWHERE)
    after = list(bank.parameters())
    assert len(after) == len(before)
    assert all(new is old for new, old in zip(after, before, strict=True))


def test_parameters_are_the_adapters_alone_and_all_of_them(make_bank):
    bank = make_bank()
    trainable = {id(p) for p in (*bank.parameters(), *bank.model.parameters()) if p.requires_grad}
    assert {id(p) for p in bank.parameters()} == trainable
    assert len(list(bank.parameters())) == len(trainable)


def test_adapters_stay_fp32_on_a_bf16_base(make_llama, make_bank, logits_of, tokens):
    """Masters: a bf16 weight would swallow small steps. The activations keep the base's dtype."""
    bank = make_bank(model=make_llama().bfloat16())
    assert {p.dtype for p in bank.parameters()} == {torch.float32}
    assert logits_of(bank, ["small", "tfew"], tokens(2)).dtype == torch.bfloat16


def test_a_bank_where_adapters_come_and_go_grows_by_doubling(make_llama, make_bank):
    """Each growth copies all stacks: of 33 additions six, not 33; what was there keeps its bits."""
    bank = make_bank({"first": IA3Config()})
    bank.doubling = True
    before, sizes = snapshot(bank, ["first"]), set()
    for number in range(32):
        bank.add(f"more{number}", IA3Config())
        sizes.add(len(next(iter(bank.stacks.values())).active))
    assert sorted(sizes) == [2, 4, 8, 16, 32, 64]
    assert all(torch.equal(t, before[key]) for key, t in snapshot(bank, ["first"]).items())
    for number in range(32):
        bank.remove(f"more{number}")
    bank.add("again", IA3Config())
    assert len(next(iter(bank.stacks.values())).active) == 64
