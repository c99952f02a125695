"""The loader: a seeded order, every example once an epoch, and going on exactly where a checkpoint was taken."""

import time
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmpeft.data.batch import Conversations, StepCounts, concatenate
from mmpeft.data.loader import JointLoader, PackedLoader
from mmpeft.data.packing import Role
from mmpeft.data.plan import PackingConfig, split_evenly
from mmpeft.data.shares import Share
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


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_nothing(workers, monkeypatch):
    """Also where a batch takes the longer, the earlier it is."""
    begin = PackedLoader._begin

    def slow(self, plan, epoch, number):
        time.sleep(0.002 * (len(plan) - number))
        return begin(self, plan, epoch, number)

    one, many = make_loader(3), make_loader(3)
    one.workers, many.workers = 1, workers
    wanted = [*one, *one]
    monkeypatch.setattr(PackedLoader, "_begin", slow)
    for left, right in zip(wanted, [*many, *many], strict=True):
        same(left, right)


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


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("consumed", range(10))
def test_a_loaded_state_goes_on_with_exactly_the_next_batch(consumed, workers):
    uninterrupted = make_loader(1)
    assert len(uninterrupted) == 5, "so that the states reach into the second epoch and both epochs' ends"
    batches = [*uninterrupted, *uninterrupted, *uninterrupted]

    interrupted, seen = make_loader(1), 0
    interrupted.workers = workers
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


def ranked_examples():
    """Every third question has choices of unequal length."""
    plain = examples()
    return [
        ChoiceSet([one, plain[18 + number % 5]], right=number % 2) if number % 3 == 0 else one
        for number, one in enumerate(plain)
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_divide_every_batch_and_know_what_its_step_counts(size):
    """Of two batches whose gradients are added up; the last of the epoch's steps has fewer."""
    every, packing = ranked_examples(), PackingConfig(5, 3, 64)

    def step_of(number, there):
        start = number // 2 * 2
        return range(start, min(start + 2, there))

    def of(share):
        return PackedLoader(every, features, packing, "mine", 4, share=share, step_of=step_of)

    whole, shares = list(of(Share())), [list(of(Share(rank, size))) for rank in range(size)]
    for number, (batch, *own) in enumerate(zip(whole, *shares, strict=True)):
        assert all(part.dropout_seeds == batch.dropout_seeds for part in own)
        assert sorted(row for part in own for row in by_row(part)) == sorted(by_row(batch))
        numbered = {
            n: row for part in own for n, row in zip(part.row_numbers.tolist(), by_row(part), strict=True)
        }
        assert [numbered[n] for n in range(len(by_row(batch)))] == by_row(batch)
        together = concatenate([whole[n] for n in step_of(number, len(whole))])
        table, places = together.conversations, (together.targets != IGNORE_INDEX).nonzero()
        roles = {(r, s): role for r, s, role in zip(table.rows, table.segments, table.roles, strict=True)}
        carrying = [roles[row, int(together.segments[row, column])] for row, column in places.tolist()]
        counts = StepCounts(
            sum(role != Role.WRONG for role in carrying),
            sum(role == Role.WRONG for role in carrying),
            int((table.roles == Role.RIGHT).sum()),
            int((table.roles != Role.ANSWER).sum()),
        )
        assert all(part.of_step == {"mine": counts} for part in [batch, *own])


def test_processes_of_a_joint_run_divide_each_finetunes_rows():
    def of(share):
        loaders = {}
        for number, name in enumerate(("few", "many")):
            loader = PackedLoader(
                examples()[: 1 if name == "few" else 23], features, PackingConfig(5, 3, 64), name, 0
            )
            loader.share, loader.first = share, number
            loaders[name] = loader
        return list(JointLoader(loaders, {}, cycle=False))

    steps = list(zip(of(Share()), *(of(Share(rank, 2)) for rank in range(2)), strict=True))
    for batch, *own in steps:
        for name in ("few", "many"):
            assert sum(part.adapters.count(name) for part in own) == batch.adapters.count(name)
    _, *first = steps[0]
    assert [part.adapters.count("few") for part in first] in ([1, 0], [0, 1])


def test_a_part_of_a_batch_is_its_rows():
    (batch,) = PackedLoader(ranked_examples(), features, PackingConfig(50, 3, 64), "mine", 0)
    rows = len(batch.adapters)
    cuts = [0, 1, 5, rows]
    parts = [batch.part(start, stop) for start, stop in pairwise(cuts)]
    assert [row for part in parts for row in by_row(part)] == by_row(batch)
    assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
    assert torch.equal(
        torch.cat([part.features for part in parts if part.features is not None]), batch.features
    )
    assert np.concatenate([part.row_numbers for part in parts]).tolist() == batch.row_numbers.tolist()
    for part, start in zip(parts, cuts, strict=False):
        host = part.on_host
        assert np.array_equal(host.segments, part.segments.numpy())
        assert np.array_equal(host.image_rows, part.image_rows.numpy())
        wanted = [
            row - start for row in batch.image_rows.tolist() if start <= row < start + len(part.adapters)
        ]
        assert part.image_rows.tolist() == wanted
