"""Facts and a table as text: markdown for a file, plain for a terminal."""

import re
from collections.abc import Sequence
from io import StringIO

from rich.box import ASCII_DOUBLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

Facts = Sequence[tuple[str, str]]
Rows = Sequence[tuple[str, ...]]


def markdown(title: str, facts: Facts, columns: Sequence[str], rows: Rows) -> str:
    """Return a heading, a list of facts and a table in GitHub's markdown.

    Args:
        title: The heading.
        facts: Names and what to say about them.
        columns: Column names; the first column is aligned left, the others right.
        rows: Cells.

    Returns:
        The text, with a newline at its end.
    """
    lines = [columns, ("---", *("---:",) * (len(columns) - 1)), *(tuple(map(_escaped, row)) for row in rows)]
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([f"# {title}", "", *(f"- {name}: {_escaped(text)}" for name, text in facts), "", *table, ""])


def plain_text(facts: Facts, columns: Sequence[str], rows: Rows, *, num_totals: int = 0, width: int = 120) -> str:
    """Return a table and the facts below it in ASCII art.

    Args:
        facts: Names and what to say about them.
        columns: Column names; the first column is aligned left, the others right.
        rows: Cells.
        num_totals: Number of last rows to set apart by a line.
        width: Longest line, in characters; longer cells are folded.

    Returns:
        The text, without colours.
    """
    table = Table(box=ASCII_DOUBLE_HEAD)
    # Names are searched for and copied, so they stay in one piece as long as that leaves room for the numbers.
    whole = max((len(row[0]) for row in rows), default=0) <= width // 2
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=whole and not number)
    for number, row in enumerate(rows):
        # Text, as rich would read square brackets in a string as markup.
        table.add_row(*(Text(_printable(cell)) for cell in row), end_section=number == len(rows) - num_totals - 1)
    listed = Table.grid(padding=(0, 2))
    for name, text in facts:
        listed.add_row(Text(name), Text(_printable(text)))
    output = StringIO()
    Console(file=output, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(table, listed)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _escaped(text: str) -> str:
    return re.sub(r"([\\|*`\[\]])", r"\\\1", _printable(text)).replace("<", "&lt;")


def _printable(text: str) -> str:
    # Names come from plans, and plans from strangers: none may break out of its cell or steer a terminal.
    return "".join(c if c.isprintable() else "?" for c in text)
