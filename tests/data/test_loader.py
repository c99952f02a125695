"""The loader: a seeded order, every example once an epoch, and going on exactly where a checkpoint was taken."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmpeft.data.batch import Conversations
from mmpeft.data.loader import JointLoader, PackedLoader
from mmpeft.data.packing import Role
from mmpeft.data.plan import PackingConfig, split_evenly
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, ChoiceSet, Encoded

NUM_EXAMPLES = 23


def examples():
    """Three images with six questions each, of different length, and five texts."""
    encoded = []
    for number in range(NUM_EXAMPLES):
        with_image = number < 18
        ids = [1, *([IMAGE_TOKEN] * 2 if with_image else []), *range(10, 11 + number % 5), 100 + number]
        targets = [IGNORE_INDEX] * (len(ids) - 1) + [7]
        encoded.append(Encoded(ids, targets, [f"{number // 6}.png"] if with_image else []))
    return encoded


def features(images):
    return torch.stack([torch.full((2, 4), float(image[0])) for image in images])


def make_loader(seed: int | None = 0, **packing):
    sizes = {"batch_size": 5, "max_conversations": 3, "max_length": 64} | packing
    return PackedLoader(examples(), features, PackingConfig(**sizes), "mine", seed)


def by_row(batch):
    """The numbers of the examples of every row."""
    table = batch.conversations
    found = [table.examples[table.rows == row].tolist() for row in range(len(batch.adapters))]
    choices = set(table.rows[table.roles != Role.ANSWER].tolist())
    return [own[:1] if row in choices else own for row, own in enumerate(found)]


def order(batches):
    return [by_row(batch) for batch in batches]


def same(one, other):
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, Tensor | np.ndarray):
            assert (left == right).all(), field.name
        elif isinstance(left, Conversations):
            same(left, right)
        else:
            assert left == right, field.name


def test_the_same_seed_gives_the_same_batches():
    for one, other in zip(make_loader(3), make_loader(3), strict=True):
        same(one, other)


def test_another_seed_or_epoch_gives_another_order():
    loader = make_loader(0)
    first, second = order(loader), order(loader)
    assert first != second
    assert first != order(make_loader(1))


@pytest.mark.parametrize("seed", [None, 0, 5])
def test_every_epoch_has_every_example_once(seed):
    loader = make_loader(seed)
    for _ in range(3):
        batches = order(loader)
        assert len(batches) == len(loader)
        assert sorted(n for batch in batches for row in batch for n in row) == list(range(NUM_EXAMPLES))


def test_without_seed_the_order_is_always_the_same():
    loader = make_loader(None)
    assert order(loader) == order(loader) == order(make_loader(None))


def test_the_last_batch_is_used_although_it_is_not_full():
    loader = make_loader(None, batch_size=4, max_conversations=1)
    sizes = sorted(len(batch.input_ids) for batch in loader)
    assert sizes == [3, 4, 4, 4, 4, 4]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.data())
def test_rows_are_cut_into_just_as_many_batches_as_wanted(sizes, data):
    wanted = data.draw(st.integers(1, len(sizes)))
    batches = split_evenly(sizes, wanted)
    assert len(batches) == wanted
    assert all(batches)
    assert sum(batches) == len(sizes)


@given(st.data())
@settings(deadline=None)
def test_every_epoch_has_the_same_number_of_batches(data):
    encoded = [
        Encoded(list(range(length)), [0] * length, [image] if image else [])
        for image, length in data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), min_size=1))
    ]
    packing = PackingConfig(data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8)), max_length=40)
    loader = PackedLoader(encoded, features, packing, None, 0)
    counts = set()
    for loader.epoch in range(5):
        plan = loader._plan_epoch()
        counts.add(len(plan))
        assert all(plan)
        assert sorted(n for batch in plan for row in batch for n in row) == list(range(len(encoded)))
    assert counts == {len(loader)}


def test_more_rows_a_batch_than_there_are_gives_one_batch():
    assert len(list(make_loader(batch_size=1000))) == 1


@pytest.mark.parametrize("consumed", range(10))
def test_a_loaded_state_goes_on_with_exactly_the_next_batch(consumed):
    uninterrupted = make_loader(1)
    assert len(uninterrupted) == 5, "so that the states reach into the second epoch and both epochs' ends"
    batches = [*uninterrupted, *uninterrupted, *uninterrupted]

    interrupted, seen = make_loader(1), 0
    state = interrupted.state_dict()
    while seen < consumed:
        for _ in interrupted:
            seen, state = seen + 1, interrupted.state_dict()
            if seen == consumed:
                break

    resumed = make_loader(1)
    resumed.load_state_dict(state)
    rest = list(resumed)
    while consumed + len(rest) < len(batches):
        rest += list(resumed)
    for one, other in zip(rest, batches[consumed:], strict=True):
        same(one, other)


@pytest.mark.parametrize("seed", [None, 0])
def test_an_iteration_that_was_broken_off_does_not_shorten_the_next(seed):
    """Lightning's sanity check reads the first validation batches and leaves."""
    loader = make_loader(seed)
    for _ in loader:
        break
    assert len(list(loader)) == len(loader)


