"""Every accepted format gives the same record, and every refused row is named by file, line and id."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from mmpeft.data.records import IMAGE_MARKER
from mmpeft.data.sources import DataError, check_images, load_records


def png(colour="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png("blue"))
    return tmp_path


def write(folder: Path, *rows, name="data.jsonl") -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def load_row(folder: Path, row, **options) -> dict:
    (record,) = load_records(write(folder, row), **options)
    return record


def refuse(folder: Path, row, message: str, **options) -> str:
    with pytest.raises(DataError, match=message) as caught:
        load_records(write(folder, row), **options)
    assert f"data.jsonl:{'element 1' if isinstance(row, list) else 1}" in str(caught.value)
    return str(caught.value)


def llava(*values, **row) -> dict:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[number % 2], "value": value} for number, value in enumerate(values)]
    return {"conversations": turns, **row}


def qa(**row) -> dict:
    return {"question": "What?", "answer": "A cat.", **row}


WANTED_TURNS = [("<image>What?", "A cat.")]
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


@pytest.mark.parametrize(
    ("question", "images", "wanted"),
    [
        ("<image>\n\n What? ", 1, "<image>What?"),
        ("What?\n <image> ", 1, "<image>What?"),
        ("Is <image> a cat?", 1, "Is <image> a cat?"),
        ("<image>", 1, "<image>"),
        ("Compare.", 2, "<image><image>Compare."),
        ("<image>\n<image>\nCompare.", 2, "<image><image>Compare."),
        ("Compare <image> with <image>", 2, "Compare <image> with<image>"),
        ("<image> or\n<image>?", 2, "<image>or\n<image>?"),
        (" \n<image>  <image>", 2, "<image><image>"),
        ("  Text ", 0, "Text"),
    ],
)
def test_where_markers_go(folder, question, images, wanted):
    record = load_row(folder, llava(question, "A.", images=["a.png", "b.png"][:images]))
    assert record["turns"] == [(wanted, "A.")]


def test_markers_of_later_turns_stay_in_their_turn(folder):
    row = llava("<image>\nFirst?", "One.", "Second?\n<image>", "Two.", images=["a.png", "b.png"])
    assert load_row(folder, row)["turns"] == [("<image>First?", "One."), ("Second?<image>", "Two.")]
    row = llava("Hello", "Hi", "Second?\n<image>", " Two.\n", image="a.png")
    assert load_row(folder, row)["turns"] == [("Hello", "Hi"), ("<image>Second?", " Two.\n")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([IMAGE_MARKER, " ", "\n", "Text", "?"]), max_size=12))
def test_the_number_and_order_of_markers_and_words_is_kept(tmp_path_factory, pieces):
    folder, question = tmp_path_factory.getbasetemp(), "".join(pieces)
    count = pieces.count(IMAGE_MARKER)
    row = llava(question, "A.", images=[f"{number}.png" for number in range(count)])
    if not question.strip():
        refuse(folder, row, "question is empty")
        return
    ((placed, _),) = load_row(folder, row)["turns"]
    assert placed.count(IMAGE_MARKER) == count
    assert "".join(placed.replace(IMAGE_MARKER, "").split()) == "".join(
        question.replace(IMAGE_MARKER, "").split()
    )
    assert load_row(folder, llava(placed, "A.", images=row["images"]))["turns"] == [(placed, "A.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava("<image><image>", "A.", image="a.png"), "found 2 <image> for 1 image"),
        (llava("<image>What?", "A."), "found 1 <image> for 0 image"),
        (llava("<image>What?", "A.", images=["a.png", "b.png"]), "found 1 <image> for 2 image"),
        (llava("What?", "A <image>.", image="a.png"), "an answer, holds <image>"),
        (llava("What?", " \n", image="a.png"), "turn 2, an answer, is empty"),
        (llava("What?", "A.", "And?", image="a.png"), "no answer"),
        (llava("What?", "A.", " ", "B."), "question is empty"),
        ({"conversations": []}, "wanted a list that is not empty"),
        ({"conversations": "text"}, "wanted a list"),
        (
            {"conversations": [{"from": "gpt", "value": "A."}]},
            "turn 1 is from the assistant; wanted the user",
        ),
        ({"conversations": [{"from": "robot", "value": "A."}]}, "robot"),
        ({"conversations": [["human", "A."]]}, "found the turn list"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "no turn but the system's"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "found the part"),
        ({"messages": [{"role": "user", "content": None}]}, "wanted text"),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")]},
            "turn 3 is from the assistant; wanted the user",
        ),
        (qa(answer=None), "no answer"),
        (qa(answer=True), "answer is True; wanted text"),
        (qa(answer=3.0), "answer is 3.0, which may be meant as 3"),
        (qa(answer={"text": "3"}), "answer is dict .*; wanted text"),
        (qa(question=["What?"]), "question is list"),
        (qa(image=5), "found the image int 5"),
        (qa(image=""), "wanted a local path"),
        (qa(image="a\0.png"), "wanted a local path"),
        (qa(image="https://example.org/a.png"), "download URLs first"),
        (qa(image="a.png", images=["a.png"]), r"more than once, under \['image', 'images'\]"),
        (qa(images=["a.png", None]), "found the image NoneType"),
        (qa(id=""), "the id is empty"),
        (qa(id=True), "id is bool"),
        (qa(task=4), "task is int"),
        (qa(choices=[]), "choices is list"),
        (qa(choices=["a", 2]), "choices is int"),
        (qa(question="half \ud800"), "lone surrogate at character 5"),
        (
            {"prompter": "x", "picture": "a.png"},
            r"found the keys \['picture', 'prompter'\]; wanted one of .*messages",
        ),
        ([1, 2], "found a list|something follows|wanted an object"),
        ("17", "found a int; wanted an object"),
    ],
)
def test_refused_rows(folder, row, message):
    refuse(folder, row, message)


def test_an_error_names_the_id(folder):
    assert "data.jsonl:1 (id 'q7'): turn 2" in refuse(folder, llava("What?", "", id="q7"), "empty")


def test_prediction_needs_no_last_answer(folder):
    for row in (qa(answer=None, image="a.png"), llava("What?", image="a.png")):
        assert load_row(folder, row, require_answers=False)["turns"] == [("<image>What?", None)]
    row = llava("One?", "1", "Two?", image="a.png")
    assert load_row(folder, row, require_answers=False)["turns"] == [("<image>One?", "1"), ("Two?", None)]
    write(folder, "file_name,question,answer", "a.png,What?,", name="metadata.csv")
    assert load_records(folder / "metadata.csv", require_answers=False)[0]["turns"] == [
        ("<image>What?", None)
    ]


def test_task_and_choices_of_the_row_win(folder):
    record = load_row(folder, qa(task="ocr", choices=["A cat.", "A dog."]), task="vqa")
    assert (record["task"], record["choices"]) == ("ocr", ["A cat.", "A dog."])
    assert load_row(folder, qa())["task"] is None


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "sub/../../secret.png",
        "/etc/passwd",
        "link.png",
        "link.png#frame=1",
        "out/secret.png",
        "..",
    ],
)
def test_images_outside_the_root_are_refused(tmp_path, name):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    refuse(root, qa(image=name), "outside the image root")
    (tmp_path / "rootling").mkdir()
    refuse(root, qa(image="../rootling/a.png"), "outside the image root")


def test_names_inside_the_root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(png())
    (root / "link.png").symlink_to(root / "a.png")
    (tmp_path / "alias").symlink_to(root)
    real = os.path.realpath(root / "a.png")
    for name in ("a.png", "./a.png", "sub/../a.png", "link.png", real):
        assert load_row(root, qa(image=name))["images"] == [real]
    data = write(tmp_path, qa(image="a.png"))
    assert load_records(data, image_root=tmp_path / "alias")[0]["images"] == [real]
    with pytest.raises(DataError, match=r"image_root .* is not a folder"):
        load_records(data, image_root=tmp_path / "none")


def test_bom_crlf_blank_lines_and_line_separators(folder):
    rows = [json.dumps(qa(answer="a\u2028b"), ensure_ascii=False), "", json.dumps(qa())]
    path = folder / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n")
    first, second = load_records(path)
    assert (first["turns"][0][1], first["where"], second["where"]) == (
        "a\u2028b",
        "data.jsonl:1",
        "data.jsonl:3",
    )
    assert (first["id"], second["id"]) == ("data-1", "data-3")
    path.write_bytes(b"\xef\xbb\xbf" + f"[\r\n{rows[0]},\r\n\r\n{rows[2]}\r\n]\r\n".encode())
    assert [record["where"] for record in load_records(path)] == [
        "data.jsonl:element 1",
        "data.jsonl:element 2",
    ]


GOOD = json.dumps(qa())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            f"{GOOD}\n{GOOD[:-9]}",
            rf"data\.json:2: not valid JSON at byte {len(GOOD) + 1 + len(GOOD) - 9}",
        ),
        (f"{GOOD}\n{{'a': 1}}", rf"data\.json:2: not valid JSON at byte {len(GOOD) + 2}"),
        (f"\ufeff{GOOD}\n{{x", rf"data\.json:2: not valid JSON at byte {3 + len(GOOD) + 2}"),
        ('{"question": "é", "answer": "b"}\n[', r"data\.json:2: not valid JSON at byte 35"),
        (f"[{GOOD},\n]", rf"data\.json:2: not valid JSON at byte {len(GOOD) + 3}"),
        (f"[{GOOD}\n{GOOD}]", rf"data\.json:2: not valid JSON at byte {len(GOOD) + 2}: expected ','"),
        (f"[{GOOD},\n{GOOD}", r"data\.json:2: not valid JSON .*expected ','"),
        (f"[{GOOD}]\n]", rf"data\.json:2: not valid JSON at byte {len(GOOD) + 3}: something follows"),
        ('{"question": "a", "answer": "b", "scores": [NaN]}', r"data\.json:1: not valid JSON: found NaN"),
        (
            '{"question": "a", "answer": "b", "score": Infinity}',
            r"data\.json:1: not valid JSON: found Infinity",
        ),
        (
            '[\n{"question": "a", "answer": -Infinity}]',
            r"data\.json:element 1: not valid JSON: found -Infinity",
        ),
        (b'{"question": "a",\xff}', r"data\.json:1: not UTF-8 at byte 17"),
        (b'[\n{"question": "a",\xff}]', r"data\.json:2: not UTF-8 at byte 19"),
        ("[" * 100_000, r"data\.json:1: not valid JSON"),
        ("", "holds no rows"),
        (" \n\n", "holds no rows"),
        ("[ ]", "holds no rows"),
    ],
)
def test_json_faults_give_line_and_byte(folder, content, message):
    path = folder / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_records(path)


def test_an_array_of_one_line_reads_as_its_rows(folder):
    path = write(folder, json.dumps([qa(image="a.png"), qa(image="b.png", source="NaN")]), name="one.json")
    first, second = load_records(path)
    assert [first["where"], second["where"]] == ["one.json:element 1", "one.json:element 2"]
    assert first["id"] != second["id"]
    assert [Path(str(record["images"][0])).name for record in (first, second)] == ["a.png", "b.png"]
    path.write_text(
        json.dumps([qa(), qa(answer=""), qa(source=float("inf")), qa(source="NaN"), qa(image=float("nan"))])
    )
    with pytest.raises(DataError) as caught:
        load_records(path)
    problems = str(caught.value).splitlines()[1:]
    assert [problem.split(": ")[0].strip() for problem in problems] == [
        "one.json:element 2",
        "one.json:element 3",
    ]
    assert "found Infinity" in problems[1]


def test_objects_over_several_lines(folder):
    row = json.dumps(qa(image="a.png"), indent=1)
    records = load_records(write(folder, row, row, name="data.json"))
    assert [record["where"] for record in records] == ["data.json:1", "data.json:6"]
    text = json.dumps({"info": float("nan"), "annotations": [qa()] * 100}, indent=1)
    assert len(load_records(write(folder, text, name="data.json"))) == 100
    with pytest.raises(DataError, match=r"2 problem"):
        load_records(write(folder, text, text, name="data.json"))
    with pytest.raises(
        DataError, match=r"data\.json:3: not valid JSON at byte 3: expected property"
    ) as caught:
        load_records(write(folder, "\n{\n'", text, name="data.json"))
    assert "1 problem(s)" in str(caught.value)
    with pytest.raises(DataError, match=r"data\.json:404: not valid JSON .*expected ','") as caught:
        load_records(write(folder, text[:-2], name="data.json"))
    assert "1 problem(s)" in str(caught.value)


def test_duplicate_ids_name_both_lines(folder):
    path = write(folder, qa(id="x"), qa(), qa(id="x"), qa(id=1), qa(id="1"), qa(id="data-2"))
    with pytest.raises(DataError) as caught:
        load_records(path)
    for line, first, name in ((3, 1, "'x'"), (5, 4, "'1'"), (6, 2, "'data-2'")):
        assert f"data.jsonl:{line} (id {name}): the id is also used at data.jsonl:{first}" in str(
            caught.value
        )


def test_all_problems_are_told_up_to_a_cap(folder):
    rows = [qa(answer="") for _ in range(23)]
    with pytest.raises(DataError) as caught:
        load_records(write(folder, *rows[:3], "{", qa()))
    assert str(caught.value).count("\n") == 4
    assert "data.jsonl:4: not valid JSON" in str(caught.value)
    with pytest.raises(DataError) as caught:
        load_records(write(folder, *rows))
    first, *listed, last = str(caught.value).splitlines()
    assert (first.split(": ")[-1], len(listed), last.strip()) == ("23 problem(s)", 20, "and 3 more")


def test_what_is_no_data_set(folder):
    write(folder, qa(), name="train.jsonl")
    with pytest.raises(DataError, match=r"neither a file nor a folder.*\['train\.jsonl'\]"):
        load_records(folder / "trian.jsonl")
    with pytest.raises(DataError, match=r"neither a file nor a folder.*hub"):
        load_records("someone/some-set")
    with pytest.raises(DataError, match=r"ends in '\.png'"):
        load_records(folder / "a.png")
    with pytest.raises(DataError, match=r"train\.jsonl.*wanted metadata\.jsonl"):
        load_records(folder)
    write(folder, qa(), name="metadata.jsonl")
    write(folder, "file_name,text", name="metadata.csv")
    with pytest.raises(DataError, match="one of"):
        load_records(folder)


def test_check_images_lists_every_missing_image_once(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(png()[:-26])
    names = ["a.png", "none.png", "none.png", "empty.png", "cut.png", "."]
    records = load_records(write(folder, *[qa(image=name) for name in names[:-1]]))
    missing = check_images(records)
    assert [problem.split(" ")[0] for problem in missing] == ["data.jsonl:2", "data.jsonl:4"]
    assert "none.png' is missing" in missing[0]
    decoded = check_images(records, decode=True)
    assert [problem.split(" ")[0] for problem in decoded] == ["data.jsonl:2", "data.jsonl:4", "data.jsonl:5"]
    held = [records[0] | {"images": [png()[:-26], png()]}]
    assert check_images(held) == []
    assert len(check_images(held, decode=True)) == 1


def test_40000_rows_are_read_in_seconds(folder):
    rows = [llava("<image>\nWhat?", "A cat.", id=str(n), image=f"images/{n}.png") for n in range(40_000)]
    path = write(folder, *rows)
    start = time.process_time()
    assert len(load_records(path)) == 40_000
    assert time.process_time() - start < 4  # 0.8 s on one idle core; loose, as machines differ


def test_import_is_light():
    code = "import sys, mmpeft.data.sources; print(sys.modules.keys() & {'torch', 'datasets', 'numpy'})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
