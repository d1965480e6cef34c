"""What a pod asks for: container ports, each of which gets a host port. Pure.

The text is a list, as in ``80/tcp, 7777/udp, 9000-9002/udp, 192.0.2.1:443, [2001:db8::1]:443/tcp``. The protocol is tcp
where none is given. A block of ports, ``9000-9002``, gets as many neighbours in the same order. An address of the node
limits a port to that address, as ``hostIP`` does in a mapping.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from cni_hostport.errors import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

MAX_PORT = 65535
LONGEST, MOST = 4096, 4096  # characters of a list, ports that it asks for
ITEM = re.compile(
    r"(?:(?P<ip>[0-9.]+|\[[0-9A-Fa-f:.]+\]):)?"
    r"(?P<first>[0-9]{1,5})(?:-(?P<last>[0-9]{1,5}))?"
    r"(?:/(?P<protocol>[A-Za-z]+))?"
)
PROTOCOLS = ("tcp", "udp", "sctp")


@dataclass(frozen=True, slots=True)
class DynamicPort:
    """A container port that gets a host port. ``host_ip`` is ``None`` for every local address of both families."""

    container_port: int
    protocol: str = "tcp"
    host_ip: IPv4Address | IPv6Address | None = None

    def __str__(self) -> str:
        """Write it as it is asked for and as it is told, as in ``80/tcp`` or ``[2001:db8::1]:80/tcp``."""
        return f"{_prefix(self.host_ip)}{self.container_port}/{self.protocol}"


Block = tuple[DynamicPort, ...]  # container ports one behind the other, which get neighbouring host ports


@dataclass(frozen=True, slots=True)
class AssignedPort:
    """A host port that was assigned to a request: what a mapping is that has a host port already."""

    request: DynamicPort
    host_port: int

    @property
    def container_port(self) -> int:
        """The port in the container."""
        return self.request.container_port

    @property
    def protocol(self) -> str:
        """Its protocol: tcp, udp or sctp."""
        return self.request.protocol

    @property
    def host_ip(self) -> IPv4Address | IPv6Address | None:
        """The node's address, ``None`` for every one."""
        return self.request.host_ip


def parse(text: str) -> tuple[Block, ...]:
    """Read a list; raises ``ValueError`` with the end of a sentence about it."""
    if len(text) > LONGEST:
        msg = f"has more than {LONGEST} characters"
        raise ValueError(msg)
    blocks, count = list[Block](), 0
    for item in filter(None, map(str.strip, text.split(","))):
        ports, protocol, host_ip = _read(item)
        count += len(ports)
        if count > MOST:
            msg = f"asks for more than {MOST} ports"
            raise ValueError(msg)
        blocks.append(tuple(DynamicPort(port, protocol, host_ip) for port in ports))
    return merged(blocks)


def merged(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Return blocks once each; raises ``ValueError`` if two of them have a port in common."""
    once = tuple(dict.fromkeys(blocks))
    seen: dict[DynamicPort, Block] = {}
    for block in once:
        for port in block:
            if port in seen:
                msg = f"asks for {port} twice, in {named(seen[port])} and in {named(block)}"
                raise ValueError(msg)
            seen[port] = block
    return once


def named(block: Block) -> str:
    """Write a block as it is asked for: ``80/tcp``, ``9000-9002/udp``."""
    first, last = block[0], block[-1]
    ports = f"{first.container_port}-{last.container_port}" if len(block) > 1 else f"{first.container_port}"
    return f"{_prefix(first.host_ip)}{ports}/{first.protocol}"


def status(assigned: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return what pods and clients are told, by requests as text, of the host ports that these have.

    As in ``{"80/tcp": {"hostPort": 40017, "hostIP": "192.0.2.1"}}``, where ``hostIP`` is there if one address was asked
    for.
    """
    told = {}
    for text, port in sorted(assigned.items(), key=lambda item: (item[1], item[0])):
        asked = text.rpartition(":")[0].strip("[]")
        is_any = asked in {"", "0.0.0.0", "::"}  # noqa: S104 - nothing is bound to it
        told[text] = {"hostPort": port} | ({} if is_any else {"hostIP": asked})
    return told


def _prefix(host_ip: IPv4Address | IPv6Address | None) -> str:
    if host_ip is None:
        return ""
    return f"[{host_ip}]:" if host_ip.version == 6 else f"{host_ip}:"  # noqa: PLR2004 - IP version


def _read(item: str) -> tuple[range, str, IPv4Address | IPv6Address | None]:
    """Read the container ports, protocol and host address of an item."""
    match = ITEM.fullmatch(item)
    if not match:
        msg = f"has {quoted(item)}, which is not a container port as in 80/tcp, 9000-9002/udp or 192.0.2.1:80/tcp"
        raise ValueError(msg)
    first, last = int(match["first"]), int(match["last"] or match["first"])
    if not 1 <= first <= last <= MAX_PORT:
        msg = f"has {quoted(item)}, whose ports are not from 1 to {MAX_PORT} and in order"
        raise ValueError(msg)
    protocol = (match["protocol"] or PROTOCOLS[0]).lower()
    if protocol not in PROTOCOLS:
        msg = f"has {quoted(item)}, whose protocol is not tcp, udp or sctp"
        raise ValueError(msg)
    return range(first, last + 1), protocol, _address(item, match["ip"])


def _address(item: str, text: str | None) -> IPv4Address | IPv6Address | None:
    if text is None:
        return None
    try:
        address = ip_address(text.strip("[]"))
    except ValueError:
        msg = f"has {quoted(item)}, whose address is not an IP address"
        raise ValueError(msg) from None
    return getattr(address, "ipv4_mapped", None) or address
