"""The tables of docs/benchmarks.md: a case's rows, with machine, command and commit, between marks of its own."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENT = "docs/benchmarks.md"
END = "<!-- end of the cases -->"
"""Before it tables of cases are added that are not there yet."""

MORE = {
    "loss": "last loss",
    "usual": "median",
    "added_gb": "GB beside all weights",
    "weights_gb": "GB of the base",
    "of_peak": "of the peak",
}
"""Keys of rows that tables show where they are there -> the column's head."""


def write_table(case: str, what: str, command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Puts a case's table in the place of its last one."""
    # here, as `versus` starts the cases with packages that have neither yet
    from mmpeft.files import write_whole

    path = ROOT / DOCUMENT
    begin, end = f"<!-- {case} -->", f"<!-- end of {case} -->"
    section = f"{begin}\n{section_of(case, what, command, rows)}\n{end}"
    text, earlier = path.read_text(), re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
    if not earlier.search(text):
        text = text.replace(END, f"{begin}{end}\n\n{END}")
    write_whole(path, earlier.sub(lambda _: section, text))


def section_of(case: str, what: str, command: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A heading, what was measured where and how, and a table for every race."""
    first = what.split("\n\n")[0].replace("\n", " ")
    last = rows[-1]
    where = last["gpu"] or f"{last['threads']} threads of {last['cpu']}"
    lines = [f"### {case}", "", f"{first} `{command}`; {where}, commit {_commit()}, {date.today()}."]
    for race in dict.fromkeys((row["race"], row["unit"]) for row in rows):
        lines += ["", _table(race[0], [row for row in rows if (row["race"], row["unit"]) == race])]
    return "\n".join(lines)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    against = list(dict.fromkeys(other for row in rows for other in row["ratios"]))
    more = [key for key in MORE if any(row.get(key) is not None for row in rows)]
    head = [title, rows[0]["unit"], *(f"/ {other}" for other in against), *(MORE[key] for key in more)]
    cells = [
        [
            *(row["run"], f"{row['median']:,.4g}"),
            *(f"{row['ratios'][other]:.2f}x" if other in row["ratios"] else "" for other in against),
            *(f"{row[key]:.3g}" if row.get(key) is not None else "" for key in more),
        ]
        for row in rows
    ]
    from mmpeft.reporting.tables import markdown_table

    return markdown_table(head, cells, ["---", *["---:"] * (len(head) - 1)])


def _commit() -> str:
    """Dirty where anything but the tables differs from it."""
    name, changed = _git("describe", "--always"), _git("status", "--porcelain", "--", ".", f":!{DOCUMENT}")
    return f"{name or 'unknown'}{'-dirty' * bool(changed)}"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
