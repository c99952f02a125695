"""A comparison of two tests on the screen and as plain data."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mmpeft.evaluation.compare_runs import Compared
from mmpeft.metrics.paired import LEVEL, Comparison


def print_comparison(compared: Compared) -> None:
    """Prints a row for every metric, and what the numbers say in a sentence for each."""
    first, second = compared.names
    one = next(iter(compared.metrics.values()))
    title = f"{one.questions:,} questions, {one.clusters:,} clusters (questions about one image are one)"
    names = ("metric", "A", "B", "B - A", "95 %", "better, worse", "p", "test")
    table = Table(*(Column(name, overflow="fold") for name in names), title=title, title_justify="left")
    for name, own in compared.metrics.items():
        interval = "" if own.interval is None else f"{own.interval[0]:+.4f} to {own.interval[1]:+.4f}"
        sides = f"{own.better:,}, {own.worse:,}"
        table.add_row(
            *(name, f"{own.first:.4f}", f"{own.second:.4f}", f"{own.difference:+.4f}"),
            *(interval, sides, f"{own.p_value:.3g}", own.test),
        )
    console = Console()
    console.print(Text(f"A: {first}\nB: {second}"))
    console.print(table)
    for name, own in compared.metrics.items():
        print(f"{name}: {verdict(own)}")
    if compared.unanswered:
        print(f"{compared.unanswered:,} questions are left out, which one of them could not be asked")


def verdict(own: Comparison) -> str:
    """Whether there is a difference, and how many questions it would take to see one."""
    if own.detectable is None:
        if not own.better and not own.worse:
            return "no difference in any question; that does not tell how large a one would have been seen"
        says = "B differs from A" if own.p_value < LEVEL else "no difference can be told from chance"
        alike = (
            "one cluster alone does"
            if own.clusters < 2
            else f"{own.clusters:,} clusters that differ alike do"
        )
        return f"{says}; {alike} not tell how many questions it would take"
    power = f"a power of 80 % at the level of {100 * LEVEL:g} %"
    shown = f"{own.questions:,} such questions show a difference of {own.detectable:.4f} with {power}"
    if own.needed is None:
        return f"no difference; {shown}"
    says = "B differs from A" if own.p_value < LEVEL else "no difference can be told from chance"
    return f"{says}; to show {own.difference:+.4f} takes {own.needed:,} questions with {power}; {shown}"


def as_data(compared: Compared) -> dict[str, Any]:
    """For JSON."""
    metrics = {
        name: asdict(own) | {"detectable": own.detectable, "questions_needed": own.needed}
        for name, own in compared.metrics.items()
    }
    return {
        "a": compared.names[0],
        "b": compared.names[1],
        "unanswered": compared.unanswered,
        "metrics": metrics,
    }
