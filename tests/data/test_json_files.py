"""JSON files: bytes, lines and arrays; every fault is told by its line and byte."""

import json
from pathlib import Path

import pytest

from mmpeft.data.sources import DataError, load_records
from tests.data.row_files import qa, write


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
        (
            f'{GOOD}\n{{"question": "a", "question": "b", "answer": "c"}}',
            r"data\.json:2: the key 'question' is given twice in one object; keep one of them",
        ),
        (
            '[\n{"image": {"path": "a.png", "path": "b.png"}, "answer": "c"}]',
            r"data\.json:element 1: the key 'path' is given twice",
        ),
        ('{\n"question": "a",\n"answer": "b",\n"answer": "c"\n}', r"data\.json:1: the key 'answer' is given"),
        (
            '{"question": "a", "answer": "b", "images": "[{\\"url\\": 1, \\"url\\": 2}]"}',
            "the key 'url' is given",
        ),
        (f'{{"data": [{GOOD}],\n"data": [{GOOD}]}}', r"data\.json:2: .*the list 'data' is given twice"),
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


def test_a_key_given_twice_leaves_the_other_rows(folder):
    twice = '{"question": "a", "question": "b", "answer": "c"}'
    document = f'{{"info": 1, "data": [{GOOD},\n{twice}, {GOOD}]}}'
    for text, place in ((f"[{GOOD},\n{twice},\n{GOOD}]", "element 2"), (document, "data 2")):
        with pytest.raises(DataError, match=f"{place}: the key 'question' is given twice") as caught:
            load_records(write(folder, text, name="data.json"))
        assert "1 problem(s)" in str(caught.value)


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
