"""Settings of a user's own rows in a run: columns, rows that are left out, and data without any image."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from mmpeft.cli import main
from mmpeft.data.sources import DataError
from mmpeft.errors import RefusedError
from mmpeft.evaluation.evaluate import Evaluation
from mmpeft.inference.requests import Request
from mmpeft.training.checkpoint import hash_records
from mmpeft.training.cli import VisionLanguageCLI
from tests.tiny import make_config, make_record, run_directory, write_jsonl


@pytest.fixture
def own_data(tmp_path):
    """Rows under names of their own; one without its answer, and one whose image is missing."""
    folder = tmp_path / "own"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    row = {"pic": "red.png", "asks": "what color is it?", "says": "red", "note": "x"}
    write_jsonl(folder / "val.jsonl", [row] * 3)
    write_jsonl(folder / "train.jsonl", [*[row] * 6, {**row, "says": None}, {**row, "pic": "none.png"}])
    return folder


def settings(folder, **changes):
    names = {"columns": {"image": "pic", "question": "asks", "answer": "says"}, "ignore": ["note"]}
    paths = {
        "train": str(folder / "train.jsonl"),
        "val": str(folder / "val.jsonl"),
        "test": str(folder / "val.jsonl"),
    }
    return paths | names | {"packing": {"batch_size": 3}, "on_bad_sample": "skip"} | changes


def read(config, stage="fit"):
    cli = VisionLanguageCLI.parse(["--config", str(config)])
    cli.datamodule.read(stage, cli.model.finetunes)
    return cli


def test_a_run_reads_mapped_columns_and_tells_what_it_left_out(tmp_path, tiny_base, own_data, capsys):
    config = make_config(
        tmp_path / "c.yaml", tiny_base, own_data, data=settings(own_data), trainer={"max_steps": 1}
    )
    main(["fit", "--config", str(config)])
    told = capsys.readouterr().err
    skipped = "train: 1 bad rows skipped (data.on_bad_sample): "
    assert f"{skipped}not valid, the first: train.jsonl:7: the last question" in told
    assert f"{skipped}without an image's file, the first: train.jsonl:8 (id 'train-8'): image" in told
    assert "train: keys left out by data.ignore: note (8)" in told
    run = run_directory(config)
    manifest = json.loads((run / "mmpeft.json").read_text())
    by_reason = "1 not valid, 1 without an image's file"
    assert manifest["facts"]["skipped"] == f"of the training data 2 bad rows: {by_reason}"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["columns"]["image"] == "pic"
    main(["test", "--run", str(run)])
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["truth"] for row in rows] == ["red"] * 3


def test_bad_rows_are_errors_by_themselves_and_always_of_held_out_data(tmp_path, tiny_base, own_data):
    config = make_config(
        tmp_path / "c.yaml", tiny_base, own_data, data=settings(own_data, on_bad_sample="raise")
    )
    with pytest.raises(DataError, match=r"train\.jsonl:7: the last question has no answer"):
        read(config)
    shutil.copy(own_data / "train.jsonl", own_data / "val.jsonl")
    config = make_config(tmp_path / "c.yaml", tiny_base, own_data, data=settings(own_data))
    with pytest.raises(DataError, match=r"val\.jsonl:7: the last question has no answer"):
        read(config)


def test_a_mapped_column_must_be_in_some_row_of_the_stage(tmp_path, tiny_base, own_data, tiny_data):
    wrong = {"image": "pic", "question": "asks", "answer": "says", "system": "sys"}
    config = make_config(tmp_path / "c.yaml", tiny_base, own_data, data=settings(own_data, columns=wrong))
    with pytest.raises(RefusedError, match=r"maps \['sys'\], which no row of the data of `mmpeft fit` has"):
        read(config)
    shared = settings(own_data, val=str(tiny_data / "val.jsonl"), train=str(own_data / "val.jsonl"))
    read(make_config(tmp_path / "c.yaml", tiny_base, own_data, data=shared))


def test_the_command_line_maps_columns_too(tmp_path, tiny_base, own_data, capsys):
    config = make_config(
        tmp_path / "c.yaml", tiny_base, own_data, data=settings(own_data, columns=None, ignore=None)
    )
    mapped = "{image: pic, question: asks, answer: says}"
    cli = VisionLanguageCLI.parse(
        ["--config", str(config), f"--data.columns={mapped}", "--data.ignore=[note]"]
    )
    cli.datamodule.read("fit", cli.model.finetunes)
    main(["check", str(own_data / "val.jsonl"), "--columns", mapped, "--ignore", "note"])
    told = capsys.readouterr().out
    assert "note (3)" in told
    assert "3 conversations about 1 images; nothing to object to" in told
    with pytest.raises(SystemExit, match=r"no row has \['sayz'\], which data\.columns maps"):
        main(
            [
                "check",
                str(own_data / "val.jsonl"),
                "--columns",
                mapped.replace("says", "sayz"),
                "--ignore",
                "[note, says]",
            ]
        )


def test_data_without_an_image_for_a_model_with_an_encoder_is_refused(tmp_path, tiny_base, tiny_data):
    text = dict.fromkeys(("train", "val"), str(tiny_data / "text.jsonl"))
    config = make_config(tmp_path / "c.yaml", tiny_base, tiny_data, data=text, trainer={"max_steps": 1})
    with pytest.raises(
        SystemExit, match=r"text\.jsonl:1 and all other rows have no image.*data\.text_only: true"
    ):
        main(["fit", "--config", str(config)])
    main(["fit", "--config", str(config), "--data.text_only=true"])


def test_a_system_turn_is_part_of_what_is_learnt_and_asked():
    """A resumed fit or test must not go on with another one."""
    bare, one, other = (make_record(**own) for own in ({}, {"system": "be sure"}, {"system": "be brief"}))
    assert len({hash_records([record], str) for record in (bare, one, other)}) == 3
    evaluation: Any = SimpleNamespace(_key=str)
    asked = [Evaluation._asked(evaluation, Request(record)) for record in (bare, one, other)]
    assert asked[0] == ["1", [("what?", "red")], None, None, [], None], "as it was before there were any"
    assert [told[len(asked[0]) :] for told in asked] == [[], ["be sure"], ["be brief"]]


def test_each_caption_of_a_list_is_learnt_and_a_test_asks_once(tmp_path, tiny_base, own_data, capsys):
    rows = [{"image": "red.png", "captions": ["a red square", "all red"], "id": "7"}]
    path = str(write_jsonl(own_data / "captions.jsonl", rows))
    data = dict.fromkeys(("train", "val", "test"), path)
    cli = read(make_config(tmp_path / "c.yaml", tiny_base, own_data, data=data))
    (finetune,) = cli.model.finetunes.values()
    learnt, asked = finetune.records["train"], finetune.records["val"]
    assert [(record["id"], record["turns"][0][1]) for record in learnt] == [
        ("7", "a red square"),
        ("7#2", "all red"),
    ]
    assert [record.get("references") for record in asked] == [["a red square", "all red"]]
    assert capsys.readouterr().err.count("1 rows list 2 captions: training learns each of them") == 2
