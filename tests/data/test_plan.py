"""The plan of an epoch in arrays is the one that lists of rows would give, row by row."""

import bisect
import random
from collections import defaultdict
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.data import plan as module
from mmpeft.data.plan import PackingConfig, plan_batches


def plan_in_lists(keys, lengths, packing, order, shuffle):
    """The same by the words of the docstrings alone."""
    most = min(packing.max_conversations, packing.batch_size)
    groups = defaultdict(list)
    for number in order:
        groups[keys[number]].append(number)
    rows = [row for own in groups.values() for row in best_fit(own, lengths, packing.max_length, most)]
    shuffle(rows)
    window, seen, places = module.BATCHES_SORTED_TOGETHER * packing.batch_size, 0, []
    for row in rows:
        tokens = sum(lengths[number] for number in row)
        places.append((seen // window, -tokens if seen // window % 2 else tokens))
        seen += len(row)
    rows = [rows[number] for number in sorted(range(len(rows)), key=places.__getitem__)]
    batches = cut(rows, max(1, round(len(keys) / packing.batch_size)))
    shuffle(batches)
    return batches


def best_fit(members, lengths, max_length, most):
    rows, room = [], []
    for number in members:
        place = bisect.bisect_left(room, (lengths[number], -1))
        free, row = room.pop(place) if place < len(room) else (max_length, len(rows))
        rows += [[]] * (row == len(rows))
        rows[row] = [*rows[row], number]
        if len(rows[row]) < most and free > lengths[number]:
            bisect.insort(room, (free - lengths[number], row))
    return rows


def cut(rows, wanted):
    total, done, batches = sum(map(len, rows)), 0, [[]]
    for number, row in enumerate(rows):
        full = done + len(row) / 2 > len(batches) * total / wanted
        if batches[-1] and len(batches) < wanted and (full or len(rows) - number <= wanted - len(batches)):
            batches.append([])
        batches[-1].append(row)
        done += len(row)
    return batches


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_it_is_that_of_lists(data):
    examples = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=400))
    keys, lengths = [str(key) for key, _ in examples], [length for _, length in examples]
    packing = PackingConfig(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), max_length=60)
    seed, numbers = data.draw(st.integers(0, 9)), range(len(examples))
    order = random.Random(seed).choices(numbers, k=len(numbers))  # as where files are mixed by weight
    one, other = random.Random(seed), random.Random(seed)
    with patch.object(module, "BATCHES_SORTED_TOGETHER", data.draw(st.integers(1, 3))):
        plan = plan_batches(keys, lengths, packing, order, one.shuffle)
        assert list(plan) == plan_in_lists(keys, lengths, packing, order, other.shuffle)
    assert [plan[number] for number in range(-len(plan), 0)] == list(plan)
