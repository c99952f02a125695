"""The projector: a plain linear per slot."""

import pytest
import torch
from torch.nn import functional as F

from mmpeft.models.projector import Projector

FEATURES = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def projector():
    torch.manual_seed(0)
    projector = Projector(6, 5, num_slots=3)
    torch.nn.init.normal_(projector.bias)
    return projector


def test_every_image_goes_through_its_own_slot(projector):
    slots = torch.tensor([2, 0, 0, 1])
    projected = projector(FEATURES, slots, torch.float32)
    for image, slot in enumerate(slots.tolist()):
        alone = F.linear(FEATURES[image], projector.weight[slot], projector.bias[slot])
        torch.testing.assert_close(projected[image], alone)


def test_one_slot_equals_a_slot_among_several(projector):
    single = Projector(6, 5)
    single.fill(projector.tensors(1))
    ones = torch.ones(4, dtype=torch.int64)
    torch.testing.assert_close(
        single(FEATURES, ones * 0, torch.float32), projector(FEATURES, ones, torch.float32)
    )


def test_half_features_are_projected_in_full_precision(projector):
    projected = projector(FEATURES.half(), torch.zeros(4, dtype=torch.int64), torch.bfloat16)
    assert projected.dtype == torch.bfloat16
    assert projector.weight.dtype == torch.float32


def test_tensors_and_fill_round_trip(projector):
    other = Projector(6, 5, num_slots=2)
    before = other.tensors(0)["weight"].clone()
    other.fill(projector.tensors(2), slot=1)
    for name, tensor in projector.tensors(2).items():
        assert torch.equal(other.tensors(1)[name], tensor)
    assert torch.equal(other.tensors(0)["weight"], before)


def test_misfitting_tensors_are_refused_by_name(projector):
    with pytest.raises(ValueError, match=r"projector weight: found \[5, 7\], wanted \[5, 6\]"):
        projector.fill({"weight": torch.zeros(5, 7), "bias": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"projector bias: found nothing, wanted \[5\]"):
        projector.fill({"weight": torch.zeros(5, 6)})


def test_misfitting_tensors_change_nothing(projector):
    before = {name: tensor.clone() for name, tensor in projector.tensors(0).items()}
    with pytest.raises(ValueError, match="bias"):
        projector.fill({"weight": torch.zeros(5, 6)})
    for name, tensor in projector.tensors(0).items():
        assert torch.equal(tensor, before[name])
