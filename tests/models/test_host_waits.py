"""No step makes the host wait for the device: what it must know of a batch came with it."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.adapters import (
    ALoraConfig,
    DoraConfig,
    HybridConfig,
    IA3Config,
    ImagePromptConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from mmpeft.data.batch import collate
from mmpeft.data.packing import first_target, pack, pack_choices
from mmpeft.data.template import ChoiceSet
from mmpeft.models import head_losses
from mmpeft.training.finetune import Finetune, Settings
from mmpeft.training.step_losses import StepLosses

aten = torch.ops.aten
WAITING = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default),
    *(aten.bincount.default, aten._unique2.default, aten.equal.default, aten.is_nonzero.default),
    *(aten.repeat_interleave.Tensor, aten.unique_dim.default, aten.unique_consecutive.default),
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Where an index is a mask, the device must count before the host knows how large the result is."""
READS = {
    *(torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.__bool__, torch.Tensor.__int__),
    *(torch.Tensor.__float__, torch.Tensor.__index__),
}


class Waits(TorchDispatchMode):
    """Counts what would wait for a CUDA device."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._calls = _Calls(self.counts)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = {torch.bool, torch.uint8}
        by_mask = func in INDEXING and any(each is not None and each.dtype in masks for each in args[1])
        if func in WAITING or by_mask:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What a dispatcher does not see: reads of memory, and lists that are copied to a device."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        there = func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None
        if func in READS or (there and args[0] != []):  # nothing is copied of an empty list
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def finetunes(conversations):
    (one,) = conversations("a", ("what color is it?", "red"))
    call = [one.ids[first_target(one)]]
    methods = {
        "dropping": HybridConfig([PrefixConfig(2), PromptConfig(3), LoraConfig(rank=2, dropout=0.3)]),
        "pictures": HybridConfig([ImagePromptConfig(), DoraConfig(rank=2, target_modules=["q_proj"])]),
        "head": LoraConfig(rank=2, dropout=0.1, target_modules=["lm_head", "v_proj"]),
        "called": ALoraConfig(rank=2, invocation_tokens=call),
        "ranked": IA3Config(),
    }
    return {name: Finetune(name, config, Settings()) for name, config in methods.items()}


@pytest.fixture
def batch(conversations, features_of, finetunes):
    """Rows of every finetune and of the base, one of them a question with its choices."""
    questions = [("what color is it?", "red"), ("is it red?", "yes it is")]
    rows = [pack(conversations("a", *questions)) for _ in finetunes] + [pack(conversations("", *questions))]
    rows.append(pack_choices(ChoiceSet(conversations("b", ("a?", "red"), ("a?", "blue")), 1)))
    names = [*finetunes, None, "ranked"]
    features = torch.stack([features_of(image) for row in rows for image in row.images])
    made = collate(rows, features, names)
    made.dropout_seeds = dict.fromkeys(finetunes, 1)
    return made


@pytest.fixture
def build(make_model, finetunes, randomise):
    def make(device):
        model = make_model().to(device).train()
        for name, own in finetunes.items():
            model.bank.add(name, own.adapter)
            randomise(model.bank, name)
            own.train_in(model, False)
        return model

    return make


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_step_waits_for_nothing_but_the_norms(in_parts, build, batch, finetunes, monkeypatch):
    if in_parts:
        monkeypatch.setattr(head_losses, "NUMBERS_AT_ONCE", 1)
    model, batch = build("cpu"), batch.to("cpu")
    losses = StepLosses(finetunes, {name: name for name in finetunes})
    with Waits() as waits:
        total, sums = losses.train(batch, model.token_losses(batch))
        total.backward()
        losses.sums.add(sums)
        losses.take_gradients(1)
        norms = [own.parameters.norm() for own in finetunes.values()]
        logged = losses.logged()
    assert not waits.counts
    assert all(norm > 0 for norm in norms)
    assert {each.finetune for each in logged} == {*finetunes}
    assert "train_length_normalised" in {each.metric for each in logged}


def test_a_validation_waits_at_its_end(build, batch, finetunes):
    model, batch = build("cpu"), batch.to("cpu")
    losses = StepLosses(finetunes, {name: name for name in finetunes})
    with torch.no_grad(), Waits() as waits:
        losses.validate(batch, model.eval().token_losses(batch))
    assert not waits.counts
    with Waits() as waits:
        told = losses.accuracies()
    assert waits.counts == {"tolist": 1}
    assert len(told) == len(finetunes) + 1
    with Waits() as waits:
        told = losses.val_losses()
    assert waits.counts == {"tolist": 1}
    assert [each.finetune for each in told] == [*finetunes]


def test_what_waits_is_counted():
    """What this file would overlook, it could not forbid."""
    some, mask = torch.arange(3), torch.tensor([True, False, True])
    waiting = [
        *(lambda: bool(some[0] == 0), lambda: int(some[1]), lambda: some.tolist(), lambda: some[0].item()),
        *(lambda: some[mask], lambda: mask.nonzero(), lambda: some.masked_fill(mask, 0)[mask]),
        *(lambda: torch.tensor([1], device="cpu"), lambda: some.unique(), lambda: torch.bincount(some)),
    ]
    for number, each in enumerate(waiting):
        with Waits() as waits:
            each()
        assert waits.counts, number


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing_but_the_norms(build, batch, finetunes):
    model = build("cuda")
    losses, batch = StepLosses(finetunes, {name: name for name in finetunes}), batch.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        total, _ = losses.train(batch, model.token_losses(batch))
        total.backward()
        losses.take_gradients(1)
        norms = [own.parameters.norm() for own in finetunes.values()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(norm > 0 for norm in norms)
