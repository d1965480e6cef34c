from __future__ import annotations

import select
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


def test_where_reports_are_lost_the_table_may_have_been_deleted(node: Node, events: TableEvents) -> None:
    chains = "; ".join(f"add chain inet other c{number}" for number in range(2000))
    node.run("nft", "-f", "-", input=chains)
    for _ in range(3):
        node.run("nft", "-f", "-", input=f"delete table inet other; add table inet other; {chains}")
    assert events.is_deleted()
