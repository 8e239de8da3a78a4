"""Tables for notebooks, in plain HTML: what they hold is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_LEFT = ' style="text-align: left"'


def facts(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """Returns a table of names and texts.

    Args:
        caption: What stands above it.
        rows: The names and texts.

    Example:
        >>> facts("Plan", [("steps", "40"), ("bands", "< 4")])
        '<table><caption>Plan</caption><tr><th style="text-align: left">steps</th><td \
style="text-align: left">40</td></tr><tr><th style="text-align: left">bands</th><td \
style="text-align: left">&lt; 4</td></tr></table>'
    """
    lines = [
        f"<tr><th{_LEFT}>{html.escape(name)}</th><td{_LEFT}>{html.escape(text)}</td></tr>"
        for name, text in rows
    ]
    return f"<table><caption>{html.escape(caption)}</caption>{''.join(lines)}</table>"


def columns(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    best: int | None = None,
    notes: Iterable[str] = (),
) -> str:
    """Returns a table with a header.

    Args:
        header: The names of the columns.
        rows: The cells of each row.
        best: The number of the row that is printed in bold; None for none.
        notes: What stands below it, each in a line of its own.

    Example:
        >>> columns(["bands"], [["1"], ["2"]], best=1)
        '<table><tr><th>bands</th></tr><tr><td>1</td></tr><tr><td><b>2</b></td></tr></table>'
    """
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    for number, row in enumerate(rows):
        cells = [html.escape(cell) for cell in row]
        if number == best:
            cells = [f"<b>{cell}</b>" for cell in cells]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>" + below
