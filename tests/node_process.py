"""This very process at work on a node, as the operator's commands are."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

from scratch import Traffic

from cni_hostport import netlink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Node


@contextmanager
def closing() -> Iterator[None]:
    """Close at the end of the block what stays open until a process ends."""
    traffic = Traffic()
    with mock.patch.object(netlink, "socket", traffic.open):
        try:
            yield
        finally:
            netlink.close_all()
            for opened in traffic.sockets:
                opened.close()


@contextmanager
def on(node: Node) -> Iterator[None]:
    """Run the block on a node, and close what it leaves open."""
    with node.inside(), closing():
        yield
