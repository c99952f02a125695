"""Streamed equals held in memory: the same batches, bit by bit, the same counts and the same refusals."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from mmpeft.data import examples as module
from mmpeft.data import kept_stores
from mmpeft.data.counts import count
from mmpeft.data.examples import Examples
from mmpeft.data.loader import PackedLoader
from mmpeft.data.plan import PackingConfig
from mmpeft.data.sequences import Chained
from mmpeft.data.sources import DataError, load_records
from mmpeft.data.template import Template
from tests.data.test_loader import same
from tests.tiny import make_record, write_jsonl

ROWS = 60
PACKING = PackingConfig(batch_size=7, max_conversations=4, max_length=90)


@pytest.fixture
def template(tiny_tokenizer):
    return Template(tiny_tokenizer, image_tokens=3, max_length=90)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Stores are kept however small they are."""
    monkeypatch.setattr(kept_stores, "KEPT_BYTES", 0)
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))
    return tmp_path


def write(folder, rows=ROWS):
    """Conversations of one or two turns about five images or none, some cut, some with choices."""
    rng, own = random.Random(0), []
    for number in range(rows):
        turns = []
        for turn in range(rng.choice([1, 1, 2])):
            words = 90 if number % 10 == 5 and turn == 0 else rng.randrange(1, 12)
            answer = " ".join(rng.choices(["yes", "blue", "square", "two"], k=words))
            turns += [{"from": "human", "value": f"is {turn} it {number}?"}, {"from": "gpt", "value": answer}]
        row = {"conversations": turns, "task": rng.choice([None, "vqa"])}
        if number % 4:
            row["image"] = f"{rng.randrange(5)}.png"
        if number % 7 == 0 and number % 10 != 5:
            row["choices"] = [turns[-1]["value"], "never"]
        own.append(row)
    for number in range(5):
        Image.new("RGB", (2, 2)).save(folder / f"{number}.png")
    return write_jsonl(folder / "data.jsonl", own)


def features(images):
    return torch.stack([torch.full((3, 4), float(image.split("/")[-1][0])) for image in images])


def loaders(records, template, ranks, **settings):
    """One that streams, and one that holds all examples."""
    streamed = Examples(records, template, ranks, "train")
    held = [
        template.encode_choices(record) if ranks and "choices" in record else template.encode(record)
        for record in records
    ]
    return [PackedLoader(each, features, PACKING, "own", **settings) for each in (streamed, held)]


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("mix", [None, [(20, 3.0), (40, 1.0)]])
def test_streamed_batches_are_those_of_examples_in_memory(kept, template, ranks, seed, mix):
    records = load_records(write(kept))
    assert records.path is not None
    parts = Chained([records[:20], records[20:]])
    streamed, held = loaders(parts, template, ranks, seed=seed, mix=mix)
    assert streamed.counts["truncated"].any()
    for _ in range(2):
        for one, other in zip(streamed, held, strict=True):
            same(one, other)


def test_a_row_is_about_one_list_of_images_and_one_task(kept, template):
    records = load_records(write(kept))
    loader = loaders(records, template, True, seed=0)[0]
    rows = [[records[number] for number in row] for batch in loader._plan for row in batch]
    assert all(len({(*record["images"], record["task"]) for record in row}) == 1 for row in rows)
    assert all(len(row) == 1 for row in rows if any("choices" in record for record in row))
    assert max(map(len, rows)) > 1


@pytest.mark.parametrize("taken", [1, 4])
def test_streamed_goes_on_in_the_middle_of_an_epoch(kept, template, taken):
    records = load_records(write(kept))
    streamed, held = loaders(records, template, True, seed=1)
    for loader in (streamed, held):
        list(loader)
    batches = iter(streamed)
    for _ in range(taken):
        next(batches)
    resumed = loaders(records, template, True, seed=1)[0]
    resumed.load_state_dict(streamed.state_dict())
    assert resumed.state_dict() == {"epoch": 1, "position": taken}  # what was made ahead does not count
    for one, other in zip(resumed, list(held)[taken:], strict=True):
        same(one, other)


def test_counts_are_those_of_the_examples(kept, template):
    records = load_records(write(kept))
    for ranks in (False, True):
        own = Examples(records, template, ranks, "train")
        assert np.array_equal(own.counts, count(list(own)))
        example = own[0]
        assert own.counts[0]["tokens"] == sum(len(part.ids) for part in example.conversations)
        assert own.counts[0]["conversations"] == (2 if ranks else 1)


def test_counts_are_kept_beside_the_store(kept, template, tiny_tokenizer, monkeypatch):
    records = load_records(write(kept))
    counts = Examples(records, template, False, "train").counts
    shorter = Template(tiny_tokenizer, image_tokens=3, max_length=60)
    with monkeypatch.context() as patched:
        patched.setattr(module, "count_one", lambda example: pytest.fail("counted again"))
        assert np.array_equal(
            Examples(load_records(kept / "data.jsonl"), template, False, "train").counts, counts
        )
        with pytest.raises(pytest.fail.Exception):
            Examples(records[:50], template, False, "train")
        with pytest.raises(pytest.fail.Exception):
            Examples(records, template, True, "train")
        with pytest.raises(pytest.fail.Exception):
            Examples(records, shorter, False, "train")
        with pytest.raises(pytest.fail.Exception):
            Examples(records, Template(tiny_tokenizer, 4, max_length=90), False, "train")
    (store,) = (kept / "home" / "records").glob("*.counts")
    store.write_bytes(store.read_bytes()[:100])
    assert np.array_equal(Examples(records, template, False, "train").counts, counts)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_processes_count_the_same_and_tell_the_same(kept, template, monkeypatch, cores):
    """Of 45 records whose answers would not begin, the first 20 are told, in order."""
    records = load_records(write(kept))
    alone = Examples(list(records), template, True, "train").counts
    long = [make_record("what " * 90, id=str(number), where=f"long.jsonl:{number}") for number in range(45)]
    monkeypatch.setattr(module, "WORTH_A_PROCESS", 10)
    monkeypatch.setattr(module, "AT_ONCE", 7)
    monkeypatch.setattr(module, "_cores", lambda: cores)
    assert np.array_equal(Examples(list(records), template, True, "train").counts, alone)
    with pytest.raises(DataError, match=r"train: 45 problem\(s\)") as caught:
        Examples([*records, *long], template, True, "train")
    _, *told, rest = str(caught.value).splitlines()
    assert [line.split(" ")[2] for line in told] == [f"long.jsonl:{number}" for number in range(20)]
    assert rest.strip() == "and 25 more"


def test_leaving_ends_the_thread(kept, template):
    loader, others = (
        loaders(load_records(write(kept)), template, False, seed=0)[0],
        set(threading.enumerate()),
    )

    def of_it():
        return [thread for thread in set(threading.enumerate()) - others if "batches" in thread.name]

    for _ in loader:
        assert of_it()
        break
    assert not of_it()


def test_several_threads_encode_what_one_does(kept, template):
    """A training and its validation make their batches at once."""
    own = Examples(load_records(write(kept)), template, True, "train")
    alone = list(own)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(own.item, list(range(ROWS)) * 5)) == alone * 5
