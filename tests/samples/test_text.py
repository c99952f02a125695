"""Tests of the text data that is made on the machine: from Python's own sources, and invented facts."""

import json
import re
from pathlib import Path

import pytest

from mmpeft.data.sources import load_records
from mmpeft.samples import facts, manual, modules, standard_library
from mmpeft.samples.docstrings import build_docstrings
from mmpeft.samples.rows import draw, read_rows, split_of, write_rows
from mmpeft.samples.sample import PrepareError
from mmpeft.samples.standard_library import Documented, read_module

BUILDS = {
    "docstrings": build_docstrings,
    "modules": modules.build_modules,
    "manual": manual.build_manual,
    "facts": facts.build_facts,
}


def build_all(folder: Path) -> Path:
    for name, build in BUILDS.items():
        (folder / name).mkdir(parents=True)
        build(folder, folder / name)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """All four sets of this Python."""
    return build_all(tmp_path_factory.mktemp("made"))


def rows_of(folder: Path) -> dict[str, list[dict]]:
    return {path.stem: read_rows(path) for path in sorted(folder.glob("*.jsonl"))}


def question(row: dict) -> str:
    return row["conversations"][0]["value"]


def answer(row: dict) -> str:
    return row["conversations"][1]["value"]


def test_every_row_is_read_as_a_conversation_without_image(made):
    files = sorted(made.glob("*/*.jsonl"))
    assert len(files) == 3 + 3 + 1 + 7
    for file in files:
        for record, row in zip(load_records(file), read_rows(file), strict=True):
            assert not record["images"]
            assert len(record["turns"]) == 1
            assert record["id"] == row["id"]
            assert record["turns"][0][1] == (row["text"] if file.stem == "held" else answer(row))


def test_making_it_again_gives_the_same_bytes(made, tmp_path):
    standard_library.documented.cache_clear()
    again = build_all(tmp_path / "again")
    for file in made.glob("*/*"):
        assert (again / file.relative_to(made)).read_bytes() == file.read_bytes()


def test_the_readme_tells_the_python_and_the_numbers(made):
    import platform

    for name in ("docstrings", "modules", "manual"):
        told = (made / name / "README.txt").read_text()
        assert f"Python {platform.python_version()} " in told
        for split, rows in rows_of(made / name).items():
            assert f"{split}: {len(rows)} " in told


# Docstrings

SOURCE = '''
import os

def copy(src: str, dst: str = "there", *args, deep: bool = True) -> None:
    """Copy a file or a folder
    to another place.  What is there is lost.

    More about it.
    """

def _private(): "This is a sentence of a private function."
def short(): "Too short."
def fragment(): "this does not begin with a capital letter."
def open_end(): "It has no end of a sentence"
def nothing(): pass

class Tree(dict):
    """A tree of things (e.g. of leaves) that grows."""

    def __init__(self): "Nobody asks for the initialiser."
    def grow(self, /, by=1): "Make it larger than it was."
    @classmethod
    def plant(cls, *, where): "Make a new one in a garden."
    @property
    def height(self): "How high the tree has become."
    class Leaf:
        async def fall(self): "Fall down to the ground."

def marked(): "Replace <image> by something else in it."
'''


def test_names_signatures_and_first_sentences_are_read_from_source():
    found = {entry.signature: entry.summary for entry in read_module("garden", SOURCE)}
    assert found == {
        "copy(src, dst='there', *args, deep=True)": "Copy a file or a folder to another place.",
        "Tree": "A tree of things (e.g. of leaves) that grows.",
        "Tree.grow(by=1)": "Make it larger than it was.",
        "Tree.plant(*, where)": "Make a new one in a garden.",
        "Tree.height": "How high the tree has become.",
        "Tree.Leaf.fall()": "Fall down to the ground.",
    }


def test_a_file_that_does_not_parse_is_passed_over():
    assert not list(read_module("broken", "def f(:"))


