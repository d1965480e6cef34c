"""Operations in this process, in an empty network namespace: nothing but the ruleset matters there."""

from __future__ import annotations

import _socket
import json
import subprocess
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from unittest import mock

from cni_hostport import netlink, plugin
from cni_hostport.attachment import Attachment
from cni_hostport.kernel import netns
from cni_hostport.skel import Call

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ADDRESSES = {"c1": ("10.1.0.2/24", "fd00::2/64"), "c2": ("10.1.0.3/24", "fd00::3/64")}
KEY = Attachment("pods", "c1", "eth0").key


class Traffic:
    """The netlink sockets that were opened, and what came and went on them."""

    def __init__(self) -> None:
        self.sockets: list[_socket.socket] = []
        self.sent = self.received = self.datagrams = 0

    @property
    def so_far(self) -> tuple[int, int, int]:
        """Bytes sent, bytes received, datagrams received."""
        return self.sent, self.received, self.datagrams

    def open(self, *arguments: int) -> _socket.socket:
        traffic = self

        class Counted(_socket.socket):
            def send(self, data: Any, *flags: int) -> int:
                traffic.sent += len(data)
                return super().send(data, *flags)

            def recv(self, *arguments: int) -> bytes:
                data = super().recv(*arguments)
                traffic.datagrams += 1
                traffic.received += len(data)
                return data

        self.sockets.append(Counted(*arguments))
        return self.sockets[-1]


@contextmanager
def namespace() -> Iterator[Traffic]:
    """Run the block in an empty network namespace, and close what stays open until a process ends."""
    traffic = Traffic()
    with netns.scratch_namespace(), mock.patch.object(netlink, "socket", traffic.open):
        try:
            yield traffic
        finally:
            netlink.close_all()
            for opened in traffic.sockets:
                opened.close()


def run(
    command: str,
    *mappings: Mapping[str, Any],
    container: str = "c1",
    addresses: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    **keys: Any,
) -> list[str]:
    """Run an operation for a container, with further variables, and return the lines that it logs."""
    ips = [{"address": address} for address in addresses or ADDRESSES[container]]
    environ = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": f"/run/netns/{container}",
        "CNI_IFNAME": "eth0",
        **(variables or {}),
    }
    config = {
        "cniVersion": "1.1.0",
        "name": "pods",
        "prevResult": {"ips": ips},
        "runtimeConfig": {"portMappings": list(mappings)},
        **keys,
    }
    lines: list[str] = []
    plugin.OPERATIONS[command](Call(environ, config), lines.append)
    return lines


def nft(text: str) -> None:
    """Load an nft file's text, in which KEY stands for the key of c1."""
    subprocess.run(["nft", "-f", "-"], input=text.replace("KEY", KEY), check=True, capture_output=True, text=True)


def deleted() -> set[str]:
    """Return the keys of the attachments that are remembered as deleted; empty where there is no set of them."""
    listed = subprocess.run(["nft", "-j", "list", "sets"], check=True, capture_output=True, text=True).stdout
    sets = [item["set"] for item in json.loads(listed)["nftables"] if item.get("set", {}).get("name") == "deleted"]
    packed = [ip_address(element["elem"]["val"]).packed.hex() for found in sets for element in found.get("elem", ())]
    return {f"{key[:16]}-{key[16:]}" for key in packed}


def ruleset() -> str:
    """Return the ruleset with handles, without what was counted."""
    return subprocess.run(["nft", "-sa", "list", "ruleset"], check=True, capture_output=True, text=True).stdout
