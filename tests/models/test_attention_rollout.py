"""Attention rollout: the paper's product, of the model's own weights, or a refusal that names the model."""

import pytest
import torch

from mmpeft.errors import RefusedError
from mmpeft.models.attention_rollout import attention_weights, check_weights, roll_out
from mmpeft.models.reader import LanguageReader
from mmpeft.tools.tiny_models import tiny_model


def random_attention(layers, heads, columns, keys):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(layers, heads, columns, keys, generator=generator)
    causal = torch.ones(columns, keys, dtype=torch.bool).tril(keys - columns)
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def test_it_is_the_product_of_all_layers_with_their_residuals():
    attentions = random_attention(3, 4, 6, 6)
    first, second, third = (0.5 * own.mean(0) + 0.5 * torch.eye(6) for own in attentions)
    found = roll_out(list(attentions), torch.tensor([5, 2]))
    torch.testing.assert_close(found, (third @ second @ first)[[5, 2]])
    torch.testing.assert_close(found.sum(-1), torch.ones(2))
    assert not found[1, 3:].any(), "nothing comes from later columns"


def test_keys_before_the_columns_are_left_out():
    attentions = random_attention(2, 2, 5, 8)
    own = attentions[..., 3:].mean(1) + torch.eye(5)
    first, second = own / own.sum(-1, keepdim=True)
    torch.testing.assert_close(roll_out(list(attentions), torch.tensor([4])), (second @ first)[[4]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_weights_are_the_models_own(family):
    model = tiny_model(family)
    reader, ids = LanguageReader(model), torch.arange(5, 12)[None]
    expected = model(input_ids=ids, output_attentions=True).attentions
    usual = reader.config._attn_implementation = (
        "eager" if family == "gemma2" else "sdpa"
    )  # gemma2 caps its scores
    with attention_weights(reader) as found, torch.no_grad():
        model(input_ids=ids)
    check_weights(reader, found)
    torch.testing.assert_close(found, list(expected))
    assert reader.config._attn_implementation == usual
    assert "attentions" not in model(input_ids=ids), "afterwards nothing is kept"


@pytest.mark.parametrize("family", ["mamba2", "jamba", "lfm2"])
def test_what_has_no_weights_is_refused_by_name(family):
    model = tiny_model(family)
    reader = LanguageReader(model)
    with attention_weights(reader) as found, torch.no_grad():
        model(input_ids=torch.arange(5, 12)[None])
    with pytest.raises(RefusedError, match=f"{type(model).__name__} has attention weights in . of its"):
        check_weights(reader, found)
