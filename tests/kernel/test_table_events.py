from __future__ import annotations

import select
from errno import ENOBUFS
from typing import TYPE_CHECKING

import pytest

from cni_hostport.kernel.table_events import TableEvents

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Node


@pytest.fixture
def events(node: Node) -> Iterator[TableEvents]:
    node.run("nft", "add table inet hostport; add table ip hostport; add table inet other")
    with node.inside():
        made = TableEvents()
    yield made
    made.close()


@pytest.mark.parametrize("command", ["delete table inet hostport", "flush ruleset"])
def test_a_deletion_of_the_table_is_reported_once(node: Node, events: TableEvents, command: str) -> None:
    node.run("nft", command)
    assert select.select([events], [], [], 5)[0]
    assert events.is_deleted()
    assert not events.is_deleted()


def test_other_tables_and_other_changes_are_not_its_deletion(node: Node, events: TableEvents) -> None:
    for command in ("delete table ip hostport", "delete table inet other", "add chain inet hostport c"):
        node.run("nft", command)
    node.run("nft", "delete chain inet hostport c; flush table inet hostport")
    assert not events.is_deleted()


@pytest.mark.parametrize("is_deleted", [False, True])
def test_where_reports_are_lost_the_table_itself_tells(
    node: Node, events: TableEvents, monkeypatch: pytest.MonkeyPatch, *, is_deleted: bool
) -> None:
    monkeypatch.setattr(events, "_socket", _Overrun(events))
    if is_deleted:
        node.run("nft", "delete table inet hostport")
    with node.inside():
        assert events.is_deleted() is is_deleted


class _Overrun:
    """A socket that lost reports, and has no others."""

    def __init__(self, events: TableEvents) -> None:
        self._socket = events._socket  # noqa: SLF001 - what it takes the place of
        self._answers = [OSError(ENOBUFS, "lost"), BlockingIOError()]

    def recv(self, *_: object) -> bytes:
        raise self._answers.pop(0)

    def close(self) -> None:
        self._socket.close()


def test_ten_thousand_elements_of_others_are_no_deletion(node: Node, events: TableEvents) -> None:
    elements = ", ".join(str(number) for number in range(10_000))
    node.run(
        "nft", "-f", "-", input=f"add set inet other s {{ type mark; }}; add element inet other s {{ {elements} }}"
    )
    assert not events.is_deleted()
