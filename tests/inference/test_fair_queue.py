"""The queue: the longest waiting first, and a share for every owner."""

import pytest

from mmpeft.inference.fair_queue import FairQueue


def always(_):
    return True


def fill(queue, owner, number):
    """How many of so many find a place."""
    taken = 0
    for each in range(number):
        if queue.has_place(owner):
            queue.put(owner, (owner, each))
            taken += 1
    return taken


def test_one_that_floods_leaves_half_of_the_places_and_two_a_third():
    queue = FairQueue(max_rows=4, max_waiting=16)
    assert fill(queue, "flood", 100) == 4 + 8
    assert fill(queue, "other", 1) == 1
    alone = FairQueue(max_rows=4, max_waiting=16)
    assert [fill(alone, "ab"[n % 2], 1) for n in range(100)].count(1) >= 4 + 10
    assert fill(alone, "late", 1) == 1


@pytest.mark.parametrize(("rows", "waiting"), [(4, 16), (1, 4), (3, 5), (2, 0), (32, 32)])
def test_what_one_owner_may_have_alone(rows, waiting):
    queue = FairQueue(rows, waiting)
    assert fill(queue, "flood", 100) == queue.places_of_one


def test_who_has_the_fewest_rows_goes_next_and_then_who_waits_longest():
    queue = FairQueue(max_rows=3, max_waiting=100)
    fill(queue, "flood", 5)
    fill(queue, "late", 1)
    order = [queue.take(always)[0] for _ in range(3)]
    assert order == ["flood", "late", "flood"]
    assert queue.take(always) is None, "no row is free"
    queue.give_back("flood")
    fill(queue, "new", 1)
    assert queue.take(always) == ("new", 0)
    queue.give_back("new")
    assert queue.take(always) == ("flood", 2)


def test_who_is_not_ready_holds_nobody_up():
    queue = FairQueue(max_rows=3, max_waiting=100)
    fill(queue, "a", 2)
    fill(queue, "b", 1)
    assert queue.take(lambda item: item != ("a", 0)) == ("a", 1)
    assert queue.take(lambda item: item[0] == "b") == ("b", 0)
    assert queue.remove(lambda item: item == ("a", 0)) == [("a", 0)]
    assert len(queue) == 0
    assert queue.free_rows == 1