def test_the_library_is_read_without_tests_and_without_importing_it(made):
    import sys

    found = standard_library.documented()
    assert {"shutil", "email.message", "decimal"} <= {entry.module for entry in found}
    assert not [
        e.module for e in found if re.search(r"(^|\.)(test|tests|site-packages|_\w*)(\.|$)", e.module)
    ]
    assert "turtle" not in sys.modules
    assert "antigravity" not in sys.modules


def test_a_python_without_sources_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(PrepareError, match="no documented Python sources"):
        standard_library.documented.__wrapped__()
    with pytest.raises(PrepareError, match=r"topics\.py is not there"):
        manual.build_manual(tmp_path, tmp_path)


def test_no_module_and_no_sentence_is_in_two_splits(made):
    splits = rows_of(made / "docstrings")
    assert {split for split, rows in splits.items() if len(rows) > 100} == {"train", "val", "test"}
    assert len(splits["train"]) > len(splits["val"]) + len(splits["test"])
    modules_of = {entry.path: entry.module for entry in standard_library.documented()}
    where: dict[str, set[str]] = {}
    answers = []
    for split, rows in splits.items():
        for row in rows:
            assert row["task"] == "document"
            where.setdefault(modules_of[row["id"].removeprefix("docstrings-")], set()).add(split)
            answers.append(answer(row).lower())
    assert all(len(found) == 1 for found in where.values())
    assert len(answers) == len(set(answers))


def test_a_call_and_a_class_are_asked_for_in_good_english(made):
    asked = {row["id"]: question(row) for rows in rows_of(made / "docstrings").values() for row in rows}
    copytree = asked["docstrings-shutil.copytree"]
    assert copytree.startswith("What does shutil.copytree(src, dst, symlinks=False, ")
    assert copytree.endswith(") do?")
    assert asked["docstrings-collections.Counter"] == "What is collections.Counter?"


def test_splits_depend_on_the_key_alone_and_have_their_shares():
    keys = [f"key {number}" for number in range(4000)]
    found = [split_of(key, val=0.1, test=0.2) for key in keys]
    assert found[::-1] == [split_of(key, val=0.1, test=0.2) for key in reversed(keys)]
    shares = {split: found.count(split) / len(keys) for split in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.03)
    assert 0 <= min(map(draw, keys)) < 0.01
    assert 0.99 < max(map(draw, keys)) < 1


# Kinds of modules


def entries(number: int, *packages: str) -> tuple[Documented, ...]:
    return tuple(
        Documented(package, f"f{n}", f"f{n}()", f"{package} {n}.")
        for package in packages
        for n in range(number)
    )


