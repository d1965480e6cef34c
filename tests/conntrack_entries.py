"""The entries of connection tracking on a node."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lab import CLIENT4

if TYPE_CHECKING:
    from lab import Node

PORTS = 50_000  # to which datagrams are sent from one source port


def identities(node: Node, protocol: str, pattern: str) -> set[str]:
    """Return the identities of the entries of a protocol whose lines, as conntrack prints them, match a pattern."""
    listings = [node.run("conntrack", "-L", "-p", protocol, "-o", "id", "-f", family) for family in ("ipv4", "ipv6")]
    lines = "".join(listing.stdout for listing in listings).splitlines()
    return {re.findall(r"\bid=\d+", line)[0] for line in lines if re.search(pattern, line)}


def keep_for_long(node: Node) -> None:
    """Have entries of UDP flows outlive a test, however slow the machine is: those without an answer last for 30 s."""
    node.set_sysctl("net/netfilter/nf_conntrack_udp_timeout", 3600)


def crowd(node: Node, entries: int) -> None:
    """Have the node send so many datagrams to the client, each of a flow of its own."""
    keep_for_long(node)
    for start in range(0, entries, PORTS):
        with node.socket("udp", CLIENT4) as sending:
            for port in range(10_000, 10_000 + min(PORTS, entries - start)):
                try:
                    sending.sendto(b"", (CLIENT4, port))
                except ConnectionRefusedError:  # of an earlier one
                    sending.sendto(b"", (CLIENT4, port))
