"""Kept prefixes: what is found is what was put there, under keys of content, within bounds."""

import pytest
import torch

from mmpeft.data.spans import IMAGE_TOKEN
from mmpeft.inference.reuse import Identity, Latest, PrefixCache, prefix_keys

BLOCK = 4
IDENTITY = Identity("base", "encoder", "adapter", "projector", False, False)


def keys_of(ids, images=(), acts_from=0, identity=IDENTITY):
    return prefix_keys(ids, images, [3] * len(images), acts_from, identity, BLOCK)


def layers_of(ids, num_layers=2):
    """Keys and values that tell their column's id, its place and their layer."""
    values = torch.tensor([[float(i), n] for n, i in enumerate(ids)])
    return [(values[None] + layer, values[None] - layer) for layer in range(num_layers)]


def same(found, wanted, columns):
    return all(
        torch.equal(own, other[:, :columns])
        for pair, others in zip(found, wanted, strict=True)
        for own, other in zip(pair, others, strict=True)
    )


def test_the_longest_known_prefix_is_found_across_rows_that_share_a_beginning():
    cache, first, second = PrefixCache(10**6, BLOCK), list(range(13)), [*range(8), 90, 91, 92, 93, 94]
    cache.put(keys_of(first), layers_of(first))
    assert cache.find(keys_of([7, *first])) == (0, [])
    columns, found = cache.find(keys_of(second))
    assert columns == 8
    assert same(found, layers_of(second), 8)
    before = cache.bytes
    cache.put(keys_of(second), layers_of(second))
    assert cache.bytes - before == before / 3, "what they share is kept once"
    for ids in (first, second):
        columns, found = cache.find(keys_of(ids))
        assert columns == 12
        assert same(found, layers_of(ids), 12)


def test_what_is_too_much_leaves_from_its_end_on():
    ids = list(range(12))
    size = PrefixCache(10**9, BLOCK)
    size.put(keys_of(ids), layers_of(ids))
    cache = PrefixCache(size.bytes, BLOCK)
    cache.put(keys_of(ids[:4]), layers_of(ids))
    cache.put(keys_of(ids[:8]), layers_of(ids))
    cache.put(keys_of(ids), layers_of(ids))
    assert cache.find(keys_of(ids))[0] == 12
    cache.put(keys_of([50, 51, 52, 53]), layers_of([50, 51, 52, 53]))
    assert cache.bytes <= size.bytes
    columns, found = cache.find(keys_of(ids))
    assert columns == 8
    assert same(found, layers_of(ids), 8)
    cache.put(keys_of(list(range(60, 90))), layers_of(list(range(60, 90))))
    assert cache.find(keys_of(ids))[0] == 8, "one that is larger than all together is not kept"


def test_nothing_is_kept_without_room():
    cache = PrefixCache(0, BLOCK)
    cache.put(keys_of(list(range(8))), layers_of(list(range(8))))
    assert cache.find(keys_of(list(range(8)))) == (0, [])


def test_who_asks_for_what_is_being_read_waits_until_it_is_there_or_given_up():
    cache, keys = PrefixCache(10**6, BLOCK), keys_of(list(range(12)))
    assert cache.begin(keys)
    assert not cache.begin(keys[:2])
    cache.put(keys[:1], layers_of(list(range(12))))
    cache.end(keys[:1])
    assert cache.begin(keys[:1]), "it is there"
    assert not cache.begin(keys[:2])
    cache.end(keys)
    assert cache.begin(keys)


@pytest.mark.parametrize("field", ["base", "adapter", "projector"])
def test_every_hash_makes_other_keys(field):
    ids = [1, 2, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 6, 7, 8]
    other = IDENTITY._replace(**{field: "other"})
    ours, theirs = keys_of(ids, ["image"]), keys_of(ids, ["image"], identity=other)
    assert not {*ours} & {*theirs}


def test_keys_know_only_what_their_columns_depend_on():
    text, image = [1, 2, 3, 4], [IMAGE_TOKEN] * 3 + [5]
    ids, other = [*text, *image, *image], IDENTITY._replace(adapter="other", projector="other")
    ours = keys_of(ids, ["a", "b"], acts_from=len(ids))
    theirs = keys_of(ids, ["a", "c"], acts_from=len(ids), identity=other._replace(projector="projector"))
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True, True, False]
    theirs = keys_of(ids, ["a", "b"], acts_from=len(ids), identity=other)
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True, False, False]
    late = keys_of(ids, ["a", "b"], acts_from=9)
    assert [a == b for a, b in zip(ours, late, strict=True)] == [True, True, False]


def test_the_latest_used_stay():
    latest = Latest(3)
    for key in "abc":
        latest.put(key, key.upper(), 1)
    assert latest.get("a") == "A"
    latest.put("d", "D", 1)
    assert latest.trim() == ["B"]
    assert (latest.get("b"), latest.hits, latest.misses) == (None, 1, 1)


def test_images_may_have_different_numbers_of_columns():
    first, second = [IMAGE_TOKEN] * 4, [IMAGE_TOKEN] * 8

    def keys(*images):
        return prefix_keys([*first, *second], images, [4, 8], 0, IDENTITY, BLOCK)

    shared = [a == b for a, b in zip(keys("a", "b"), keys("a", "c"), strict=True)]
    assert shared == [True, False, False]
