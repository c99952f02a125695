"""Packing: what a packed row holds, and how examples are dealt to rows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.data.packing import PREFIX, pack, plan_rows, shared_prefix
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, Encoded, Template
from tests.tiny import make_record

X = IGNORE_INDEX
END = 99

words = st.lists(st.integers(1, 4), min_size=1, max_size=4)
"""Few token ids, so that conversations share more than they should by chance."""


def conversation(prompt, answer, images=()):
    """The prompt's last token and the answer's tokens carry the answer and `END` as targets."""
    ids = [*prompt, *answer]
    return Encoded(ids, [X] * (len(prompt) - 1) + [*answer, END], list(images))


def unpacked(row, segment):
    """A conversation of a packed row as (id, target, position) triples."""
    triples = zip(row.segments, row.ids, row.targets, row.positions, strict=True)
    return [(token, target, place) for owner, token, target, place in triples if owner in (PREFIX, segment)]


def test_worked_example_of_the_module():
    image = [1, 2, *[IMAGE_TOKEN] * 2, 3, 4]
    first = conversation([*image, 10, 11, 12, 13], [20], ["a.png"])
    second = conversation([*image, 30, 31, 32, 33, 34], [40, 41], ["a.png"])
    row = pack([first, second])
    assert row.ids == [*image, 10, 11, 12, 13, 20, 30, 31, 32, 33, 34, 40, 41]
    assert row.segments == [0] * 6 + [1] * 5 + [2] * 7
    assert row.positions == [*range(6), *range(6, 11), *range(6, 13)]
    assert row.targets == [X] * 6 + [X, X, X, 20, END] + [X, X, X, X, 40, 41, END]
    assert row.images == ["a.png"]


def test_a_single_conversation_is_one_segment_without_prefix():
    only = conversation([1, IMAGE_TOKEN, 2], [3], ["a.png"])
    row = pack([only])
    assert row.segments == [1] * 4
    assert (row.ids, row.targets, row.positions, row.images) == (
        only.ids,
        only.targets,
        [0, 1, 2, 3],
        ["a.png"],
    )


@given(words, st.lists(st.tuples(words, words), min_size=1, max_size=5), st.booleans())
def test_every_conversation_can_be_read_back_and_the_prefix_carries_no_target(start, tails, with_image):
    start = [*start, IMAGE_TOKEN, IMAGE_TOKEN] if with_image else start
    conversations = [
        conversation([*start, *question], answer, ["a"] * with_image) for question, answer in tails
    ]
    row = pack(conversations)
    for segment, one in enumerate(conversations, start=PREFIX + 1):
        assert unpacked(row, segment) == list(zip(one.ids, one.targets, range(len(one.ids)), strict=True))
    prefix = [t for t, segment in zip(row.targets, row.segments, strict=True) if segment == PREFIX]
    assert set(prefix) <= {IGNORE_INDEX}
    assert row.ids.count(IMAGE_TOKEN) == 2 * len(row.images)


def test_one_question_with_different_answers_keeps_a_place_for_each():
    row = pack([conversation([1, 2, 3], [answer]) for answer in (7, 8, 7)])
    assert row.segments == [0, 0, 1, 1, 2, 2, 3, 3]
    assert row.targets == [X, X, 7, END, 8, END, 7, END]


def test_prompts_pack_although_they_have_no_targets():
    prompts = [Encoded([1, 2, 3], [X] * 3), Encoded([1, 2, 3], [X] * 3), Encoded([1, 2], [X] * 2)]
    row = pack(prompts)
    assert row.segments == [0, 1, 1, 2, 2, 3]
    assert shared_prefix(prompts) == 1, "each needs at least one token of its own to answer from"


@pytest.mark.parametrize("layout", ["minigpt", "plain"])
@pytest.mark.parametrize(
    "question", ["<image>what?", "<image><image>same?", "is <image> like <image>?", "<image>"]
)
@pytest.mark.parametrize("as_prompts", [False, True])
def test_images_of_a_row_match_its_image_tokens(tiny_tokenizer, layout, question, as_prompts):
    template = Template(tiny_tokenizer, 3, layout)
    images = ["a.png", "b.png"][: question.count("<image>")]
    texts = [question, question + " or not?", "say " + question]
    systems = [{}, {"system": "be sure"}, {"system": "say it"}]
    rows = [make_record(text, images=images, **own) for text, own in zip(texts, systems, strict=True)]
    encoded = [(template.encode_prompt if as_prompts else template.encode)(row) for row in rows]
    row = pack(encoded)
    assert row.ids.count(IMAGE_TOKEN) == 3 * len(row.images)
    owners = [o for o, token in zip(row.segments, row.ids, strict=True) if token == IMAGE_TOKEN][::3]
    for segment in range(1, len(rows) + 1):
        seen = [image for image, owner in zip(row.images, owners, strict=True) if owner in (PREFIX, segment)]
        assert seen == images


@given(st.data())
@settings(deadline=None)
def test_rows_hold_every_example_once_within_their_limits_and_under_one_key(data):
    budget, most = data.draw(st.integers(20, 60)), data.draw(st.integers(1, 6))
    examples = data.draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), max_size=40))
    keys, lengths = [key for key, _ in examples], [length for _, length in examples]
    order = data.draw(st.permutations(range(len(examples))))
    rows = plan_rows(keys, lengths, order, budget, most)
    assert sorted(index for row in rows for index in row) == list(range(len(examples)))
    for row in rows:
        assert 1 <= len(row) <= most
        assert sum(lengths[index] for index in row) <= budget
        assert len({keys[index] for index in row}) == 1


def test_one_conversation_a_row_switches_packing_off():
    assert list(plan_rows(["a"] * 3, [1] * 3, [2, 0, 1], 100, 1)) == [[2], [0], [1]]


def test_an_example_goes_where_it_fits_best():
    # 6 and 7 open two rows of 10; 3 fills the second exactly, 4 the first
    assert list(plan_rows(["a"] * 4, [6, 7, 3, 4], [0, 1, 2, 3], 10, 9)) == [[0, 3], [1, 2]]
