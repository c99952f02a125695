"""Attention by segments is the dense mask's, gradients included, and computes little that the mask throws away."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from mmpeft.adapters import HybridConfig, LoraConfig, PrefixConfig, PromptConfig
from mmpeft.cli import main
from mmpeft.data.batch import PADDING
from mmpeft.data.packing import PREFIX
from mmpeft.errors import RefusedError
from mmpeft.inference.self_check import check_language_model
from mmpeft.models.language import LanguageConfig
from mmpeft.models.masks import Reach, additive, attention_mask
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.segment_attention import segment_attention
from mmpeft.models.segments import SIZES, SegmentMask, Segments
from mmpeft.models.vision import NoVision
from mmpeft.tools.tiny_models import tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
HEADS, KEY_HEADS, DIM = 6, 2, 16
ROWS = {
    "one conversation": [(0, [70]), (0, [33])],
    "a prefix": [(40, [9, 12, 7]), (40, [11])],
    "prefixes of several lengths": [(30, [9, 12, 7, 20]), (3, [11] * 5), (0, [50])],
    "sixteen conversations": [(20, [9, 14, 11, 13] * 4), (18, [12] * 16)],
    "a prefix alone": [(50, []), (10, [5, 6])],
}
REACHES = {"all": Reach(), "window": Reach(window=9), "chunk": Reach(chunk=13)}


def segments_of(rows, before=0, cached=0):
    """Packed rows, right-padded; ``before`` are columns of virtual tokens of which the first row has none, and
    ``cached`` keys have no queries among them."""
    width = max(prefix + sum(lengths) for prefix, lengths in rows)
    segments, positions = torch.full((len(rows), width), PADDING), torch.zeros(len(rows), width).long()
    for row, (prefix, lengths) in enumerate(rows):
        numbers = [PREFIX] * prefix + [n for n, length in enumerate(lengths, 1) for _ in range(length)]
        places = [*range(prefix), *(prefix + p for length in lengths for p in range(length))]
        segments[row, : len(numbers)], positions[row, : len(numbers)] = (
            torch.tensor(numbers),
            torch.tensor(places),
        )
    virtual = torch.full((len(rows), before), PREFIX)
    virtual[0] = PADDING
    keys = torch.cat([virtual, segments], 1)
    positions = torch.cat([torch.arange(before).expand(len(rows), -1), positions + before], 1)
    return Segments(keys[:, cached:], keys, positions[:, cached:], positions)


def states_of(segments, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, queries, keys = len(segments.keys), segments.queries.shape[1], segments.keys.shape[1]
    shapes = ((rows, HEADS, queries, DIM), (rows, KEY_HEADS, keys, DIM), (rows, KEY_HEADS, keys, 2 * DIM))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def dense_mask(segments, reach):
    seen = attention_mask(segments.queries, segments.keys)
    near = reach.sees(segments.query_positions, segments.key_positions)
    return seen if near is None else seen & near


def by_segments(states, segments, reach, sizes):
    mask = SegmentMask.of(segments, reach, states[0].dtype, sizes)
    return segment_attention(None, *states, mask, scaling=0.3)[0]


def by_dense_mask(states, segments, reach):
    mask = dense_mask(segments, reach)
    mask = mask | ~mask.any(-1, keepdim=True)  # of padding that sees nothing
    return F.scaled_dot_product_attention(*states, mask, scale=0.3, enable_gqa=True).transpose(1, 2)


def with_gradients(output, segments, states):
    """What stands at tokens, and what it does to queries, keys and values."""
    used = segments.queries != PADDING
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output[used], *torch.autograd.grad((output * weights)[used].sum(), states)]


def largest_error(found, wanted):
    return max(
        float((a.detach().double() - b.double()).abs().max() / b.abs().max())
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("sizes", [(8,), SIZES], ids=str)
@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("before", "cached"), [(0, 0), (5, 5), (4, 12)])
def test_it_is_the_attention_of_the_dense_mask_with_its_gradients(rows, reach, sizes, before, cached):
    segments = segments_of(rows, before, cached)
    states = states_of(segments, torch.float64)
    found = with_gradients(by_segments(states, segments, reach, sizes), segments, states)
    wanted = with_gradients(by_dense_mask(states, segments, reach), segments, states)
    assert largest_error(found, wanted) < 1e-12
    assert all(each.abs().max() > 0 for each in found)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, None)])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_it_rounds_no_more_than_eager_attention(rows, dtype, bound):
    segments, reach = segments_of(rows, before=3), Reach()
    states = states_of(segments, dtype)
    exact = [each.detach().double().requires_grad_() for each in states]
    wanted = with_gradients(by_dense_mask(exact, segments, reach), segments, exact)
    ours = with_gradients(by_segments(states, segments, reach, (16,)), segments, states)
    additive_mask = additive(dense_mask(segments, reach), dtype)
    eager = eager_attention_forward(
        SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, training=False), *states, additive_mask, 0.3
    )[0]
    theirs = with_gradients(eager, segments, states)
    assert largest_error(ours, wanted) < (bound or 1.5 * largest_error(theirs, wanted))


def test_what_the_mask_throws_away_is_left_out():
    def share(rows, sizes=SIZES):
        segments = segments_of(rows)
        tiles = segments.tiles(Reach(), torch.float32, sizes)
        assert [tile.queries.start for tile in tiles[1:]] == [tile.queries.stop for tile in tiles[:-1]]
        computed = sum(tile.mask.numel() for tile in tiles)
        return computed / attention_mask(segments.queries, segments.keys).numel()

    assert share([(270, [15] * 10)] * 8) < 0.72  # 256 image tokens and 10 questions
    assert share([(25, [15] * 16)] * 8) < 0.42
    assert share([(0, [1000])] * 8) < 0.6
    assert share([(10, [5])]) == 1, "a tile has its price too"


def test_whoever_reads_the_mask_gets_no_number():
    segments = segments_of(ROWS["a prefix"])
    mask = SegmentMask.of(segments, Reach(), torch.float32, SIZES)
    assert mask.shape == (*segments.queries.shape[:1], 1, *segments.queries.shape[1:], segments.keys.shape[1])
    assert torch.isnan(mask + torch.zeros(1)).all()
    assert mask.untyped_storage().nbytes() == 4
    states = states_of(segments, torch.float32)
    for changed in (mask[..., :40], mask.clone(), mask + 1):
        with pytest.raises(ValueError, match="changes the mask"):
            segment_attention(None, *states, changed)
    for extra in ({"softcap": 50.0}, {"s_aux": torch.zeros(HEADS)}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match=f"reads {next(iter(extra))}"):
            segment_attention(None, *states, mask, **extra)
    with pytest.raises(ValueError, match="drops weights"):
        segment_attention(None, *states, mask, dropout=0.1)


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("before", "cached"), [(0, 0), (5, 0), (5, 5)])
def test_the_blocks_of_flex_attention_hold_the_same_mask(rows, reach, before, cached):
    segments = segments_of(rows, before, cached)
    blocks = segments.blocks(reach)
    queries, keys = segments.queries.shape[1], segments.keys.shape[1]
    seen = create_mask(blocks.mask_mod, len(rows), 1, *blocks.seq_lengths, device="cpu")
    assert torch.equal(seen[..., :queries, :keys], dense_mask(segments, reach))
    mask = SegmentMask.of(segments, reach, torch.float32, SIZES)
    mask.work = blocks
    with torch.no_grad():  # flex attention has no backward on a CPU
        states = states_of(segments, torch.float32)
        found = segment_attention(None, *states, mask, scaling=0.3)[0]
        wanted = by_dense_mask(states, segments, reach)
    used = segments.queries != PADDING
    torch.testing.assert_close(found[used], wanted[used], atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_the_attention_of_the_dense_mask_with_its_gradients(rows, reach, dtype):
    segments = segments_of(rows, before=3)
    on_gpu = Segments(*(getattr(segments, name).cuda() for name in Segments.__dataclass_fields__))
    states = states_of(segments, dtype)
    there = [each.detach().cuda().requires_grad_() for each in states]
    exact = [each.detach().double().requires_grad_() for each in states]
    found = with_gradients(by_segments(there, on_gpu, reach, SIZES).cpu(), segments, there)
    theirs = with_gradients(by_dense_mask(states, segments, reach), segments, states)
    wanted = with_gradients(by_dense_mask(exact, segments, reach), segments, exact)
    found = [each.cpu() for each in found]
    assert largest_error(found, wanted) < max(
        2e-3 if dtype == torch.float32 else 0, 2 * largest_error(theirs, wanted)
    )


# -- in the model -----------------------------------------------------------------------------------------------

QUESTIONS = [
    ("what color is it?", "red"),
    ("is it red?", "yes"),
    ("is it blue?", "no it is not"),
    ("a?", "b"),
]
NAMES = ["lora", "prompt", "prefix", None, "both", "ia3"]


@pytest.fixture
def batch(make_batch, conversations):
    rows = [
        conversations(images, *QUESTIONS[: 1 + n % 4])
        for n, images in enumerate(["a", "bc", "b", "", "", "c"])
    ]
    return make_batch(rows, NAMES)


def losses_and_gradients(model, batch):
    """Of projector and finetunes."""
    model.zero_grad()
    losses = model.token_losses(batch).nll
    losses.sum().backward()
    return [losses, *(p.grad for p in (*model.projector.parameters(), *model.bank.parameters()))]


@pytest.fixture
def make_mixed(make_model, randomise):
    def make(methods=NAMES, **language):
        model = make_model(**language)
        both = HybridConfig([PrefixConfig(2), PromptConfig(6), LoraConfig(rank=2)])
        for name, config in {"prompt": PromptConfig(5), "prefix": PrefixConfig(4), "both": both}.items():
            if name in methods:
                model.bank.add(name, config)
                randomise(model.bank, name)
        return model.train()

    return make


@pytest.mark.parametrize("sizes", [(4,), SIZES])
def test_a_step_is_that_of_dense_masks(make_mixed, batch, sizes):
    wanted = losses_and_gradients(make_mixed(), batch)
    model = make_mixed()
    model.reader.by_segments, model.reader.tile_sizes = True, sizes
    found = losses_and_gradients(model, batch)
    assert all(each.abs().max() > 0 for each in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert model.reader.config._attn_implementation == "eager", "the model's own again"


def test_recomputed_activations_are_of_the_same_attention(make_mixed, make_batch, conversations):
    batch = make_batch([conversations("a", *QUESTIONS), conversations("b", *QUESTIONS)], ["lora", "prompt"])
    found = []
    for recompute in (False, True):
        model = make_mixed(["prompt"], gradient_checkpointing=recompute)
        model.reader.by_segments, model.reader.tile_sizes = True, (8,)
        found.append(losses_and_gradients(model, batch))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        assert ours.isfinite().all()


def wrapped(model_type, **changes):
    language_model = tiny_model(model_type, **changes)
    width = language_model.get_input_embeddings().weight.shape[1]
    return MultimodalModel(NoVision(), Projector(NoVision().dim, width), language_model).eval()


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("llama", {}, None),
        ("mistral", {}, None),
        ("qwen3", {}, None),
        ("gemma3_text", {}, None),
        ("gemma2", {}, "softcap"),
        ("gpt_oss", {}, "s_aux"),
    ],
)
def test_models_whose_attention_is_more_keep_their_dense_masks(model_type, changes, why):
    model = wrapped(model_type, **changes)
    model.reader.decoder.__class__._supports_sdpa, kept = True, model.reader.decoder._supports_sdpa
    try:
        checked = check_language_model(model)
    finally:
        model.reader.decoder.__class__._supports_sdpa = kept
    assert checked.by_segments is model.reader.by_segments is (why is None)
    assert why is None or any(why in told for told in checked.failures.values())


def test_by_name_the_model_keeps_its_own_attention():
    model = wrapped("llama")
    assert not check_language_model(model, by_segments=False).by_segments
    assert not model.reader.by_segments


def test_flash_attention_is_refused_by_name_before_anything_is_loaded():
    with pytest.raises(RefusedError, match=r"attention is 'flash_attention_2'.*takes no mask"):
        LanguageConfig(attention="flash_attention_2")
    with pytest.raises(
        SystemExit, match=r"Flash attention takes no mask.*\"auto\" is flex attention on a GPU"
    ):
        main(["fit", "--model.language.attention=flash_attention_2"])
