"""Decoding: what a conversation writes depends on nothing but itself, whenever its neighbours come and go."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.adapters import HybridConfig, LoraConfig, PrefixConfig, PromptConfig
from mmpeft.adapters.methods import lora
from mmpeft.data.batch import PADDING, collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IMAGE_TOKEN
from mmpeft.errors import RefusedError
from mmpeft.inference import prefill
from mmpeft.inference.decoding import NO_TOKEN, Decoder, Sampling, generate
from mmpeft.inference.sampling import sample

NO_END = -5
QUESTIONS = [("what color is it?", ""), ("is it red?", ""), ("why?", "")]
NAMES = ["prompt", None, "prefix", "lora", "both", "ia3"]
IMAGES = ["a", "", "bc", "b", "", "a"]
WARM = Sampling(max_new_tokens=8, temperature=1.5, seed=3)


@pytest.fixture
def model(make_model, randomise):
    """LoRA, IA3, and methods that put tokens before a row's own."""
    model = make_model()
    both = HybridConfig([PrefixConfig(2), PromptConfig(6), LoraConfig(rank=2)])
    for name, config in {"prompt": PromptConfig(5), "prefix": PrefixConfig(4), "both": both}.items():
        model.bank.add(name, config)
        randomise(model.bank, name)
    return model


@pytest.fixture
def batches(make_batch, conversations):
    """A packed row of each adapter and length, every row in a batch of its own."""
    rows = [conversations(images, *QUESTIONS[: 1 + n % 3], prompts=True) for n, images in enumerate(IMAGES)]
    return [make_batch([row], [name]) for row, name in zip(rows, NAMES, strict=True)]


def count(batch):
    return len(set(batch.segments[0].tolist()) - {0, -1})


