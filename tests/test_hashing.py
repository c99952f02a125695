"""Identities of plain data."""

import pytest

from mmpeft.hashing import hash_json, hash_rows


@pytest.mark.parametrize("rows", [[], [1], [["a", None], {"b": 2, "a": "Ü"}, b"\xff"], ["1, 2"], [1, 2]])
def test_rows_made_one_at_a_time_hash_as_their_list(rows):
    assert hash_rows(iter(rows)) == hash_json(rows)
