"""Metrics on the screen: a table of what is told of all questions, and one of each class."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmpeft.metrics.intervals import is_bound, of_metric, told
from mmpeft.metrics.registry import of_one_class

Values = Mapping[str, float]
"""Metric -> value."""


def print_metrics(measured: Mapping[str, Values]) -> None:
    """Prints totals, metrics down and finetunes across, then for every finetune whose answers are classes a table of
    them, classes down and metrics across; and what was cut.

    Args:
        measured: finetune -> its values, "questions" among them.
    """
    console, joint = Console(), len(measured) > 1
    console.print(_totals(measured))
    for name, own in measured.items():
        if any(of_one_class(metric) for metric in own):
            console.print(_classes(own, f"{name}: classes" if joint else "classes"))
    for name, own in measured.items():
        if own.get("cut_answers"):
            whose = f"{name}: " if joint else ""
            print(
                f"{whose}{own['cut_answers']:,} answers were cut before their end; raise test.max_new_tokens"
            )


def _totals(measured: Mapping[str, Values]) -> Table:
    most = max((int(own["questions"]) for own in measured.values()), default=0)
    table = Table("metric", title=f"test: {most:,} questions")
    for name in measured:
        table.add_column(name if len(measured) > 1 else "value", justify="right")
    for metric in dict.fromkeys(metric for own in measured.values() for metric in own):
        if metric != "questions" and not of_one_class(metric) and not is_bound(metric):
            table.add_row(metric, *(_shown(own, metric) for own in measured.values()))
    return table


def _classes(own: Values, title: str) -> Table:
    by_class: dict[str, dict[str, float]] = {}
    for metric, value in own.items():
        if of_one_class(metric):
            family, _, label = metric.partition("/")
            by_class.setdefault(label, {})[family] = value
    families = dict.fromkeys(family for values in by_class.values() for family in values)
    table = Table(title=title)
    table.add_column("class", overflow="fold")
    for family in families:
        table.add_column(family, justify="right", no_wrap=True)
    for label in by_class:
        table.add_row(Text(label), *(_briefly(own, f"{family}/{label}") for family in families))
    return table


def _briefly(own: Values, metric: str) -> str:
    """A value with its interval, three of which stand beside a name in 80 columns; metrics.json has all digits."""
    interval = of_metric(own, metric)
    if interval is None:
        return _shown(own, metric)
    return f"{own[metric]:.3f} ({interval[0]:.2f}-{interval[1]:.2f})"


def _shown(own: Values, metric: str) -> str:
    """A value with its interval."""
    value = own.get(metric)
    if not isinstance(value, float):
        return "" if value is None else f"{value:,}"
    return f"{value:.4f}{told(of_metric(own, metric))}"
