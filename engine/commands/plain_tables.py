"""What reports of commands are printed with: lines as they are, and tables without lines."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_line(console: Console, text: str) -> None:
    """Print ``text`` as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """A table with these titles, all but the first column to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, title in enumerate(columns):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    return table
