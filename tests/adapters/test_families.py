"""Every method by its default places on every family of models; PEFT reads the files and computes the same."""

import peft
import pytest
import torch

from mmpeft.adapters import (
    AdapterBank,
    BitFitConfig,
    BottleneckConfig,
    DoraConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
)
from mmpeft.adapters.architecture import find_parts
from mmpeft.adapters.peft_format import load_adapter, save_adapter
from tests.adapters.test_architecture_roles import FAMILIES, build
from tests.adapters.toy_method import ToyConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Random models of large weights: logits go up to tens."""
METHODS = {
    "lora": LoraConfig(rank=2, alpha=2),
    "everywhere": LoraConfig(rank=2, alpha=2, target_modules="all-linear"),
    "dora": DoraConfig(rank=2, alpha=2),
    "ia3": IA3Config(),
    "bitfit": BitFitConfig(),
    "full": FullConfig(),
    "bottleneck": BottleneckConfig(width=3),
    "toy": ToyConfig(),
}
IN_PEFT = ("lora", "everywhere", "dora", "ia3")

each_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def logits_of(bank, names):
    bank.route(names)
    return bank.model(ids(len(names))).logits


def ids(rows):
    return torch.randint(64, (rows, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def bank(family, randomise):
    """All methods on one model of the family."""
    bank = AdapterBank(build(family))
    for name, config in METHODS.items():
        bank.add(name, config)
        randomise(bank, name)
    return bank


@each_family
def test_all_methods_serve_one_batch_and_base_rows_stay_the_base(family, bank):
    names = [*METHODS, None]
    got = logits_of(bank, names)
    with torch.no_grad():
        base = build(family)(ids(len(names))).logits
    assert torch.equal(got[-1], base[-1])
    for row, name in enumerate(METHODS):
        assert not torch.allclose(got[row], base[row], atol=1e-3), f"{name} changes nothing"


@each_family
@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_reads_our_files_and_computes_the_same(family, name, bank, tmp_path):
    save_adapter(bank, name, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bank, [name] * 2), theirs(ids(2)).logits, **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(bank, "again", tmp_path / "theirs")
    assert torch.equal(logits_of(bank, ["again"]), logits_of(bank, [name]))


@each_family
def test_training_ia3_leaves_the_queries_of_a_fused_projection_alone(family):
    """And moves keys, values and the feed-forward, whichever way the features lie."""
    bank = AdapterBank(build(family))
    bank.add("a", IA3Config())
    optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-2)
    bank.route(["a"] * 2)
    bank.model(ids(2)).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    moved = {path: vector.flatten() != 1 for path, vector in _vectors(bank).items()}
    for part in find_parts(bank.model, ["q", "k", "v"]):
        if part.path in moved:
            features = slice(None) if part.features is None else part.features
            assert bool(moved[part.path][features].any()) is (part.role != "q"), part.role
    assert all(bool(m.any()) for m in moved.values())


def _vectors(bank):
    return {key.removesuffix(".ia3_l"): vector for key, vector in bank.tensors("a").items()}
