"""The multimodal model on the tiny base, as the tests of models have it, and a loaded run with several finetunes."""

import pytest

import mmpeft
from mmpeft.adapters import IA3Config, LoraConfig
from tests.models.conftest import conversations, features_of, make_batch, make_model, model, template

__all__ = ["conversations", "features_of", "make_batch", "make_model", "model", "template"]


@pytest.fixture(scope="module")
def vlm(tiny_run, randomise):
    """The tiny run with two more finetunes whose answers differ."""
    vlm = mmpeft.load(str(tiny_run), device="cpu")
    for name, config in (("other", LoraConfig(rank=4)), ("tfew", IA3Config())):
        vlm.model.bank.add(name, config)
    for name in vlm.adapters:
        randomise(vlm.model.bank, name)
    return vlm


@pytest.fixture(scope="module")
def images(tiny_data):
    """Paths of the tiny data's images."""
    return [str(path) for path in sorted((tiny_data / "images").glob("*.png"))]
