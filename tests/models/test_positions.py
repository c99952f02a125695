"""Positions: models that keep a table of them are asked for none beyond it, all others for any."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmpeft.data.packing import pack
from mmpeft.errors import RefusedError
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.positions import table_length
from mmpeft.models.projector import Projector
from mmpeft.models.vision import NoVision
from mmpeft.training.start import check_length
from tests.tiny import make_model_config

TABLE = 24
WITH_TABLE = ("gpt2", "gpt_bigcode", "gptj", "codegen", "openai-gpt", "opt", "xglm", "biogpt", "ctrl")
WITHOUT = ("llama", "qwen3", "gpt_neox", "phi", "gemma2", "stablelm")


def build(family):
    config = make_model_config(family, max_position_embeddings=TABLE, vocab_size=400)
    sizes = {
        "word_embed_proj_dim": 32,
        "rotary_dim": 4,
        "ffn_dim": 48,
        "intermediate_size": 48,
        "pad_token_id": 1,
        "num_key_value_heads": 4,
    }
    for name in sizes.keys() & vars(config).keys():
        setattr(config, name, sizes[name])
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def reads(model, position):
    embeds = torch.zeros(1, 2, model.get_input_embeddings().weight.shape[1])
    model.get_decoder()(inputs_embeds=embeds, position_ids=torch.tensor([[position - 1, position]]))


@pytest.mark.parametrize("family", WITH_TABLE)
def test_the_length_of_a_table_is_found(family):
    model = build(family)
    assert table_length(model) == TABLE
    reads(model, TABLE - 1)
    with pytest.raises(IndexError):
        reads(model, TABLE)


@pytest.mark.parametrize("family", WITHOUT)
def test_positions_that_are_computed_have_no_end(family):
    model = build(family)
    assert table_length(model) is None
    reads(model, TABLE)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_row_beyond_the_table_is_refused_with_the_number(family, template, make_batch):
    model = MultimodalModel(NoVision(), Projector(1, 32, 1), build(family))
    row = {"turns": [("what color is it?" * 9, "red")], "images": [], "id": "1", "where": "a:1", "task": None}
    example = template.encode(row)
    with pytest.raises(
        RefusedError, match=rf"a row has {len(example.ids)} tokens, .* learned {TABLE} positions"
    ):
        model.token_losses(make_batch([[example]]))
    with pytest.raises(RefusedError, match=rf"max_length to {TABLE} or less"):
        check_length(model, TABLE + 1)
    check_length(model, TABLE)
    assert pack([example])
