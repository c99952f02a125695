"""Packed experts: each row's finetune on the experts its tokens are routed to; PEFT's ``target_parameters`` is the
oracle."""

import re
import warnings

import peft
import pytest
import torch

from mmpeft.adapters import AdapterBank, BottleneckConfig, FullConfig, HybridConfig, IA3Config, LoraConfig
from mmpeft.adapters.architecture import find_parts
from mmpeft.adapters.experts import find_experts
from mmpeft.adapters.merge import merge
from mmpeft.adapters.peft_format import load_adapter, save_adapter
from mmpeft.adapters.weight_change import weight_changes
from mmpeft.errors import RefusedError
from mmpeft.tools.tiny_models import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
FAMILIES = {
    "mixtral": "(experts, out, in)",
    "aria_text": "(experts, in, out), and a shared expert",
    "gpt_oss": "(experts, in, out), biases, gate and up interleaved",
    "nemotron_h": "without a gate, in blocks that are a mixture alone",
    "deepseek_v3": "behind a dense block, and a shared expert",
    "zaya": "with a choice that is no expert",
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
UP = {"nemotron_h": "experts.up_proj"}
each_family = pytest.mark.parametrize("family", FAMILIES)


def ids(rows=3):
    return torch.randint(5, 190, (rows, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(bank, names):
    bank.route(names)
    return bank.model(ids(len(names))).logits


def lora(family, rank=2):
    names = [UP.get(family, "experts.gate_up_proj"), "experts.down_proj"]
    return LoraConfig(rank, alpha=2 * rank, target_modules=["o_proj", *names])


@pytest.fixture
def bank(family, randomise):
    bank = AdapterBank(tiny_model(family))
    for name, config in (("lora", lora(family)), ("wide", lora(family, 3)), ("ia3", IA3Config())):
        bank.add(name, config)
        randomise(bank, name)
    return bank


@each_family
def test_each_row_has_its_own_experts_and_base_rows_the_models(family, bank):
    with torch.no_grad():
        base = tiny_model(family)(ids()).logits
    assert torch.equal(logits(bank, [None] * 3), base)
    mixed = logits(bank, ["lora", None, "ia3"])
    torch.testing.assert_close(mixed[1], base[1], **CLOSE)
    for row, name in ((0, "lora"), (2, "ia3")):
        assert (mixed[row] - base[row]).abs().max() > 1e-3
        torch.testing.assert_close(mixed[row], logits(bank, [name] * 3)[row], **CLOSE)


@each_family
@pytest.mark.parametrize("config", [LoraConfig, IA3Config])
def test_a_fresh_adapter_is_the_base(family, config):
    model = tiny_model(family)
    with torch.no_grad():
        base = model(ids()).logits
    bank = AdapterBank(model)
    bank.add("a", lora(family) if config is LoraConfig else config())
    torch.testing.assert_close(logits(bank, ["a"] * 3), base, **CLOSE)


@each_family
def test_lora_computes_what_pefts_does_and_files_go_both_ways(family, bank, tmp_path):
    save_adapter(bank, "wide", tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(bank, ["wide"] * 3), theirs(ids()).logits, **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(bank, "again", tmp_path / "theirs")
    assert torch.equal(logits(bank, ["again"]), logits(bank, ["wide"]))


@each_family
@pytest.mark.parametrize("rewritten", [False, True])
def test_ranks_and_alphas_of_some_experts_are_those_of_peft(family, rewritten, tmp_path):
    """Also where the file's other fields are rewritten as the paths of layers."""
    up = UP.get(family, "experts.gate_up_proj")
    blocks = sorted({path.rpartition(".experts.")[0] for path in find_experts(tiny_model(family))})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=3,
        target_modules=["o_proj"],
        target_parameters=[up, "experts.down_proj"],
        rank_pattern={re.escape(f"{blocks[-1]}.experts.down_proj"): 5, "o_proj": 1},
        alpha_pattern={up: 7, "o_proj": 5},
        exclude_modules=["nothing.o_proj"] if rewritten else None,
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_model(family), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    bank = AdapterBank(tiny_model(family))
    bank.add("wider", lora(family, 6))
    load_adapter(bank, "a", tmp_path)
    with torch.no_grad():
        want = theirs(ids()).logits
    got = logits(bank, ["a"] * 3)
    torch.testing.assert_close(got, want, **CLOSE)
    save_adapter(bank, "a", tmp_path / "ours", "tiny")
    back = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids()).logits, want, **CLOSE)
    merge(bank, "a")
    torch.testing.assert_close(logits(bank, [None] * 3), got, **CLOSE)


def test_an_update_of_a_router_is_refused_by_its_field(tmp_path):
    fields = {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj", "gate.weight"]}
    peft.get_peft_model(tiny_model("mixtral"), peft.LoraConfig(r=2, **fields)).save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match=r"target_parameters names 'gate\.weight'.*by merge_and_unload"):
        load_adapter(AdapterBank(tiny_model("mixtral")), "a", tmp_path)


@each_family
def test_ia3_scales_the_inner_activation_of_every_expert(family, randomise):
    """Which is what a base does whose down_proj has its input features scaled."""
    bank = AdapterBank(tiny_model(family))
    sites = bank.add("a", IA3Config()).sites
    randomise(bank, "a")
    changed = {path for path in sites if path.endswith("experts.down_proj")}
    assert changed
    assert {part.path for part in find_parts(bank.model, ["down"])} <= set(sites)
    merged = AdapterBank(tiny_model(family))
    merged.add("a", IA3Config())
    merged.fill("a", bank.tensors("a"))
    merge(merged, "a")
    torch.testing.assert_close(logits(merged, [None] * 3), logits(bank, ["a"] * 3), **CLOSE)


@each_family
def test_merging_lora_and_the_weights_it_moves(family, bank):
    adapted = logits(bank, ["lora"] * 3)
    changes = weight_changes(bank, "lora")
    assert all(change > 0 for change in changes.values())
    before = {name: p.clone() for name, p in bank.model.named_parameters() if name in changes}
    assert before
    merge(bank, "lora")
    torch.testing.assert_close(logits(bank, [None] * 3), adapted, **CLOSE)
    for name, weight in before.items():
        moved = (bank.model.get_parameter(name) - weight).norm() / weight.norm()
        torch.testing.assert_close(float(moved), changes[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["mixtral"])
def test_gradients_reach_every_expert_in_use_of_the_rows_own_slot_alone(family, bank):
    bank.route(["lora", None, "lora"])
    bank.model(ids()).logits.logsumexp(-1).sum().backward()
    stacks = [place.stack for place in bank.places("lora") if place.path.endswith("gate_up_proj")]
    for stack in stacks:
        grad = stack.lora_B.grad.flatten(1).abs().sum(1)
        assert grad[0] > 0
        assert grad[1] == 0


@pytest.mark.parametrize("family", ["mixtral"])
def test_nan_in_another_slot_reaches_no_other_row(family, bank):
    """Of equal routing, as each row's tokens are."""
    before = logits(bank, ["lora", None, "wide"])
    for place in bank.places("wide"):
        for tensor in place.stack.parameters():
            tensor.data[place.slot] = torch.nan
    after = logits(bank, ["lora", None, "wide"])
    torch.testing.assert_close(after[:2], before[:2], **CLOSE)
    assert after[2].isnan().any()


def test_ia3_files_with_experts_are_no_pefts(tmp_path, randomise):
    """PEFT would drop the experts' vectors with a warning."""
    bank = AdapterBank(tiny_model("mixtral"))
    bank.add("a", IA3Config())
    randomise(bank, "a")
    save_adapter(bank, "a", tmp_path, "tiny")
    assert '"MMPEFT_IA3"' in (tmp_path / "adapter_config.json").read_text()
    load_adapter(bank, "again", tmp_path)
    assert torch.equal(logits(bank, ["again"]), logits(bank, ["a"]))


def test_a_hybrid_scales_and_adds(randomise):
    bank = AdapterBank(tiny_model("mixtral"))
    bank.add("a", HybridConfig([IA3Config(), lora("mixtral")]))
    randomise(bank, "a")
    adapted = logits(bank, ["a"] * 3)
    merge(bank, "a")
    torch.testing.assert_close(logits(bank, [None] * 3), adapted, **CLOSE)


def test_all_linear_says_what_it_leaves_out():
    bank = AdapterBank(tiny_model("mixtral"))
    count = sum(p.numel() for n, p in bank.model.named_parameters() if ".experts." in n)
    with pytest.warns(UserWarning, match=f"leaves out {count:,} of .* parameters.*experts.down_proj"):
        bank.add("a", LoraConfig(1, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdapterBank(tiny_model("llama")).add("a", LoraConfig(1, target_modules="all-linear"))


def test_down_proj_alone_means_linears():
    bank = AdapterBank(tiny_model("deepseek_v3"))
    sites = bank.add("a", LoraConfig(1, target_modules=["down_proj"])).sites
    assert not any("experts.down_proj" in path.replace("shared_experts", "") for path in sites)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("mixtral", FullConfig(), "in one tensor, which full cannot change"),
        ("mixtral", LoraConfig(dropout=0.1, target_modules=["experts.down_proj"]), "without dropout"),
        ("mixtral", IA3Config(["experts.gate_up_proj"], []), "whose outputs IA3 does not scale"),
        ("mixtral", BottleneckConfig(target_modules=["experts.down_proj"]), "which bottleneck cannot change"),
        ("longcat_flash", IA3Config(), "LongcatFlash.* known to be down"),
        ("llama4_text", IA3Config(), "experts in feed_forward.experts is not known"),
    ],
)
def test_what_experts_cannot_take_is_refused_when_it_is_added(family, config, words):
    with pytest.raises(RefusedError, match=words):
        AdapterBank(tiny_model(family)).add("a", config)


def test_an_expert_of_a_list_is_refused_when_it_is_added():
    """It gets some tokens of a batch, and nobody could tell whose."""
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.experts = torch.nn.ModuleList([torch.nn.Linear(64, 64)])
    with pytest.raises(RefusedError, match=r"experts.0 of LlamaForCausalLM is one of a list of experts"):
        AdapterBank(model).add("a", LoraConfig(target_modules="all-linear"))