def alone(model, batch, *sampling, end=NO_END):
    return generate(model, batch, end, sampling=sampling * (count(batch) // len(sampling)))[0]


def collect(decoder, answers, steps=None):
    """Runs the decoder to its end, or some steps, and appends what is written to ``answers``."""
    while len(decoder) and steps != 0:
        steps = None if steps is None else steps - 1
        for step in decoder.step():
            if step.token != NO_TOKEN:
                answers.setdefault(step.conversation, []).append(step.token)
    return answers


def test_rows_that_join_late_write_what_they_write_alone(model, batches):
    greedy = Sampling(max_new_tokens=9)
    want = [alone(model, batch, greedy) for batch in batches]
    decoder, answers, handles = Decoder(model, NO_END), {}, []
    for batch in batches:
        handles.append(decoder.join(batch, [greedy] * count(batch)))
        collect(decoder, answers, steps=2)
    collect(decoder, answers)
    assert [[answers[handle] for handle in row] for row in handles] == want
    assert len({tuple(answer) for row in want for answer in row}) > 6, "answers differ"


def test_who_leaves_changes_nobody(model, batches):
    greedy = Sampling(max_new_tokens=12)
    want = [alone(model, batch, greedy) for batch in batches]
    decoder, answers = Decoder(model, NO_END), {}
    handles = [decoder.join(batch, [greedy] * count(batch)) for batch in batches]
    gone = [handles[1][0], *handles[2], handles[5][1]]
    for number, handle in enumerate(gone):
        collect(decoder, answers, steps=1)
        decoder.leave(handle)
        assert len(decoder) == sum(map(len, handles)) - number - 1
    decoder.leave(gone[0])
    collect(decoder, answers)
    for row, expected in zip(handles, want, strict=True):
        for handle, answer in zip(row, expected, strict=True):
            assert answers[handle] == (answer[: 1 + gone.index(handle)] if handle in gone else answer)


def test_a_row_may_take_the_place_of_a_longer_one(model, batches, poison):
    """Columns beyond a row's length are masked, but a NaN behind a mask is still a NaN."""
    (short,) = alone(model, batches[3], Sampling(20))[:1]
    poison(model.bank, "ia3")
    decoder, answers = Decoder(model, NO_END), {}
    sick = decoder.join(batches[5], [Sampling(30)] * count(batches[5]))
    collect(decoder, answers, steps=25)
    for handle in sick:
        decoder.leave(handle)
    (handle, *_) = decoder.join(batches[3], [Sampling(20)] * count(batches[3]))
    assert collect(decoder, answers)[handle] == short


def test_a_diverged_finetune_stays_in_its_row(model, batches, poison):
    settings = [Sampling(8), WARM]
    want = [[alone(model, batch, own) for own in settings] for batch in batches]
    poison(model.bank, "lora")
    for number, own in enumerate(settings):
        decoder = Decoder(model, NO_END)
        handles = [decoder.join(batch, [own] * count(batch)) for batch in batches]
        answers = collect(decoder, {})
        for row, name, expected in zip(handles, NAMES, want, strict=True):
            assert name == "lora" or [answers[handle] for handle in row] == expected[number]


def test_every_conversation_has_its_own_length_and_end(model, batches):
    batch = batches[2]
    endless = alone(model, batch, Sampling(9))
    lengths = [2, 9, 5]
    decoder = Decoder(model, end := endless[1][6])
    handles = decoder.join(batch, [Sampling(length) for length in lengths])
    reasons, answers = {}, {handle: [] for handle in handles}
    while decoder:
        for step in decoder.step():
            reasons[step.conversation] = step.finish_reason
            if step.token != NO_TOKEN:
                answers[step.conversation].append(step.token)
    for handle, length, answer in zip(handles, lengths, endless, strict=True):
        stopped = end in answer[:length]
        assert reasons[handle] == ("stop" if stopped else "length")
        assert answers[handle] == (answer[: answer.index(end)] if stopped else answer[:length])
    assert set(reasons.values()) == {"stop", "length"}
    assert decoder.step() == []


def test_a_seed_writes_the_same_whatever_its_neighbours(model, batches):
    want = [alone(model, batch, WARM) for batch in batches]
    decoder, answers = Decoder(model, NO_END), {}
    others = Sampling(max_new_tokens=6, temperature=0.7, top_p=0.8, seed=9)
    decoder.join(batches[2], [others] * count(batches[2]))
    collect(decoder, answers, steps=2)
    handles = [decoder.join(batch, [WARM] * count(batch)) for batch in batches]
    collect(decoder, answers)
    assert [[answers[handle] for handle in row] for row in handles] == want
    other_seed = Sampling(max_new_tokens=8, temperature=1.5, seed=4)
    assert alone(model, batches[0], other_seed) != want[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(8, temperature=1e-30),
        Sampling(8, temperature=1e-300),
        Sampling(8, temperature=2, top_k=1),
        Sampling(8, temperature=2, top_p=1e-12),
        Sampling(8, temperature=1e-5, top_k=5, top_p=0.9),
    ],
)
def test_the_limits_of_sampling_are_greedy(model, batches, sampling):
    for batch in batches:
        assert alone(model, batch, sampling) == alone(model, batch, Sampling(8))


def draws(logits, number=4000, **settings):
    """How often each token is drawn."""
    sampling = Sampling(**({"temperature": 1.0} | settings))
    generator = torch.Generator().manual_seed(0)
    tokens = sample(logits.expand(number, -1), [sampling] * number, [generator] * number)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / number


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    logits = torch.tensor([1.0, 3.0, 2.0, 0.5, -20.0])
    expected = {
        (): logits.softmax(-1),
        (("temperature", 2.0),): (logits / 2).softmax(-1),
        (("top_k", 2),): torch.tensor([-math.inf, 3, 2, -math.inf, -math.inf]).softmax(-1),
        # of 0.63, 0.23, 0.09, 0.05 the first three reach 0.9
        (("top_p", 0.9),): torch.tensor([1, 3, 2, -math.inf, -math.inf]).softmax(-1),
        # top-p counts what top-k has left: 0.73 and 0.27
        (("top_k", 2), ("top_p", 0.7)): torch.tensor([0.0, 1, 0, 0, 0]),
    }
    for settings, probabilities in expected.items():
        torch.testing.assert_close(draws(logits, **dict(settings)), probabilities, atol=0.03, rtol=0)


def test_the_cache_keeps_its_memory_within_its_capacity(model, batches):
    decoder = Decoder(model, NO_END)
    decoder.join(batches[2], [Sampling(100)] * 3)
    decoder.step()
    cache = decoder._memory._cache
    layer, capacity = cache.layers[0], cache.capacity
    place = layer.keys.data_ptr()
    while cache.lengths[0] + 3 <= capacity:
        assert (cache.capacity, layer.keys.data_ptr()) == (capacity, place)
        decoder.step()
    for _ in range(3):
        decoder.step()
    assert cache.capacity > capacity


def test_the_bank_is_routed_when_members_change_and_not_at_every_step(model, batches, monkeypatch):
    decoder, routed = Decoder(model, NO_END), []
    route = model.bank.route
    monkeypatch.setattr(model.bank, "route", lambda names: (routed.append(list(names)), route(names)))
    decoder.join(batches[0], [Sampling(9)])
    decoder.join(batches[3], [Sampling(4)])
    while decoder:
        decoder.step()
    assert routed == [["prompt"], ["lora"], ["prompt", "lora"], ["prompt"]]


@pytest.mark.parametrize(("worth", "parts"), [(1, 4), (10**6, 1)])
def test_a_batch_of_unlike_lengths_is_answered_in_its_own_order(
    model, conversations, features_of, monkeypatch, worth, parts
):
    """Read in one part, or in parts of like length."""
    monkeypatch.setattr(prefill, "WORTH", worth)
    rows = [
        conversations(images, *QUESTIONS[:number], prompts=True)
        for images, number in [("", 1), ("abc", 3), ("", 2), ("ab", 2), ("a", 1)]
    ]
    packed = [pack(row) for row in rows]
    features = torch.stack([features_of(image) for row in packed for image in row.images])
    names = ["lora", None, "prefix", "ia3", "prompt"]
    batch = collate(packed, features, names)
    assert len(prefill.prefill(model, batch)) == parts
    together = generate(model, batch, NO_END, 6)
    for row, name, answers in zip(packed, names, together, strict=True):
        own = torch.stack([features_of(image) for image in row.images]) if row.images else None
        assert generate(model, collate([row], own, [name]), NO_END, 6) == [answers]


def test_greedy_text_of_the_base_is_hugging_faces_own(make_model, make_batch, conversations):
    model = make_model()
    (prompt,) = conversations("", ("is red a color?", ""), prompts=True)
    ids = torch.tensor([prompt.ids])
    model.bank.route([None])
    theirs = model.language_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0, ids.shape[1] :].tolist()
    assert generate(model, make_batch([[prompt]]), NO_END, 40) == [[theirs]]


