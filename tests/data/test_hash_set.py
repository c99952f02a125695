"""The set of hashes: it says what a set of Python's says in a tenth of the memory, and of very many in no more."""

import random
import subprocess
import sys
import tracemalloc

import pytest

from mmpeft.data import hash_set
from mmpeft.data.hash_set import HashSet
from mmpeft.data.records import ImageRoot, RecordReader
from tests.data.layouts.rows import said


@pytest.mark.parametrize(("recent", "held"), [(1, 2**17), (7, 2**17), (2**15, 2**17), (7, 100), (1, 1)])
def test_it_is_a_set(monkeypatch, recent, held):
    monkeypatch.setattr(hash_set, "RECENT", recent)
    monkeypatch.setattr(hash_set, "HELD", held)
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


def test_very_many_take_no_more():
    """Than those from which they lie on the disk; what SQLite holds is seen in the memory of the process alone."""
    code = """
import random, resource
from mmpeft.data import hash_set
hash_set.HELD = 2**15
draw, own, seen = random.Random(0), hash_set.HashSet(), []
for number in range(250_000):
    assert own.add(draw.getrandbits(64) - 2**63)
    if number in (50_000, 249_999):
        seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(seen[1] - seen[0])
"""
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert int(told.stdout) < 1500, "in kB; 200,000 hashes have 1,600"


def test_ids_of_images_are_counted_on_wherever_their_hashes_lie(monkeypatch, tmp_path):
    monkeypatch.setattr(hash_set, "RECENT", 2)
    (tmp_path / "a.png").touch()
    reader = RecordReader(ImageRoot(tmp_path))
    row = {"image": "a.png", "conversations": said("a?", "b")}
    ids = [reader.read({**row, "id": name}, "made", "here")[0]["id"] for name in "7778787"]
    assert ids == ["7", "7#2", "7#3", "8", "7#4", "8#2", "7#5"]