def test_kinds_are_balanced_in_every_split_and_no_function_is_in_two(made):
    splits = rows_of(made / "modules")
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(ids) == len(set(ids))
    for rows in splits.values():
        choices = rows[0]["choices"]
        assert 4 <= len(choices) <= 8
        answers = [answer(row) for row in rows]
        assert all(row["choices"] == choices and row["task"] == "classify" for row in rows)
        assert {answers.count(choice) for choice in choices} == {len(rows) // len(choices)}
    assert len(splits["train"]) > len(splits["test"]) > len(splits["val"]) > 50


def test_the_kinds_do_not_come_one_after_the_other(made):
    for rows in rows_of(made / "modules").values():
        assert len({answer(row) for row in rows[:20]}) > 2


def test_no_question_names_its_answer(made):
    for rows in rows_of(made / "modules").values():
        for row in rows:
            package = row["id"].removeprefix("modules-").split(".")[0]
            sentence = question(row).removeprefix("What kind of module is this from? ")
            assert not re.search(rf"\b({answer(row)}|{package})\b", sentence, re.IGNORECASE)
    entry = Documented("email.message", "f", "f()", "Email is mail: Mailers mail e-mail.")
    assert modules.blank(entry, "mail") == "... is ...: Mailers ... e-...."


def test_no_package_is_of_two_kinds():
    packages = [package for packages in modules.KINDS.values() for package in packages.split()]
    assert len(packages) == len(set(packages))


def test_a_kind_that_this_python_hardly_documents_is_left_out():
    many = entries(modules.FEWEST + 9, "ast", "asyncio", "os", "email") + entries(
        modules.FEWEST - 1, "tkinter"
    )
    kinds = modules.sort_by_kind(many)
    assert set(kinds) == {"code", "concurrency", "files", "mail"}
    assert {len(own) for own in kinds.values()} == {modules.FEWEST + 9}
    with pytest.raises(PrepareError, match=r"'graphics': 99.*four kinds"):
        modules.sort_by_kind(entries(modules.FEWEST, "ast", "os") + entries(99, "tkinter"))


# Paragraphs of the manual

TOPIC = """
The "if" statement
******************

The *condition* of the "if" statement is evaluated first, and the suite
that belongs to it is run when the condition holds; otherwise, as one
would expect of a statement with this name, nothing whatever happens un-
til an "else" clause comes [1].

   if_stmt ::= "if" expression that is long enough to be counted here and goes on and on and on and on and on
               and on and on and on and on and on and on and on and on and on and on and on and on and on.

Too short a paragraph.
"""


def test_prose_is_kept_without_its_markup_and_all_else_is_left_out():
    (found,) = manual.paragraphs({"if": TOPIC, "again": TOPIC})
    assert found.startswith(
        "The condition of the if statement is evaluated first, and the suite that belongs"
    )
    assert found.endswith("nothing whatever happens un-til an else clause comes.")


def test_held_paragraphs_are_prose_of_the_promised_length_each_once(made):
    (rows,) = rows_of(made / "manual").values()
    texts = [row["text"] for row in rows]
    assert 150 <= len(texts) <= manual.MOST
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert 40 <= len(text.split()) <= 120
        assert text[0].isupper()
        assert text.endswith(".")
        assert "\n" not in text


# Facts


@pytest.fixture(scope="module")
def invented(made) -> dict[str, dict[str, str]]:
    """File -> question -> answer."""
    files = rows_of(made / "facts")
    told = {name: {question(row): answer(row) for row in rows} for name, rows in files.items()}
    assert {name: len(found) for name, found in told.items()} == {n: len(rows) for n, rows in files.items()}
    return told


def test_there_are_sixty_facts_of_which_a_third_changes(invented):
    assert {name: len(found) for name, found in invented.items()} == {
        "learn": 120,
        "update": 40,
        "ask_old": 20,
        "ask_new": 20,
        "rephrased": 40,
        "unchanged": 40,
        "unchanged_rephrased": 80,
    }


def test_the_facts_agree_with_each_other(invented):
    learn, update = invented["learn"], invented["update"]
    assert invented["ask_old"].keys() == invented["ask_new"].keys()
    for asked, first in invented["ask_old"].items():
        assert learn[asked] == first
        assert update[asked] == invented["ask_new"][asked] != first
    for asked, kept in invented["unchanged"].items():
        assert learn[asked] == kept
        assert asked not in update
    assert {asked for asked in learn if asked in update} == update.keys()
    for name in ("rephrased", "unchanged_rephrased"):
        assert not invented[name].keys() & (learn.keys() | update.keys())


def test_a_rephrased_question_has_the_new_answer_of_the_same_fact(made):
    files = rows_of(made / "facts")
    number = {name: {r["id"].split("-")[1]: answer(r) for r in rows} for name, rows in files.items()}
    assert number["rephrased"] == number["ask_new"] == number["update"]
    assert not number["unchanged"].keys() & number["update"].keys()
    assert number["unchanged"] == number["unchanged_rephrased"]


def test_every_fact_has_its_own_subject_and_another_seed_gives_others():
    drawn = list(facts.draw_facts(0))
    assert len({wording for fact in drawn for wording in fact.wordings}) == 240
    assert drawn == list(facts.draw_facts(0))
    assert drawn != list(facts.draw_facts(1))
    for relation in facts.RELATIONS:
        assert len(relation.wordings) == 4
        assert all("{name}" in wording for wording in relation.wordings)
        assert len(set(relation.answers.split())) == len(relation.answers.split()) > 1


def test_lines_come_back_as_they_were_written(tmp_path):
    rows = [{"text": "grün\u2028 \x85 \n"}, {"text": "two"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert json.loads((tmp_path / "rows.jsonl").read_bytes().split(b"\n")[0]) == rows[0]
