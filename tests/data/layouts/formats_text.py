"""Layouts of JSON, JSONL and tables."""

import json
from pathlib import Path

from tests.data.layouts.layout import Layout
from tests.data.layouts.writing import document, images, lines, table, text

ROWS = [
    {"image": "1.png", "question": "Which colour?", "answer": "blue"},
    {"image": "2.png", "question": "How many?", "answer": "two"},
]
MEANT = [
    {"images": ["1.png"], "turns": [("<image>Which colour?", "blue")]},
    {"images": ["2.png"], "turns": [("<image>How many?", "two")]},
]
NAMES = ("image", "question", "answer")
CELLS = [[row[name] for name in NAMES] for row in ROWS]
CAPTIONS = [
    {"images": ["1.png"], "turns": [("<image>Describe this image.", "a dog, running")]},
    {"images": ["2.png"], "turns": [("<image>Describe this image.", "two cats")]},
]
LONG = "white " * 30_000 + "."


def with_images(write):
    def run(folder: Path) -> str:
        images(folder, "1.png", "2.png")
        return write(folder)

    return run


def layout(name, write, records=None, refused=None):
    return Layout(name, with_images(write), records, refused)


LAYOUTS = [
    layout("JSON: an array on one line, without ids", lambda f: document(f, "a.json", ROWS), MEANT),
    layout("JSON: an array over lines", lambda f: document(f, "a.json", ROWS, 2), MEANT),
    layout("JSON: an array in UTF-16", lambda f: document(f, "a.json", ROWS, 2, "utf-16"), MEANT),
    layout("JSON: one object over lines", lambda f: document(f, "a.json", ROWS[0], 2), MEANT[:1]),
    layout(
        "JSON: objects over lines, one after the other",
        lambda f: text(f, "a.json", "\n".join(json.dumps(row, indent=4) for row in ROWS)),
        MEANT,
    ),
    layout("JSON: one object a line in a .json", lambda f: lines(f, "a.json", *ROWS), MEANT),
    layout("JSONL", lambda f: lines(f, "a.jsonl", *ROWS), MEANT),
    layout("JSONL with a byte order mark", lambda f: lines(f, "a.jsonl", *ROWS, encoding="utf-8-sig"), MEANT),
    layout("JSONL in UTF-16", lambda f: lines(f, "a.jsonl", *ROWS, encoding="utf-16"), MEANT),
    layout(
        "JSONL, a key given twice in one object",
        lambda f: text(f, "a.jsonl", '{"image": "1.png", "question": "a", "question": "b", "answer": "c"}\n'),
        refused="the key 'question' is given twice",
    ),
    layout(".ndjson", lambda f: lines(f, "a.ndjson", *ROWS), MEANT),
    layout(".jsonl.gz", lambda f: lines(f, "a.jsonl.gz", *ROWS), MEANT),
    layout(".json.gz", lambda f: document(f, "a.json.gz", ROWS), MEANT),
    layout(
        "JSONL with NaN for what is absent (pandas)",
        lambda f: text(
            f, "a.jsonl", "".join(json.dumps(row | {"choices": float("nan")}) + "\n" for row in ROWS)
        ),
        MEANT,
    ),
    layout(
        "JSONL with Infinity",
        lambda f: text(f, "a.jsonl", json.dumps(ROWS[0] | {"score": float("inf")})),
        refused="found Infinity",
    ),
    layout(
        "JSONL whose rows name several splits",
        lambda f: lines(f, "a.jsonl", ROWS[0] | {"split": "train"}, ROWS[1] | {"split": "test"}),
        refused="a.jsonl:test",
    ),
    layout(
        "JSONL whose rows name several splits, one of them asked for",
        lambda f: (
            lines(f, "a.jsonl", ROWS[0] | {"split": "train"}, ROWS[1] | {"split": "val"}) + ":validation"
        ),
        MEANT[1:],
    ),
    layout(
        "JSONL with back slashes of Windows in image names",
        lambda f: (images(f, "in/1.png"), lines(f, "a.jsonl", ROWS[0] | {"image": "in\\1.png"}))[1],
        [{"images": ["in/1.png"], "turns": MEANT[0]["turns"]}],
    ),
    layout("CSV", lambda f: table(f, "a.csv", NAMES, *CELLS), MEANT),
    layout(
        "CSV of Excel: a byte order mark",
        lambda f: table(f, "a.csv", NAMES, *CELLS, encoding="utf-8-sig"),
        MEANT,
    ),
    layout(
        "CSV with semicolons (Excel in much of Europe)",
        lambda f: table(f, "a.csv", NAMES, *CELLS, delimiter=";"),
        MEANT,
    ),
    layout(
        "Excel's Unicode text: UTF-16 with tabs",
        lambda f: table(f, "a.txt", NAMES, *CELLS, delimiter="\t", encoding="utf-16"),
        MEANT,
    ),
    layout(
        "the same named .csv",
        lambda f: table(f, "a.csv", NAMES, *CELLS, delimiter="\t", encoding="utf-16"),
        MEANT,
    ),
    layout("TSV", lambda f: table(f, "a.tsv", NAMES, *CELLS, delimiter="\t"), MEANT),
    layout(".csv.gz", lambda f: table(f, "a.csv.gz", NAMES, *CELLS), MEANT),
    layout(
        "CSV with a cell of 180,000 characters",
        lambda f: table(f, "a.csv", NAMES, [*CELLS[0][:2], LONG], CELLS[1]),
        [MEANT[0] | {"turns": [("<image>Which colour?", LONG)]}, MEANT[1]],
    ),
    layout(
        "CSV of pandas with its column of row numbers",
        lambda f: table(f, "a.csv", ["", *NAMES], *[[str(n), *cells] for n, cells in enumerate(CELLS)]),
        MEANT,
    ),
    layout(
        "CSV with back slashes of Windows in image names",
        lambda f: (images(f, "in/1.png"), table(f, "a.csv", NAMES, ["in\\1.png", *CELLS[0][1:]]))[1],
        [{"images": ["in/1.png"], "turns": MEANT[0]["turns"]}],
    ),
    layout(
        "CSV with a quote that is never closed",
        lambda f: text(f, "a.csv", 'image,question,answer\n1.png,"Which?,blue\n'),
        refused="not valid CSV",
    ),
    layout(
        "CSV of one column",
        lambda f: table(f, "a.csv", ["image"], ["1.png"]),
        refused="the only column 'image'",
    ),
    layout(
        "Flickr8k captions.txt (image,caption)",
        lambda f: table(
            f, "captions.txt", ["image", "text"], ["1.png", "a dog, running"], ["2.png", "two cats"]
        ),
        CAPTIONS,
    ),
    layout(
        "Flickr8k.token.txt (no header, name#number)",
        lambda f: text(f, "Flickr8k.token.txt", "1.png#0\ta dog, running\n2.png#4\ttwo cats\n"),
        CAPTIONS,
    ),
    layout(
        "Flickr30k results.csv (parted by | and a space)",
        lambda f: text(f, "results.csv", "image| text\n1.png| a dog, running\n2.png| two cats\n"),
        CAPTIONS,
    ),
    layout(
        "ROCO captions.txt (no header)",
        lambda f: text(f, "captions.txt", "ROCO_00001\tA scan of the left knee from the side\n"),
        refused="is no name of a column",
    ),
    layout(
        "a text that is no table",
        lambda f: text(f, "notes.txt", "remember the milk\n"),
        refused="the only column",
    ),
]
