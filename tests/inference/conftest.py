"""The multimodal model on the tiny base, as the tests of models have it."""

from tests.models.conftest import conversations, features_of, make_batch, make_model, model, template

__all__ = ["conversations", "features_of", "make_batch", "make_model", "model", "template"]
