"""Positions: models that keep a table of them are asked for none beyond it, all others for any."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmpeft.cli import main
from mmpeft.data.features import FeatureCache
from mmpeft.data.packing import pack
from mmpeft.errors import RefusedError
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.positions import PositionLimit, position_limit, table_length
from mmpeft.models.projector import Projector
from mmpeft.models.reader import Reading
from mmpeft.models.vision import NoVision
from mmpeft.tools.tiny_models import tiny_model
from mmpeft.training.start import check_length
from tests.tiny import make_config, make_model_config

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


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": TABLE}
ROTARY = {
    "longrope": ("phi3", {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}),
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ROTARY)
def test_rows_that_turn_the_frequencies_of_their_batch_are_refused(kind, template, make_batch):
    """A row alone and beside a longer one: the same up to the limit, and beyond it the model's own numbers differ."""
    family, rope = ROTARY[kind]
    lengths = {"original_max_position_embeddings": TABLE} if kind == "longrope" else {}
    lengths |= {"max_position_embeddings": 4 * TABLE if kind == "longrope" else TABLE}
    language = tiny_model(family, rope_parameters=rope, vocab_size=400, **lengths)
    assert position_limit(language).count == TABLE
    head_dim = language.config.hidden_size // language.config.num_attention_heads

    def turned(length):
        rotary = language.model.rotary_emb
        positions = torch.stack([torch.arange(length), torch.arange(length) % 8])
        return rotary(torch.zeros(2, length, head_dim), positions)[0][1, :8]

    assert torch.equal(turned(TABLE), turned(8))
    assert not torch.allclose(turned(TABLE + 1), turned(8), atol=1e-3)
    turned(8)
    model = MultimodalModel(NoVision(), Projector(1, language.config.hidden_size), language)
    rows = [
        [template.encode({"turns": [(text, "red")], "images": [], "id": "1", "where": "a:1", "task": None})]
        for text in ("what?", "what color is it?" * 9)
    ]
    model.token_losses(make_batch(rows[:1]))
    with pytest.raises(RefusedError, match=rf"other frequencies beyond {TABLE} positions"):
        model.token_losses(make_batch(rows))
    with pytest.raises(RefusedError, match=rf"max_length to {TABLE} or less"):
        check_length(model, TABLE + 1)


def test_a_head_that_is_called_decoder_hides_no_frequencies():
    rope = dict.fromkeys(("full_attention", "sliding_attention"), ROTARY["dynamic"][1])
    language = tiny_model("modernbert-decoder", rope_parameters=rope, max_position_embeddings=TABLE)
    assert language.get_decoder() is language.decoder, "its head"
    assert position_limit(language).count == TABLE


@torch.no_grad()
def test_rows_wider_than_a_temperature_by_columns_are_refused(template, make_batch):
    """Llama 4 tunes its attention by the column, which is no position in packed rows."""
    language = tiny_model("llama4_text", floor_scale=20, attn_scale=20.0, vocab_size=400)
    model = MultimodalModel(NoVision(), Projector(1, language.config.hidden_size), language)
    model.reader.reading = Reading(masks="by layer type")
    first, second = (
        template.encode({"turns": [turn], "images": [], "id": "1", "where": "a:1", "task": None})
        for turn in (("what color is it?", "red"), ("is it two?", "yes, it is"))
    )
    packed, alone = make_batch([[first, second]]), make_batch([[second]])
    assert alone.input_ids.shape[1] < 20 < packed.input_ids.shape[1]
    with pytest.raises(RefusedError, match=r"rows of \d+ tokens exceed floor_scale = 20"):
        model.token_losses(packed)
    model.reader._distances.clear()  # as if nobody looked
    own = model.token_losses(alone).nll
    assert not torch.allclose(model.token_losses(packed).nll[-len(own) :], own, atol=1e-4)


def test_a_fit_whose_rows_may_be_too_long_is_refused_before_images_are_encoded(
    tiny_base, tiny_data, tmp_path, monkeypatch
):
    limit = PositionLimit(99, "learned 99 positions")
    monkeypatch.setattr("mmpeft.models.reader.position_limit", lambda _: limit)
    monkeypatch.setattr(FeatureCache, "build", lambda *_, **__: pytest.fail("images are encoded first"))
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data)
    with pytest.raises(SystemExit, match="max_length to 99 or less"):
        main(["fit", "--config", str(config)])
