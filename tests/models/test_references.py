"""References of preferences: the same rows as the base or the beginning reads them, whatever trains meanwhile."""

import pytest
import torch

from mmpeft.data.batch import concatenate
from mmpeft.data.loader import PackedLoader
from mmpeft.data.plan import PackingConfig
from mmpeft.data.preferred import encode_preferred
from mmpeft.training.finetune import Finetune, Settings
from mmpeft.training.preferences import PreferenceConfig
from mmpeft.training.references import References
from tests.tiny import make_record

RECORDS = [
    make_record("what color?", "red", ["a"], choices=["red", "a blue square"]),
    make_record("what color?", "green", ["b"], choices=["yellow", "green", "blue"]),
    make_record("name a color", "blue", choices=["blue", "two"]),
]
CLOSE = {"rtol": 0, "atol": 2e-5}
"""Rows are read with other rows beside them."""


def finetune(name, objective="dpo", **preferences):
    settings = Settings(objective=objective, preferences=PreferenceConfig(**preferences))
    return Finetune(name, None, settings)


@pytest.fixture
def batch_of(template, features_of):
    def make(adapter, mismatches=False):
        examples = [encode_preferred(template, record, "pairs") for record in RECORDS]
        packing = PackingConfig(9, 4, template.max_length)

        def features(images):
            return torch.stack([features_of(image) for image in images])

        (batch,) = PackedLoader(examples, features, packing, adapter, None, mismatches=mismatches)
        return batch

    return make


def change(model):
    """As training would."""
    for parameter in (*model.projector.parameters(), *model.bank.parameters()):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))


def state(model):
    return [tensor.clone() for tensor in (*model.projector.parameters(), *model.bank.parameters())]


@pytest.mark.parametrize("began_as", [{}, {"lora": "lora"}])
def test_a_reference_stays_what_the_finetune_began_from(model, batch_of, began_as):
    """The projector that a single finetune trains is that of the base's rows too."""
    batch, own = batch_of("lora"), {"lora": finetune("lora")}
    model.train()
    references = References(model, own, {"lora": "lora"}, began_as)
    with torch.no_grad():
        want = model.eval().token_losses(batch if began_as else batch.routed([None] * 3))
    before = references.losses(batch)
    assert torch.equal(before.nll, want.nll)
    assert (before.rows.tolist(), before.segments.tolist()) == (want.rows.tolist(), want.segments.tolist())
    assert not before.nll.requires_grad
    change(model)
    changed, modes = state(model), [module.training for module in model.modules()]
    assert torch.equal(references.losses(batch).nll, before.nll)
    assert all(torch.equal(one, other) for one, other in zip(state(model), changed, strict=True))
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        assert (model.token_losses(batch).nll - before.nll).abs().max() > 0.1


def test_each_finetune_of_a_batch_has_its_own_reference(model, batch_of):
    batches = {name: batch_of(name) for name in ("lora", None, "ia3")}
    joint = concatenate(list(batches.values()))
    own = {"lora": finetune("lora"), "plain": finetune("plain", "likelihood"), "ia3": finetune("ia3", "ipo")}
    references = References(model, own, {"lora": "lora", "plain": None, "ia3": "ia3"}, {"ia3": "ia3"})
    change(model)
    found = references.losses(joint)
    for name, first in (("lora", 0), ("ia3", 6)):
        rows = (found.rows >= first) & (found.rows < first + 3)
        part = found.where(rows)
        single = references.losses(batches[name])
        torch.testing.assert_close(part.nll, single.nll, **CLOSE)
        assert (part.rows - first).tolist() == single.rows.tolist()
    assert set(found.rows.tolist()) == {0, 1, 2, 6, 7, 8}


def test_the_reference_point_is_the_mean_over_mismatched_answers(model, batch_of):
    batch, own = batch_of("lora", mismatches=True), {"lora": finetune("lora", "kto")}
    references = References(model, own, {"lora": "lora"}, {})
    others = batch.mismatched
    assert others is not None
    with torch.no_grad():
        policy, base = (model.token_losses(others.routed([name] * 3)).nll for name in ("lora", None))
    number = len(others.conversations.rows)
    beyond = (base.sum() - policy.sum()) / number
    found = references.points(batch)
    torch.testing.assert_close(found["lora"], beyond.clamp(min=0))
    for _, stack, slot in model.bank.places("lora"):  # another finetune, that finds these answers likelier
        stack.fill(
            slot, {key: -tensor if "B" in key else tensor for key, tensor in stack.tensors(slot).items()}
        )
    with torch.no_grad():
        policy = model.token_losses(others.routed(["lora"] * 3)).nll
    torch.testing.assert_close(
        references.points(batch)["lora"], ((base.sum() - policy.sum()) / number).clamp(min=0)
    )
    assert References(model, {"lora": finetune("lora")}, {"lora": "lora"}, {}).points(batch_of("lora")) == {}


def test_a_reference_that_the_finetune_does_not_begin_as_is_refused(model):
    own = {"lora": finetune("lora", reference="other")}
    for began_as, what in (({}, "no adapter, but afresh"), ({"lora": "old"}, "'old'")):
        with pytest.raises(
            ValueError, match=f"reference of 'lora' is 'other', but that finetune begins as {what}"
        ):
            References(model, own, {"lora": "lora"}, began_as)


def test_a_finetune_that_has_trained_has_no_reference_any_more(model, batch_of):
    """Unless it is the base, read with a projector that did not train."""
    own = {"lora": finetune("lora")}
    references = References(model, own, {"lora": "lora"}, {}, has_trained=True)
    with pytest.raises(ValueError, match="'lora' is compared with what it began from"):
        references.losses(batch_of("lora"))
    model.projector.requires_grad_(False)
    assert References(model, own, {"lora": "lora"}, {}, has_trained=True).losses(batch_of("lora")) is not None
    unknown = References(model, own, {"lora": "lora"}, None, has_trained=True)
    with pytest.raises(ValueError, match="`mmpeft test` ranks its answers"):
        unknown.losses(batch_of("lora"))
    based = {"lora": finetune("lora", reference="base")}
    assert (
        References(model, based, {"lora": "lora"}, None, has_trained=True).losses(batch_of("lora"))
        is not None
    )
