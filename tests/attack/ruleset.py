"""The plugin's table as the program nft lists it, in a form that can be compared."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Namespace

NETLINK_NETFILTER, NLM_F_REQUEST = 12, 1  # linux/netlink.h
NFT_MSG_GETGEN = 10 << 8 | 16  # linux/netfilter/nf_tables.h
PASSING = {"deleted", "local_ip4", "local_ip6"}  # sets whose elements end by themselves
UNSTEADY = {"handle", "counter", "index"}


class Part(NamedTuple):
    """Something declared, an element or a rule; ``name`` is that of its map, set or chain, ``body`` JSON."""

    kind: str
    name: str
    body: str


Table = Counter[Part]


def read(node: Namespace) -> Table:
    """Return the parts of the table; the order of rules does not show."""
    listed = node.run("nft", "-j", "list", "table", "inet", "hostport", check=False).stdout
    return Counter(part for item in json.loads(listed or '{"nftables": []}')["nftables"] for part in _parts(item))


def elements(table: Table) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a table, as libnftables' JSON has them, each with the name of its map or set."""
    return ((part.name, json.loads(part.body)) for part in table if part.kind == "element")


def chains(table: Table) -> list[str]:
    """Return the names of a table's chains."""
    return [part.name for part in table if part.kind == "chain"]


def _parts(item: dict[str, Any]) -> Iterator[Part]:
    [(kind, body)] = item.items()
    if kind == "metainfo":
        return
    name = body.get("name") or body["chain"]
    for element in body.pop("elem", ()) if name not in PASSING else ():
        yield Part("element", name, json.dumps(_steady(element)))
    body.pop("elem", None)
    yield Part(kind, name, json.dumps(_steady(body)))


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        parts = {key: _steady(part) for key, part in value.items() if key not in UNSTEADY}
        # an owner's container and interface: what is noted of its namespace depends on whether that can be looked at
        return parts | ({"comment": " ".join(re.split("[ @]", parts["comment"])[:2])} if "comment" in parts else {})
    return [_steady(item) for item in value] if isinstance(value, list) else value


def difference(expected: Table, actual: Table) -> str:
    """Tell in what two tables differ, empty if they do not."""
    return "; ".join([f"lacks {part}" for part in expected - actual] + [f"has {part}" for part in actual - expected])


class Generation:
    """The number of changes to a namespace's ruleset, by which it costs little to tell that there was none."""

    def __init__(self, node: Namespace) -> None:
        with node.inside():
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def number(self) -> int:
        self._socket.send(struct.pack("=IHHII4x", 20, NFT_MSG_GETGEN, NLM_F_REQUEST, 1, 0))
        # struct nlmsghdr, struct nfgenmsg, and of the attribute NFTA_GEN_ID its header
        return int(struct.unpack_from(">I", self._socket.recv(4096), 16 + 4 + 4)[0])
