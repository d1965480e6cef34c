"""What the kernel's routing does to a connection: forwarding, reverse path filtering, routes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from socket import AF_INET, AF_INET6, if_indextoname
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.operate.clients import Client
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

SYSCTLS = Path("/proc/sys")
FORWARDING = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}
STRICT = 1
RTN_LOCAL = 2  # linux/rtnetlink.h
FAMILIES = {4: AF_INET, 6: AF_INET6}


def forwarding(of: PortMapping, client: Client) -> Statement:
    """Say whether the node forwards what comes in on a client's interface."""
    names = [FORWARDING[of.version]]
    if of.version == 4:  # noqa: PLR2004 - IP version
        names.append(f"net/ipv4/conf/{client.interface}/forwarding")  # of IPv6, the kernel asks for that of all only
    off = next((name for name in names if _setting(name) == 0), None)
    if off is None:
        return ok(f"the node forwards IPv{of.version}: {_dotted(names[0])} is {_setting(names[0])}")
    return problem(
        f"{_dotted(off)} is 0",
        "The node forwards nothing that comes in there." if off != names[0] else "The node forwards nothing to pods.",
        f"sysctl -w {_dotted(off)}=1",
    )


def reverse_path(client: Client) -> Iterator[Statement]:
    """Say where packets of a client are dropped because the answers leave by another interface (rp_filter)."""
    strict = [name for name in _interfaces() if name not in {"lo", client.interface} and _rp_filter(name) == STRICT]
    if client.source.version == 4 and client.interface and strict:  # noqa: PLR2004 - IP version
        yield note(
            f"the answers to {client.source} leave by {client.interface}: its connections have to come in there",
            f"rp_filter is 1 (strict) on {', '.join(strict)}: what comes in there from {client.source} is dropped.",
            "if it does come in there, set net.ipv4.conf.IF.rp_filter (and that of all) to 2 (loose), IF being that"
            " interface",
        )


def obstacles(of: PortMapping, client: Client) -> Iterator[str]:
    """Yield, as sentences, what can keep the kernel from routing a client's connection to the pod."""
    if client.interface and forwarding(of, client).remedy:
        yield "The node does not forward it."
    interface = ""
    with suppress(OSError):
        if to(client.destination)["type"] != RTN_LOCAL:
            yield f"{client.destination} is not an address of this node."
    try:
        if of.pod_ip:
            interface = if_indextoname(to(of.pod_ip).get_attr("RTA_OIF"))
    except OSError as error:
        yield f"There is no route to the pod's address {of.pod_ip}: {error.strerror}."
    name = f"net/ipv4/conf/{interface}/route_localnet"
    if interface and client.source.is_loopback and not (_setting(name) or _setting("net/ipv4/conf/all/route_localnet")):
        yield f"{_dotted(name)} is 0: nothing leaves there from {client.source}."
    if client.interface and client.source.version == 4 and _rp_filter(client.interface) == STRICT:  # noqa: PLR2004
        yield (
            f"rp_filter is 1 (strict) on {client.interface}: what comes in there is dropped"
            " if the route back leads elsewhere."
        )


def to(address: IPv4Address | IPv6Address) -> Any:
    """Return the route to an address from this network namespace; raises ``OSError`` if there is none."""
    with IPRoute() as route:
        try:
            return next(iter(route.route("get", dst=str(address), family=FAMILIES[address.version])))
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error


def _interfaces() -> list[str]:
    with IPRoute() as route:
        return [message.get_attr("IFLA_IFNAME") for message in route.get_links() if message["state"] == "up"]


def _rp_filter(interface: str) -> int:
    """Return the value that counts: the greater one (ip-sysctl.rst)."""
    return max(_setting(f"net/ipv4/conf/{name}/rp_filter") or 0 for name in ("all", interface))


def _setting(name: str) -> int | None:
    with suppress(OSError, ValueError):
        return int((SYSCTLS / name).read_text())
    return None


def _dotted(name: str) -> str:
    return name if "." in name else name.replace("/", ".")
