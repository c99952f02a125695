"""Files are seen by weight, and none of their examples twice before all once."""

import random
from collections import Counter

import pytest

from mmpeft.data.sampling import mixed_order


def shares(order, sizes):
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return [sum(end - size <= n < end for n in order) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize(
    ("sizes", "weights", "want"),
    [([10, 30], [1, 3], [10, 30]), ([10, 30], [1, 1], [20, 20]), ([5, 5, 90], [8, 1, 1], [80, 10, 10])],
)
def test_an_epoch_is_shared_out_by_weight(sizes, weights, want):
    order = mixed_order(sizes, weights, random.Random(0))
    assert shares(order, sizes) == want
    assert len(order) == sum(sizes)


def test_no_example_comes_back_before_its_whole_file_was_seen():
    counts = Counter(mixed_order([10, 30], [3, 1], random.Random(0)))
    assert {counts[n] for n in range(10)} == {3}
    assert {counts[n] for n in range(10, 40)} <= {0, 1}


@pytest.mark.parametrize(("sizes", "weights"), [([100, 0], [4, 1]), ([100, 100], [1000, 1])])
def test_a_file_that_would_never_be_seen_is_refused(sizes, weights):
    with pytest.raises(ValueError, match="file 2 of 2 has"):
        mixed_order(sizes, weights, random.Random(0))


def test_files_come_mixed_and_the_generator_decides():
    first, again, other = (mixed_order([50, 50], [1, 1], random.Random(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert max(map(len, "".join("a" if n < 50 else "b" for n in first).split("b"))) < 20
