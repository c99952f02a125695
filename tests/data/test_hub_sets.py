"""Sets of the hub, fetched by the hub's own client from one on this machine."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.data.hub_server import hub
from tests.data.layouts.writing import parquet

CODE = """
import json, sys
from mmpeft.data.sources import DataError, load_records
for source in sys.argv[1:]:
    try:
        print(json.dumps([[record["turns"][0][1], record["where"]] for record in load_records(source)]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_a_set_is_fetched_by_split_and_revision_once(tmp_path):
    """Of another revision are other rows; what is asked for and is not there is named; later no network is needed."""

    def shard(answer, count):
        rows = [{"question": "What?", "answer": answer}] * count
        return (tmp_path / parquet(tmp_path, "rows.parquet", *rows)).read_bytes()

    names = {split: f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation")}
    files = {
        "main": {names["train"]: shard("new", 2), names["validation"]: shard("held", 1)},
        "v1.0": {names["train"]: shard("old", 1)},
    }

    def asked(*sources, **environment):
        homes = {"HF_HOME": str(tmp_path / "hf"), "MMPEFT_HOME": str(tmp_path / "home")}
        told = subprocess.run(
            [sys.executable, "-c", CODE, *sources],
            env=os.environ | homes | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in told.stdout.splitlines()]

    train, held = [["new", f"someone-some-set-train:{n}"] for n in (1, 2)], "someone-some-set-validation:1"
    with hub(files) as address:
        found = asked(
            *("someone/some-set:train", "someone/some-set:val", "someone/some-set@v1.0", "someone/some-set"),
            *(
                "someone/some-set:test",
                "someone/some-set@v9:train",
                "someone/other:train",
                "someone/some-set:small:train",
            ),
            HF_ENDPOINT=address,
        )
    assert found[:3] == [train, [["held", held]], [["old", "someone-some-set-train:1"]]]
    whats = (
        "holds the splits ['train', 'validation'], none is named; name one of them: someone/some-set:train",
        "found 'test'; name one of them",
        "RevisionNotFoundError: 404",
        "RepositoryNotFoundError: 404",
        "BuilderConfig 'small' not found",
    )
    for error, what in zip(found[3:], whats, strict=True):
        assert what in error
        assert "\n" not in error
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    old, newest, never = asked(
        *("someone/some-set@v1.0", "someone/some-set:train", "someone/some-set@v2.0:train"), **offline
    )
    assert old == [["old", "someone-some-set-train:1"]]
    assert (
        "gives commit bbbbbbbbbbbb of someone/some-set, fetched last, and its newest revision was aaaaaaaa"
        in newest
    )
    assert "and v2.0 was never fetched here; fetch it once more with a network" in never
    with hub(files) as address:
        shutil.rmtree(tmp_path / "hf")
        assert asked("someone/some-set:train", HF_ENDPOINT=address) == [train]
    assert asked("someone/some-set:train", **offline) == [train]
