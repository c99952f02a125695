"""Prefetch: the order of what comes, what is made at once, and how it ends."""

import random
import threading
import time
from contextlib import closing
from itertools import islice

import pytest

from mmpeft.data.prefetch import ahead

SOON = 5
"""Seconds until a thread that waits for another gives up."""


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_come_in_order_and_end_one_after_the_other(workers):
    draw, ended = random.Random(0), []

    def begin(number):
        time.sleep(draw.random() / 500)

        def end():
            ended.append(number)
            return 10 * number

        return end

    assert list(ahead(begin, range(30), workers)) == [10 * number for number in range(30)]
    assert ended == list(range(30))


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_as_there_are_workers_begin_at_once(workers):
    together = threading.Barrier(workers)

    def begin(number):
        together.wait(SOON)
        return lambda: number

    assert list(ahead(begin, range(2 * workers), workers)) == list(range(2 * workers))


def test_the_next_are_made_while_one_is_in_use_and_no_more():
    made = [threading.Event() for _ in range(9)]

    def begin(number):
        return made[number].set

    with closing(ahead(begin, range(9), 2)) as items:
        next(items)
        assert all(event.wait(SOON) for event in made[:4])
        assert not made[4].is_set()


def test_an_error_comes_when_it_is_its_turn():
    def begin(number):
        if number == 4:
            raise ValueError("the fifth")
        return lambda: number

    with closing(ahead(begin, range(9), 3)) as items:
        assert list(islice(items, 4)) == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="the fifth"):
            next(items)


def test_nothing_is_left_running_when_nobody_wants_more():
    begun, before = [], {*threading.enumerate()}

    def begin(number):
        begun.append(number)
        return lambda: number

    with closing(ahead(begin, range(1000), 2)) as items:
        next(items)
    assert len(begun) <= 4
    assert not [own.name for own in {*threading.enumerate()} - before if "batches" in own.name]
