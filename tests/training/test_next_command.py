"""What a fit names as the next command: one that the run can take."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmpeft.cli import COMMANDS
from mmpeft.training.run_writer import next_command


@pytest.mark.parametrize(
    ("own", "of_all", "vision", "tasks", "wanted"),
    [
        ([{}], ["test.jsonl"], {"name": "vit"}, ["vqa"], "test --run 'a run'"),
        ([{"test": ["a.jsonl"]}, {"test": ["b.jsonl"]}], [], {"name": "vit"}, ["vqa"], "test --run 'a run'"),
        (
            [{"test": ["a.jsonl"]}, {}],
            [],
            {"name": "vit"},
            ["vqa"],
            "ask --run 'a run' --image IMAGE QUESTION",
        ),
        ([{}], [], {"name": "vit"}, ["vqa", "caption"], "caption FOLDER --run 'a run'"),
        ([{}], [], None, [""], "ask --run 'a run' QUESTION"),
    ],
)
def test_a_test_is_named_only_where_all_finetunes_have_data_for_it(own, of_all, vision, tasks, wanted):
    module: Any = SimpleNamespace(
        finetunes={str(number): SimpleNamespace(paths=paths) for number, paths in enumerate(own)}
    )
    data: Any = SimpleNamespace(paths={"test": of_all})
    manifest: Any = SimpleNamespace(vision=vision, instructions=dict.fromkeys(tasks))
    told = next_command(module, data, manifest, Path("a run"))
    assert told == f"mmpeft {wanted}"
    assert told.split()[1] in COMMANDS
