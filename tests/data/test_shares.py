"""Rows of a batch and batches of questions, divided among processes."""

import random

import pytest

from mmpeft.data.shares import Share


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_row_is_one_processs_and_their_tokens_are_balanced(size):
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(41)]
    shares = [Share(rank, size).of_rows(lengths) for rank in range(size)]
    assert sorted(row for own in shares for row in own) == list(range(41))
    assert all(own == sorted(own) for own in shares)
    loads = [sum(lengths[row] for row in own) for own in shares]
    assert max(loads) - min(loads) <= 10, "the shortest rows come last"
    assert [Share(rank, size).of_rows(lengths) for rank in range(size)] == shares


def test_fewer_rows_than_processes_leave_some_without():
    assert [Share(rank, 4).of_rows([5, 9]) for rank in range(4)] == [[1], [0], [], []]


def test_single_rows_of_several_finetunes_are_not_all_one_processs():
    owners = [[rank for rank in range(3) if Share(rank, 3).of_rows([7], first)] for first in range(6)]
    assert owners == [[0], [1], [2], [0], [1], [2]]


def test_what_may_be_done_in_any_order_is_done_once():
    items = list("abcdefg")
    assert [Share(rank, 3).of_items(items) for rank in range(3)] == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
