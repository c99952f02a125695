"""The data set `modules`: a sentence of the standard library's documentation -> what kind of module it is from.

Rows of task "classify" with all kinds as choices. The kinds follow the chapters of Python's library reference; they
have the same number of rows in every split. A sentence does not name its kind or package: those words are blanked.
"""

import re
from pathlib import Path

from mmpeft.samples.rows import SPLITS, conversation, draw, split_at, write_rows
from mmpeft.samples.sample import PrepareError
from mmpeft.samples.standard_library import Documented, documented, write_readme

KINDS = {
    "code": "ast code codeop dis importlib inspect lib2to3 modulefinder pickletools pkgutil pyclbr pydoc symtable "
    "tokenize types typing zipimport",
    "concurrency": "asyncio concurrent contextvars multiprocessing queue sched selectors subprocess threading",
    "files": "bz2 filecmp fileinput fnmatch glob gzip io lzma mimetypes ntpath os pathlib posixpath shutil stat "
    "tarfile tempfile zipfile",
    "graphics": "idlelib tkinter turtle",
    "mail": "email imaplib mailbox nntplib poplib smtpd smtplib",
    "numbers": "calendar colorsys datetime decimal fractions numbers random statistics",
    "testing": "bdb cProfile doctest pdb profile pstats timeit trace traceback tracemalloc unittest",
    "web": "cgi ftplib html http ipaddress socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc",
}
"""Kind -> its packages."""
FEWEST = 100
"""A kind with fewer sentences (a Python without tkinter, say) is left out."""
HELD_OUT = {"val": 0.1, "test": 0.2}
"""Shares of every kind's sentences."""
BLANK = "..."


def build_modules(root: Path, folder: Path) -> None:
    """Writes train.jsonl, val.jsonl and test.jsonl; of ``root`` nothing is needed.

    Raises:
        PrepareError: this Python documents too little.
    """
    kinds = sort_by_kind(documented())
    rows: dict[str, list[tuple[float, dict]]] = {split: [] for split in SPLITS}
    for kind, entries in kinds.items():
        for number, entry in enumerate(entries):
            place, split = draw(f"order {entry.path}"), split_at(number / len(entries), **HELD_OUT)
            rows[split].append((place, _row(entry, kind, sorted(kinds))))
    for split, placed in rows.items():
        write_rows(folder / f"{split}.jsonl", (row for _, row in sorted(placed, key=lambda pair: pair[0])))
    counts = (f"{split}: {len(placed)} sentences" for split, placed in rows.items())
    write_readme(folder, f"sentences and the kind of module they document ({', '.join(kinds)})", counts)


def sort_by_kind(entries: tuple[Documented, ...]) -> dict[str, list[Documented]]:
    """Equally many sentences of every kind, in an order drawn by their names.

    Raises:
        PrepareError: fewer than four kinds have enough.
    """
    kind_of = {package: kind for kind, packages in KINDS.items() for package in packages.split()}
    found: dict[str, list[Documented]] = {kind: [] for kind in KINDS}
    for entry in entries:
        if entry.package in kind_of:
            found[kind_of[entry.package]].append(entry)
    kinds = {kind: own for kind, own in found.items() if len(own) >= FEWEST}
    if len(kinds) < 4:
        numbers = {kind: len(own) for kind, own in found.items()}
        raise PrepareError(
            f"this Python documents {numbers}; wanted {FEWEST} sentences of four kinds or more: use one that has its "
            "whole standard library as source files"
        )
    number = min(map(len, kinds.values()))
    return {kind: sorted(own, key=lambda e: draw(f"kind {e.path}"))[:number] for kind, own in kinds.items()}


def blank(entry: Documented, kind: str) -> str:
    """The sentence without its kind's and package's name."""
    return re.sub(rf"\b({kind}|{re.escape(entry.package)})\b", BLANK, entry.summary, flags=re.IGNORECASE)


def _row(entry: Documented, kind: str, kinds: list[str]) -> dict:
    question = f"What kind of module is this from? {blank(entry, kind)}"
    return conversation(f"modules-{entry.path}", "classify", question, kind, choices=kinds)
