"""Tables: for the terminal, and in Markdown."""

from collections.abc import Iterable, Sequence

from rich.table import Table


def make_table(title: str, **columns: str) -> Table:
    """An empty table for the terminal; ``columns`` are names and how they are justified."""
    table = Table(title=title, title_justify="left")
    for column, justify in columns.items():
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    return table


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], rules: Sequence[str] | None = None
) -> str:
    """A table in Markdown; ``rules`` say how the columns are justified, "---:" to the right."""
    lines = [head, rules or ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
