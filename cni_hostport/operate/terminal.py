"""The output for people: tables and statements on a terminal, plain lines elsewhere.

All that people read of the commands is written here, with what is not printable escaped.
"""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cni_hostport.operate.statements import Status
from cni_hostport.text import escaped

T = TypeVar("T")

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType

    from cni_hostport.operate.statements import Statement

STYLES = {Status.OK: "green", Status.NOTE: "yellow", Status.PROBLEM: "bold red"}
STDERR = 2
PROGRESS_BAR_ITEMS = 20  # with fewer, nobody needs a progress bar
PADDING_BLANKS = re.compile(
    r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE
)  # of a line up to its width, before a style's end
COLUMN_GAP = 2  # blanks
UNLIMITED_WIDTH = 1 << 20  # columns
STATUS_WIDTH = 9  # columns: the longest status and a blank


def console(*, stderr: bool = False) -> Console:
    """Return where to print: as wide as the terminal, and elsewhere as wide as the text."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else UNLIMITED_WIDTH)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[str] = ()) -> None:
    """Print rows below headings; the columns of those in ``numeric`` hold numbers.

    Where the terminal is too narrow for that, print one row below the other, each on several lines.
    """
    rows = [tuple(map(escaped, row)) for row in rows]
    screen = console()
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    if sum(widths) + COLUMN_GAP * (len(widths) - 1) > screen.width:
        _write(screen, *(line for row in rows for line in _record(headings, row, screen.width)))
        return

    def line(cells: Sequence[str]) -> str:
        columns = zip(headings, cells, widths, strict=True)
        blanks = ((cell, " " * (width - cell_len(cell)), heading in numeric) for heading, cell, width in columns)
        aligned = (blank + cell if is_right else cell + blank for cell, blank, is_right in blanks)
        return (" " * COLUMN_GAP).join(aligned).rstrip()

    _write(screen, Text(line(headings), "bold"))
    _write_text("".join(f"{line(row)}\n" for row in rows))  # a table of rich's would take a millisecond a row


def _record(headings: Sequence[str], row: Sequence[str], width: int) -> Iterator[RenderableType]:
    """Yield the lines of a row: its first cell, and as many of the others on each line as there is room for."""
    yield Text(row[0], "bold", overflow="fold")
    line = Text()
    for heading, cell in zip(headings[1:], row[1:], strict=True):
        item = Text.assemble((heading, "dim"), " ", cell)
        if line and COLUMN_GAP + line.cell_len + COLUMN_GAP + item.cell_len > width:
            yield Padding(line, (0, 0, 0, COLUMN_GAP))
            line = Text()
        line = Text(" " * COLUMN_GAP).join([line, item]) if line else item
        line.overflow = "fold"
    yield Padding(line, (0, 0, 0, COLUMN_GAP))


def _write(screen: Console, *parts: RenderableType) -> None:
    """Print without the blanks with which lines are filled."""
    with screen.capture() as capture:
        for part in parts:
            screen.print(part)
    _write_text(PADDING_BLANKS.sub(r"\1", capture.get()))


def _write_text(text: str) -> None:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # what its encoding lacks; that of stderr is so from the start
    sys.stdout.write(text)


def print_line(line: str) -> None:
    """Print a line of a result."""
    _write_text(f"{escaped(line)}\n")


def log(line: str) -> None:
    """Print a line about the work on a result, on stderr; where that cannot be written, it is lost, with later ones."""
    try:
        sys.stderr.write(f"{escaped(line)}\n")
        sys.stderr.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, STDERR)  # else Python's own end fails on what it still has to write
        os.close(null)


def print_statement(statement: Statement) -> None:
    """Print a statement, and below it what it means and what to do."""
    table = Table.grid(padding=0)
    table.add_column(width=STATUS_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(statement.status, STYLES[statement.status]), Text(escaped(statement.text)))
    for line in statement.details:
        table.add_row("", Text(f"  {escaped(line)}", "dim"))
    if statement.meaning:
        table.add_row("", Text(escaped(statement.meaning)))
    if statement.remedy:
        table.add_row("", Text(f"-> {escaped(statement.remedy)}", "bold"))
    _write(console(), table)


def progress(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield the items, of which there are about ``total``, with a progress bar if that takes long on a terminal."""
    screen = console(stderr=True)
    is_shown = screen.is_terminal and total >= PROGRESS_BAR_ITEMS
    with Progress(console=screen, transient=True, disable=not is_shown) as bar:
        yield from bar.track(items, total, description=description)
