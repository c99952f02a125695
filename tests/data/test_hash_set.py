"""The set of hashes in 8 bytes each: it says what a set of Python's says, and takes a tenth of it."""

import random
import tracemalloc

import pytest

from mmpeft.data import hash_set
from mmpeft.data.hash_set import HashSet
from mmpeft.data.records import ImageRoot, RecordReader
from tests.data.layouts.rows import said


@pytest.mark.parametrize("recent", [1, 7, 2**15])
def test_it_is_a_set(monkeypatch, recent):
    monkeypatch.setattr(hash_set, "RECENT", recent)
    draw, plain, own = random.Random(0), set(), HashSet()
    edges = [-(2**63), 2**63 - 1, 0, -1]
    for value in [*edges, *(draw.randrange(-500, 500) for _ in range(3000)), *edges]:
        assert own.add(value) is (value not in plain)
        plain.add(value)
        assert len(own) == len(plain)


def test_many_take_few_bytes_each():
    draw, own = random.Random(0), HashSet()
    tracemalloc.start()
    try:
        for _ in range(100_000):
            own.add(draw.getrandbits(64) - 2**63)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(own) == 100_000
    assert held < 100_000 * 8 * 1.2 + 3e6, "and the latest as a set"
    assert peak < 100_000 * 8 * 2.2 + 6e6


def test_ids_of_images_are_counted_on_wherever_their_hashes_lie(monkeypatch, tmp_path):
    monkeypatch.setattr(hash_set, "RECENT", 2)
    (tmp_path / "a.png").touch()
    reader = RecordReader(ImageRoot(tmp_path))
    row = {"image": "a.png", "conversations": said("a?", "b")}
    ids = [reader.read({**row, "id": name}, "made", "here")[0]["id"] for name in "7778787"]
    assert ids == ["7", "7#2", "7#3", "8", "7#4", "8#2", "7#5"]