def test_rows_carry_the_adapter_and_the_features_of_their_images():
    for batch in make_loader(batch_size=3):
        assert set(batch.adapters) == {"mine"}
        assert len(batch.image_rows) == (0 if batch.features is None else len(batch.features))
        for image, row in enumerate(batch.image_rows.tolist()):
            assert float(batch.features[image, 0, 0]) == by_row(batch)[row][0] // 6


def test_every_batch_of_training_has_a_dropout_seed_of_its_own():
    """Of its seed, epoch and place alone: the other finetunes of a joint run have no part in it."""
    loader = make_loader(0)
    alone = [batch.dropout_seeds["mine"] for _ in range(2) for batch in loader]
    assert len(set(alone)) == 2 * len(loader)
    assert alone[: len(loader)] == [batch.dropout_seeds["mine"] for batch in make_loader(0)]
    assert not set(alone) & {batch.dropout_seeds["mine"] for batch in make_loader(1)}
    longer = make_loader(0, batch_size=3)
    longer.adapter = "longer"
    joint = list(JointLoader({"longer": longer, "mine": make_loader(0)}, {}, cycle=True))
    assert [batch.dropout_seeds["mine"] for batch in joint] == alone[: len(longer)]
    assert all(batch.dropout_seeds.keys() == {"mine", "longer"} for batch in joint)


def test_nothing_is_seeded_without_seed_or_adapter():
    base = make_loader(0)
    base.adapter = None
    assert not any(batch.dropout_seeds for loader in (make_loader(None), base) for batch in loader)


def test_batches_of_text_alone_have_no_features():
    loader = PackedLoader(examples()[18:], features, PackingConfig(), None, 0)
    assert all(batch.features is None for batch in loader)


def test_an_epoch_sees_files_by_weight_and_has_its_usual_length():
    """18 questions about images and 5 texts, wanted half and half: every text twice, three of them thrice."""
    plain = make_loader()
    loader = PackedLoader(examples(), features, PackingConfig(5, 3, 64), "mine", 0, mix=[(18, 1.0), (5, 1.0)])
    for _ in range(2):
        seen = [number for batch in loader for row in by_row(batch) for number in row]
        assert (sum(n < 18 for n in seen), sum(n >= 18 for n in seen)) == (12, 11)
        assert {seen.count(n) for n in range(18)} == {0, 1}
        assert {seen.count(n) for n in range(18, 23)} == {2, 3}
        assert len(loader) == len(plain)


def test_a_question_with_choices_has_a_row_of_its_own():
    first, *others = examples()
    choices = ChoiceSet([first, others[0], others[1]], right=1)
    loader = PackedLoader([choices, *others], features, PackingConfig(50, 50, 640), "mine", None)
    (batch,) = loader
    assert sorted(len(row) for row in by_row(batch)) == [1, 5, 5, 6, 6]
    table = batch.conversations
    (row,) = [number for number, own in enumerate(by_row(batch)) if 0 in own]
    assert table.roles[table.rows == row].tolist() == [Role.WRONG, Role.RIGHT, Role.WRONG]
    assert (table.roles[table.rows != row] == Role.ANSWER).all()
    assert table.num_examples == 23
