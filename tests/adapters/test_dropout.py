"""A finetune's dropout is its own: neither neighbours nor padding nor recomputation change what it drops."""

import pytest
import torch

from mmpeft.adapters import DoraConfig, HybridConfig, LoraConfig
from mmpeft.adapters.methods.lora import LoraStack
from mmpeft.adapters.routing import Routing, Stream
from tests.conftest import stack_at

CONFIGS = {
    "half": LoraConfig(rank=4, dropout=0.5),
    "third": LoraConfig(rank=2, dropout=0.3, target_modules="all-linear"),
    "dora": DoraConfig(rank=4, dropout=0.3),
    "plain": LoraConfig(rank=4, target_modules=["q_proj", "o_proj"]),
}
NAMES = ["third", "half", None, "dora", "plain", "half", "third", "dora"]
SEEDS = {"half": 1, "third": 2, "dora": 3, "plain": 4}
LENGTHS = [9, 5, 9, 7, 8, 9, 6, 3]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tokens_of(lengths, width):
    """(rows, width) bool: the first of every row."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def logits_of(bank, names, ids, lengths, seeds=SEEDS):
    bank.route(names)
    bank.routing.seed_dropout(seeds, tokens_of(lengths, ids.shape[1]))
    return bank.model(ids, use_cache=False).logits


def make_routing(x, names, seeds, lengths=None):
    """A routing of finetunes of one method, slot after slot as they are named in ``seeds``."""
    slots = {name: slot for slot, name in enumerate(seeds)}
    routing = Routing(names=names, owned=[{"lora": slots[name]} for name in names])
    routing.seed_dropout(seeds, tokens_of(lengths or [x.shape[1]] * len(x), x.shape[1]))
    return routing


@pytest.mark.parametrize("name", CONFIGS)
def test_neighbours_change_no_bit_of_what_a_finetune_drops(make_bank, tokens, gradients_of, name):
    """At equal shapes: the other rows run as base rows, and its seed is the only one."""
    bank, ids, own = make_bank(CONFIGS), tokens(len(NAMES)), [each == name for each in NAMES]
    bank.train()
    found = []
    for names, seeds in ((NAMES, SEEDS), ([name if mine else None for mine in own], {name: SEEDS[name]})):
        bank.zero_grad()
        logits = logits_of(bank, names, ids, LENGTHS, seeds)[own]
        logits.square().sum().backward()
        found.append({"logits": logits.detach()} | gradients_of(bank, name))
    joint, alone = found
    for key, want in alone.items():
        assert torch.equal(joint[key], want), key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_finetune_in_a_batch_of_its_own_drops_the_same(make_bank, tokens, name):
    """Rows of its own alone, which are padded otherwise, in a bank without the others and under another name."""
    bank, ids, own = make_bank(CONFIGS), tokens(len(NAMES)), [each == name for each in NAMES]
    together = logits_of(bank.train(), NAMES, ids, LENGTHS)[own]
    lengths = [length for length, mine in zip(LENGTHS, own, strict=True) if mine]
    other = make_bank({"other": CONFIGS[name]}, fill=False)
    other.fill("other", bank.tensors(name))
    rows = ids[own][:, : max(lengths)]
    alone = logits_of(other.train(), ["other"] * len(rows), rows, lengths, {"other": SEEDS[name]})
    for row, length in enumerate(lengths):
        torch.testing.assert_close(alone[row, :length], together[row, :length], **CLOSE)


@pytest.mark.parametrize("name", ["half", "third", "dora"])
def test_rows_drop_the_same_wherever_the_others_of_their_batch_are(make_bank, tokens, name):
    """As where two processes have some of them each."""
    bank, ids, lengths = make_bank(CONFIGS).train(), tokens(5), [9, 4, 7, 9, 6]
    whole = logits_of(bank, [name] * 5, ids, lengths, {name: 8})
    for numbers in ([0, 3], [1, 2, 4]):
        bank.route([name] * len(numbers))
        seen = tokens_of([lengths[number] for number in numbers], ids.shape[1])
        bank.routing.seed_dropout({name: 8}, seen, numbers=torch.tensor(numbers))
        part = bank.model(ids[numbers], use_cache=False).logits
        for row, number in enumerate(numbers):
            own = slice(lengths[number])
            torch.testing.assert_close(part[row, own], whole[number, own], **CLOSE)


def test_a_finetune_without_dropout_keeps_its_bits(make_bank, tokens):
    bank, ids, own = make_bank(CONFIGS), tokens(len(NAMES)), [each in ("plain", None) for each in NAMES]
    want = logits_of(bank, NAMES, ids, LENGTHS)
    got = logits_of(bank.train(), NAMES, ids, LENGTHS)
    for row, untouched in enumerate(own):
        assert torch.equal(got[row], want[row]) == untouched


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_drops_the_same_and_the_global_generator_is_left_alone(
    make_bank, tokens, gradients_of, use_reentrant
):
    """With a generator that anything may have moved on before the backward."""
    ids, found = tokens(len(NAMES)), []
    for checkpointing in (False, True):
        bank = make_bank(CONFIGS).train()
        if checkpointing:
            settings = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
            bank.model.activation_checkpointing_enable(settings)
            bank.model.get_input_embeddings().register_forward_hook(lambda *a: a[-1].requires_grad_())
        before = torch.get_rng_state()
        logits_of(bank, NAMES, ids, LENGTHS).square().sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        found.append({f"{name} {key}": g for name in CONFIGS for key, g in gradients_of(bank, name).items()})
    for key, want in found[0].items():
        assert torch.equal(found[1][key], want), key


def test_another_batch_drops_others_and_the_same_batch_the_same(make_bank, tokens):
    bank, ids = make_bank(CONFIGS).train(), tokens(len(NAMES))
    first, again = (logits_of(bank, NAMES, ids, LENGTHS) for _ in range(2))
    other = logits_of(bank, NAMES, ids, LENGTHS, SEEDS | {"half": 5})
    for row, name in enumerate(NAMES):
        assert torch.equal(again[row], first[row])
        assert torch.equal(other[row], first[row]) == (name != "half")


def test_masks_have_their_rate_and_no_two_are_related():
    """Two masks of unrelated features agree to drop as often as chance has it: of steps, layers, methods, finetunes,
    neighbouring tokens and features."""
    rate, x = 0.3, torch.zeros(2, 200, 256)
    spread = 5 * (rate**2 / x[0].numel()) ** 0.5

    def dropped(seed, method="lora", place="layers.0.q_proj"):
        routing = make_routing(x, ["a", "b"], {"a": seed, "b": seed + 1})
        return ~routing.kept(x, "lora", {0: rate, 1: rate}, f"{method} {place}")

    one = dropped(1)
    others = [dropped(5), dropped(1, method="dora"), dropped(1, place="layers.1.q_proj"), one.flip(0)]
    others += [one.roll(1, dims) for dims in (1, 2)]
    for row in one:
        assert abs(row.float().mean() - rate) < spread
    for other in others:
        assert abs((one & other).float().mean() - rate**2) < spread
    assert torch.equal(dropped(1), one)
    assert torch.equal(dropped(2)[0], one[1]), "equal seeds of equal data: names and slots have no part in it"


def test_no_layer_and_no_method_shares_its_numbers_with_another(make_bank, tokens, monkeypatch):
    places, uniform = [], Stream.uniform
    monkeypatch.setattr(Stream, "uniform", lambda *args: (places.append(args[2]), uniform(*args))[1])
    same = {"dropout": 0.3, "target_modules": "all-linear"}
    bank = make_bank({"both": HybridConfig([LoraConfig(**same), DoraConfig(**same)])}).train()
    logits_of(bank, ["both"], tokens(1), [9], {"both": 1})
    assert len(places) == len(set(places)) == 2 * 2 * 7, "methods, layers, linears"


def test_padding_is_never_dropped_and_the_mean_is_kept():
    stack = LoraStack(64, 8, num_slots=1, rank=4)
    stack.open(0, LoraConfig(rank=4, dropout=0.25), torch.Generator().manual_seed(0))
    stack.fill(0, {key: torch.ones_like(t) for key, t in stack.tensors(0).items()})
    x, slots, length = torch.ones(2, 4000, 64), torch.zeros(2, dtype=torch.int64), 3000
    stack.routing = make_routing(x, ["a"] * 2, {"a": 0}, [length] * 2)
    mask = stack.routing.kept(x, "lora", {0: 0.25}, "here")
    assert mask[:, length:].all()
    assert not mask[:, :length].all()
    nothing = torch.zeros(2, 4000, 8)
    trained = stack.on_output(x, nothing, slots, uniform=False)[:, :length]
    evaluated = stack.eval().on_output(x, nothing, slots, uniform=False)[:, :length]
    assert trained.std() > 0
    torch.testing.assert_close(trained.mean(), evaluated.mean(), rtol=0.01, atol=0)


def test_routing_anew_leaves_dropout_to_the_global_generator(make_bank, tokens):
    bank, ids, found = make_bank(CONFIGS).train(), tokens(len(NAMES)), []
    logits_of(bank, NAMES, ids, LENGTHS)
    bank.route(NAMES)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(bank.model(ids).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_removed_finetune_leaves_its_rate_behind_for_nobody(make_bank, randomise, tokens):
    bank, ids = make_bank({"old": LoraConfig(rank=4, dropout=0.5), "half": CONFIGS["half"]}), tokens(2)
    bank.remove("old")
    bank.add("plain", LoraConfig(rank=4))
    randomise(bank, "plain")
    assert stack_at(bank, "plain", bank.entry("plain").sites[0]).has_dropout
    want = logits_of(bank, ["plain", None], ids, [9, 9])
    assert torch.equal(logits_of(bank.train(), ["plain", None], ids, [9, 9]), want)


def test_a_finetune_without_seed_and_another_number_of_tokens_are_refused(make_bank, tokens):
    bank, ids = make_bank(CONFIGS).train(), tokens(len(NAMES))
    with pytest.raises(ValueError, match=r"rows of \['half', 'plain'\] are in the batch"):
        logits_of(bank, NAMES, ids, LENGTHS, {"third": 0, "dora": 1})
    bank.route(NAMES)
    bank.routing.seed_dropout(SEEDS, tokens_of(LENGTHS, 10))
    with pytest.raises(ValueError, match=r"seeded for \(rows, tokens\) \(8, 10\).*\(8, 9, 64\)"):
        bank.model(ids)