def test_eager_attention_is_the_models_own_again_afterwards(model, batches):
    config = model.language_model.get_decoder().config
    before = config._attn_implementation
    alone(model, batches[0], Sampling(3))
    assert config._attn_implementation == before == "eager"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(RefusedError, match=f"{next(iter(settings))} is "):
        Sampling(**settings)


def test_a_refused_batch_changes_nothing_for_those_that_are_there(model, batches):
    decoder = Decoder(model, NO_END)
    (handle,) = decoder.join(batches[0], [Sampling(6)])
    with pytest.raises(RefusedError, match="2 sampling settings for 3 conversations"):
        decoder.join(batches[2], [Sampling(6)] * 2)
    batches[3].adapters = ["nobody"]
    with pytest.raises(RefusedError, match="no finetune 'nobody'"):
        decoder.join(batches[3], [Sampling(6)])
    assert collect(decoder, {})[handle] == alone(model, batches[0], Sampling(6))[0]


def test_a_row_that_moves_into_a_longer_ones_place_meets_nothing_of_it(model, batches, poison):
    """When a row leaves, the last one moves into its place, and what the longer one wrote there must not reach it."""
    (want,) = alone(model, batches[3], Sampling(20))[:1]
    poison(model.bank, "ia3")
    decoder, answers = Decoder(model, NO_END), {}
    sick = decoder.join(batches[5], [Sampling(60)] * count(batches[5]))
    collect(decoder, answers, steps=35)
    handle, *others = decoder.join(batches[3], [Sampling(20)] * count(batches[3]))
    for other in others:
        decoder.leave(other)
    collect(decoder, answers, steps=2)
    for each in sick:
        decoder.leave(each)
    assert collect(decoder, answers)[handle] == want


