"""Every accepted shape of a row, in every format, gives the same record."""

import csv
import json

import pyarrow
import pytest
from pyarrow import parquet

from mmpeft.data.sources import DataError, load_records
from tests.data.row_files import WANTED_TURNS, llava, load_row, png, qa, write

ONE_IMAGE_ROWS = {
    "llava": llava("<image>\nWhat?", "A cat.", image="a.png"),
    "llava, marker last": llava("What?\n<image>", "A cat.", image="a.png"),
    "llava, no marker": llava("What?", "A cat.", images=["a.png"]),
    "messages": {
        "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}],
        "images": ["a.png"],
    },
    "message parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
        "images": ["a.png"],
    },
    "inline image": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": "a.png"}],
            },
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "question and answer": qa(image="a.png"),
    "file_name": qa(file_name="a.png", image=None),
    "caption": {"image": "a.png", "text": "A cat.", "instruction": "What?"},
}


@pytest.mark.parametrize("form", ["jsonl", "json"])
@pytest.mark.parametrize("shape", ONE_IMAGE_ROWS)
def test_every_shape_gives_one_record(folder, shape, form):
    row = {"id": "x1", **ONE_IMAGE_ROWS[shape]}
    path = write(folder, row if form == "jsonl" else json.dumps([row], indent=2), name=f"data.{form}")
    (record,) = load_records(path, task="vqa")
    assert record == {
        "id": "x1",
        "images": [str(folder / "a.png")],
        "turns": WANTED_TURNS,
        "task": "vqa",
        "where": f"data.{form}:{1 if form == 'jsonl' else 'element 1'}",
    }


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_an_imagefolder(folder, name):
    if name.endswith("csv"):
        with open(folder / name, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["file_name", "question", "answer"])
            writer.writeheader()
            writer.writerow({"file_name": "a.png", "question": "What?", "answer": 'A, "cat"\nof two lines.'})
            writer.writerow({"file_name": "", "question": "Text only?", "answer": "Yes."})
    else:
        two_lines = qa(file_name="a.png", answer='A, "cat"\nof two lines.')
        write(folder, two_lines, {"question": "Text only?", "answer": "Yes."}, name=name)
    first, second = load_records(folder)
    assert first["turns"] == [("<image>What?", 'A, "cat"\nof two lines.')]
    assert (second["images"], second["turns"]) == ([], [("Text only?", "Yes.")])
    assert first["id"].startswith("metadata-")


def test_csv_faults(folder):
    write(folder, "file_name,text", "a.png,fine", "b.png,one,two", 'b.png,"open', name="metadata.csv")
    with pytest.raises(DataError, match=r"metadata\.csv:3: wanted one field for each") as caught:
        load_records(folder)
    assert "not valid CSV" in str(caught.value)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    with pytest.raises(DataError, match="not UTF-8 at byte 21"):
        load_records(folder)


def test_captions_get_an_instruction(folder):
    assert load_row(folder, {"image": "a.png", "text": "A cat."})["turns"] == [
        ("<image>Describe this image.", "A cat.")
    ]


def test_parquet_with_embedded_images(folder):
    (folder / "odd [x]").mkdir()
    rows = [
        qa(image={"bytes": png(), "path": "../x.png"}, choices=["A cat.", "A dog."]),
        qa(image={"bytes": None, "path": "a.png"}),
        qa(image=None),
    ]
    path = folder / "odd [x]" / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second, third = load_records(path, image_root=folder)
    assert (first["images"], first["turns"], first["choices"]) == (
        [png()],
        WANTED_TURNS,
        ["A cat.", "A dog."],
    )
    assert first["where"] == "train.parquet:1"
    assert second["images"] == [str(folder / "a.png")]
    assert "choices" not in second
    assert (third["id"], third["images"]) == ("train-3", [])


def test_parquet_messages_and_damage(folder):
    import datasets

    row = ONE_IMAGE_ROWS["message parts"]
    image = {"bytes": png(), "path": None}
    data = {"messages": [row["messages"]], "images": [[image]]}
    text = datasets.Value("string")
    messages = [{"role": text, "content": [{"type": text, "text": text}]}]
    features = datasets.Features({"messages": messages, "images": datasets.List(datasets.Image())})
    path = folder / "m.parquet"
    datasets.Dataset.from_dict(data, features=features).to_parquet(path)
    (record,) = load_records(folder)
    assert (record["images"], record["turns"]) == ([png()], WANTED_TURNS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"m\.parquet:1: not readable as parquet"):
        load_records(path)


def test_task_and_choices_of_the_row_win(folder):
    record = load_row(folder, qa(task="ocr", choices=["A cat.", "A dog."]), task="vqa")
    assert (record["task"], record["choices"]) == ("ocr", ["A cat.", "A dog."])
    assert load_row(folder, qa())["task"] is None


def test_prediction_needs_no_last_answer(folder):
    for row in (qa(answer=None, image="a.png"), llava("What?", image="a.png")):
        assert load_row(folder, row, require_answers=False)["turns"] == [("<image>What?", None)]
    row = llava("One?", "1", "Two?", image="a.png")
    assert load_row(folder, row, require_answers=False)["turns"] == [("<image>One?", "1"), ("Two?", None)]
    write(folder, "file_name,question,answer", "a.png,What?,", name="metadata.csv")
    assert load_records(folder / "metadata.csv", require_answers=False)[0]["turns"] == [
        ("<image>What?", None)
    ]
