"""The plugin's table as the program nft lists it, in a form that can be compared."""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Namespace

NETLINK_NETFILTER, NLM_F_REQUEST = 12, 1  # linux/netlink.h
NFT_MSG_GETGEN = 10 << 8 | 16  # linux/netfilter/nf_tables.h
PASSING = {"deleted", "local_ip4", "local_ip6"}  # sets whose elements end by themselves
UNSTEADY = {"handle", "counter", "index"}


def of(node: Namespace) -> Counter[str]:
    """Return the parts of the table: what is declared, each element and each rule; the order of rules does not show."""
    listed = node.run("nft", "-j", "list", "table", "inet", "hostport", check=False).stdout
    return Counter(part for item in json.loads(listed or '{"nftables": []}')["nftables"] for part in _parts(item))


def _parts(item: dict[str, Any]) -> Iterator[str]:
    [(kind, body)] = item.items()
    if kind == "metainfo":
        return
    name = body.get("name") or body["chain"]
    for element in body.pop("elem", ()) if name not in PASSING else ():
        yield f"{name} {json.dumps(_steady(element))}"
    body.pop("elem", None)
    yield f"{kind} {json.dumps(_steady(body))}"


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(of_key) for key, of_key in value.items() if key not in UNSTEADY}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def difference(expected: Counter[str], actual: Counter[str]) -> str:
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
