"""Tiny random models and filled banks, shared by all tests. Nothing here touches the network."""

import zlib
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmpeft.adapters import (
    AdapterBank,
    AdapterConfig,
    BitFitConfig,
    BottleneckConfig,
    DoraConfig,
    FullConfig,
    HybridConfig,
    IA3Config,
    LoraConfig,
)
from mmpeft.adapters.methods.stack import Stack
from tests.adapters.toy_method import ToyConfig

pytest_plugins = ["tests.tiny"]

VOCABULARY = 128

MIXED: dict[str, AdapterConfig] = {
    "small": LoraConfig(rank=2, alpha=3),
    "large": LoraConfig(rank=8, alpha=16, target_modules="all-linear"),
    "tfew": IA3Config(),
    "outputs": IA3Config(target_modules=["o_proj", "down_proj"]),
    "dora": DoraConfig(rank=4, alpha=4, target_modules=["q_proj", "up_proj"]),
    "bias": BitFitConfig(),
    "whole": FullConfig(target_modules=["v_proj", "down_proj"]),
    "after": BottleneckConfig(width=6),
    "beside": BottleneckConfig(width=3, reads="input", scaling=2.0),
    "last": HybridConfig([IA3Config(layers=[0]), LoraConfig(rank=3, layers=[1]), BitFitConfig(["o_proj"])]),
    "toy": ToyConfig(),
}
"""Every method of layers, the toy method that one file adds, several sizes, overlapping but unequal targets, one
finetune of several methods: every way in which slots of a bank differ."""


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a random Llama in eval mode, the same one each time; keywords change its config."""

    def make(**changes: float) -> LlamaForCausalLM:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "initializer_range": 0.1,
        }
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).eval()

    return make


@pytest.fixture
def tiny_llama(make_llama) -> LlamaForCausalLM:
    """Two layers of width 64 in fp32."""
    return make_llama()


@pytest.fixture(scope="session")
def randomise() -> Callable[[AdapterBank, str], None]:
    """Fills an adapter with weights far from the base, a function of its name and targets alone.

    Goes through `tensors` and `fill`, so the padding up to the stack's rank stays zero.
    """

    def fill(bank: AdapterBank, name: str) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for _, stack, slot in bank.places(name):
            start = stack.tensors(slot)
            noise = {key: torch.randn(old.shape, generator=generator) for key, old in start.items()}
            stack.fill(slot, {key: start[key] + 0.2 * noise[key].to(start[key]) for key in start})

    return fill


@pytest.fixture(scope="session")
def make_bank(make_llama, randomise) -> Callable[..., AdapterBank]:
    """Builds a bank with the given adapters, `MIXED` by default, randomised unless ``fill`` is off, on a
    fresh tiny Llama or ``model``; ``reserve`` is method -> (slots, size) to make room for beforehand."""

    def make(
        configs: dict[str, AdapterConfig] | None = None,
        model: nn.Module | None = None,
        fill: bool = True,
        reserve: dict[str, tuple[int, int]] | None = None,
    ) -> AdapterBank:
        bank = AdapterBank(make_llama() if model is None else model)
        for method, room in (reserve or {}).items():
            bank.reserve(method, *room)
        for name, config in (MIXED if configs is None else configs).items():
            bank.add(name, config)
            if fill:
                randomise(bank, name)
        return bank

    return make


def one_slot_each(bank: AdapterBank) -> dict[str, tuple[int, int]]:
    """Room for one finetune of each method, padded to the sizes of ``bank``: for equal shapes."""
    return {method: (1, size) for method, size in bank._sizes.items()}


def slot_of(bank: AdapterBank, name: str) -> int:
    """The slot of an adapter of one method."""
    (part,) = bank.entry(name).parts
    return part.slot


def stack_at(bank: AdapterBank, name: str, path: str) -> Stack:
    """The stack that holds tensors of ``name`` at ``path``; the first of several."""
    return next(stack for where, stack, _ in bank.places(name) if where == path)


@pytest.fixture(scope="session")
def poison() -> Callable[[AdapterBank, str], None]:
    """Turns every tensor of an adapter into NaN: a finetune that diverged."""

    def fill(bank: AdapterBank, name: str) -> None:
        for _, stack, slot in bank.places(name):
            stack.fill(slot, {key: torch.full_like(t, torch.nan) for key, t in stack.tensors(slot).items()})

    return fill


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """(rows, length) random token ids, the same ones for the same seed."""

    def make(rows: int, length: int = 9, seed: int = 0) -> Tensor:
        return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[[AdapterBank, Sequence[str | None], Tensor], Tensor]:
    """(rows, length, vocabulary) logits of one forward of ``bank`` with a name, or None, for each row."""

    @torch.no_grad()
    def run(bank: AdapterBank, names: Sequence[str | None], ids: Tensor) -> Tensor:
        bank.route(names)
        return bank.model(ids).logits

    return run


@pytest.fixture(scope="session")
def token_means() -> Callable[[Tensor, Tensor], Tensor]:
    """(rows,) mean next-token cross-entropy of every row, from logits and ids."""

    def mean(logits: Tensor, ids: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return losses.mean(1)

    return mean


@pytest.fixture(scope="session")
def gradients_of() -> Callable[[AdapterBank, str], dict[str, Tensor]]:
    """The gradient of every stack at one adapter's slot, padding included, by path and tensor name."""

    def collect(bank: AdapterBank, name: str) -> dict[str, Tensor]:
        return {
            f"{path}.{stack.method}.{key}": parameter.grad[slot]
            for path, stack, slot in bank.places(name)
            for key, parameter in stack.named_parameters()
        }

    return collect


@pytest.fixture(scope="session")
def train(token_means) -> Callable[..., None]:
    """Trains a bank with one stock AdamW over all stacks, a step per batch of ids (rows, length).

    The loss is the sum over the named finetunes of their own token mean; rows of None give none.
    """

    def run(
        bank: AdapterBank, names: Sequence[str | None], batches: Iterable[Tensor], **adamw: float
    ) -> None:
        optimiser = torch.optim.AdamW(bank.parameters(), **({"lr": 1e-2} | adamw))
        for ids in batches:
            bank.route(names)
            means = token_means(bank.model(ids).logits, ids)
            own = [[row for row, each in enumerate(names) if each == name] for name in set(names) - {None}]
            optimiser.zero_grad()
            sum(means[rows].mean() for rows in own).backward()
            optimiser.step()

    return run