def test_what_a_step_gathers_is_kept_until_members_or_weights_change(model, batches, monkeypatch, poison):
    gathered = []
    gather = lora.lora_of_rows
    monkeypatch.setattr(lora, "lora_of_rows", lambda *given: (gathered.append(1), gather(*given))[1])
    places = sum(isinstance(stack, lora.LoraStack) for stack in model.bank.stacks.values())
    decoder = Decoder(model, NO_END)
    handles = [decoder.join(batch, [Sampling(30)] * count(batch)) for batch in (batches[3], batches[1])]

    def gathers():
        gathered.clear()
        decoder.step()
        return len(gathered)

    assert [gathers() for _ in range(3)] == [places, 0, 0]
    decoder.leave(handles[1][0])
    assert [gathers() for _ in range(2)] == [places, 0]
    assert decoder._hidden.isfinite().all()
    poison(model.bank, "lora")
    assert gathers() == places
    assert decoder._hidden[0].isnan().all(), "the step reads the weights as they are"
    assert model.bank.routing.gathered is None, "nothing is kept for other forwards"


class Waits(TorchDispatchMode):
    """Counts the operators whose result the host must wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexed = func.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if indexed or func.overloadpacket in WAITED_FOR:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


WAITED_FOR = {
    getattr(torch.ops.aten, name)
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero")
}


def test_a_step_waits_for_the_device_once(model, batches, monkeypatch):
    """To read the tokens that were written."""
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda own: (lists.append(1), tolist(own))[1])
    decoder = Decoder(model, NO_END)
    for batch in batches:
        decoder.join(batch, [Sampling(9)] * count(batch))
    decoder.step()
    lists.clear()
    with Waits() as waits:
        decoder.step()
    assert (waits.found, len(lists)) == ([], 1)


def test_what_all_rows_begin_with_is_read_once_and_the_same(model, make_batch, conversations, monkeypatch):
    """For every kind of finetune, whose virtual tokens stand before it."""
    rows = [conversations(images or "c", *QUESTIONS[:2], prompts=True) for images in IMAGES]
    batch = make_batch([*rows, rows[0]], [*NAMES, "lora"])
    shared = prefill.shared_columns(batch)
    assert shared == batch.input_ids[0].tolist().index(IMAGE_TOKEN) > 4
    decode, read = model.reader.decode, []
    monkeypatch.setattr(
        model.reader,
        "decode",
        lambda embeds, *a, **k: read.append(embeds.shape[:2]) or decode(embeds, *a, **k),
    )
    (want,), (found,) = (prefill.prefill(model, batch, share) for share in (False, True))
    prompts = read[0][1] - batch.input_ids.shape[1]
    assert read[1:] == [(len(set(NAMES)), prompts + shared), (7, batch.input_ids.shape[1] - shared)]
    torch.testing.assert_close(found.hidden, want.hidden, atol=1e-5, rtol=1e-5)
    assert (found.last_positions, found.invoked) == (want.last_positions, want.invoked)
    used = want.segments != PADDING
    assert torch.equal(found.segments, want.segments)
    for own, layer in zip(found.cache.layers, want.cache.layers, strict=True):
        for name in ("keys", "values"):
            ours, theirs = (getattr(each, name).transpose(1, 2)[used] for each in (own, layer))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [["a"], ["", ""], ["a", ""]])
def test_what_is_not_worth_it_or_not_the_same_is_not_shared(rows, make_batch, conversations):
    questions = [("one", ""), ("completely other", "")]
    made = [conversations(images, own, prompts=True) for images, own in zip(rows, questions, strict=False)]
    batch = make_batch(made, [None] * len(made))
    ids = [row[: prefill.shared_columns(batch)] for row in batch.input_ids.tolist()]
    assert all(row == ids[0] and IMAGE_TOKEN not in row for row in ids)
    assert bool(ids[0]) == (len(rows) > 1)


def test_equal_prompts_are_shared_but_for_their_last_token(model, make_batch, conversations):
    row = conversations("", QUESTIONS[0], prompts=True)
    batch = make_batch([row, row], [None, "lora"])
    assert prefill.shared_columns(batch) == batch.input_ids.shape[1] - 1
    want, found = (prefill.prefill(model, batch, share)[0].hidden for share in (False, True))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
