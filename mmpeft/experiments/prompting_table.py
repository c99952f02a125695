"""What `mmpeft compare-prompting` found, as a table."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any]) -> None:
    """Prints the table, and training beside it."""
    rows, training = result["rows"], result["training"]
    title = f"{result['questions']} questions, {result['draws']} draws; GFLOP and ms of one answer"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("", "tokens", "accuracy", "GFLOP", "times", "ms"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        if "note" in row:
            table.add_row(row["method"], f"> {result['window']}", "too long")
            continue
        figures = (f"{row[key]:.0f}" if row[key] >= 100 else f"{row[key]:.3g}" for key in ("gflop", "times"))
        table.add_row(
            row["method"], f"{row['tokens']:.0f}", spread(row["accuracies"]), *figures, f"{row['ms']:.0f}"
        )
    Console().print(table)
    print(
        f"The vision encoder takes {result['vision_gflop']:.3f} GFLOP of that per image of the prompt, which a"
    )
    print(f"cache of features saves. The adapter adds {100 * result['adapter_share']:.3f} % to an answer.")
    for row in rows:
        if "note" in row:
            print(f"{row['method']}: {row['note']}")
    if "note" in training:
        print(f"Training was not counted: {training['note']}")
        return
    print(
        f"Training took {training['gflop']:,.0f} GFLOP: {training['batches']} batches of "
        f"{training['gflop_of_a_batch']:,.1f} and {training['images']} images. It has paid for itself"
    )
    for row in rows[2:]:
        if row["times"] and row["times"] > 1:
            answers = training["gflop"] / (row["gflop"] - rows[0]["gflop"])
            print(f"  after {answers:,.0f} answers of: {row['method']}")


def spread(accuracies: Sequence[float]) -> str:
    """The mean, and the lowest and highest of several draws."""
    mean = f"{statistics.mean(accuracies):.3f}"
    return f"{mean} ({min(accuracies):.2f}-{max(accuracies):.2f})" if len(accuracies) > 1 else mean
