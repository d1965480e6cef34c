"""How it looks: tables and statements on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cni_hostport.operate.statements import Status

T = TypeVar("T")

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cni_hostport.operate.statements import Statement

STYLES = {Status.OK: "green", Status.NOTE: "yellow", Status.PROBLEM: "bold red"}
MANY = 20  # items, up to which nobody needs a progress bar
LABEL = 9  # characters, the longest status and a space


def console(*, stderr: bool = False) -> Console:
    """Return where to print: as wide as the terminal, and elsewhere as wide as the text."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 1 << 12)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows below headings, of which those in ``right`` are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out = console()
    with out.capture() as captured:
        out.print(table)
    lines = captured.get().splitlines()
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in lines))


def print_statement(statement: Statement) -> None:
    """Print a statement, and below it what it means and what to do."""
    out = console()
    table = Table.grid(padding=0)
    table.add_column(width=LABEL, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(statement.status, STYLES[statement.status]), Text(statement.text))
    for line in statement.details:
        table.add_row("", Text(f"  {line}", "dim"))
    if statement.meaning:
        table.add_row("", Text(statement.meaning))
    if statement.remedy:
        table.add_row("", Text(f"-> {statement.remedy}", "bold"))
    with out.capture() as captured:
        out.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items, of which there are about ``total``, with a progress bar if that takes long on a terminal."""
    out = console(stderr=True)
    with Progress(console=out, transient=True, disable=not (out.is_terminal and total >= MANY)) as bar:
        yield from bar.track(items, total, description=what)
