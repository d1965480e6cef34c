"""What the kernel's routing does to a connection: forwarding, reverse path filtering, routes."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from cni_hostport.kernel import interfaces
from cni_hostport.kernel.routes import UNROUTED, NoRouteError
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

    Address = IPv4Address | IPv6Address

SYSCTLS = Path("/proc/sys")
FORWARDING = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}
CALLS = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}  # br_netfilter: bridged packets meet all rules
STRICT = 1
RTN_LOCAL = 2  # linux/rtnetlink.h
FAMILIES = {4: AF_INET, 6: AF_INET6}


def forwarding(of: PortMapping, client: Client) -> Statement:
    """Say whether the node forwards what comes in on a client's interface."""
    names = [FORWARDING[of.version]]
    if of.version == 4:  # noqa: PLR2004 - IP version
        names.append(f"net/ipv4/conf/{client.interface}/forwarding")  # of IPv6, the kernel asks for that of all only
    off = next((name for name in names if setting(name) == 0), None)
    if off is None:
        return ok(f"the node forwards IPv{of.version}: {_dotted(names[0])} is {setting(names[0])}")
    return problem(
        f"{_dotted(off)} is 0",
        "The node forwards nothing that comes in there." if off != names[0] else "The node forwards nothing to pods.",
        f"sysctl -w {shlex.quote(_dotted(off))}=1",
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


def is_local(address: Address) -> bool:
    """Tell whether packets to an address are for this node; raises ``OSError`` if the kernel cannot be asked."""
    try:
        return bool(to(address)["type"] == RTN_LOCAL)
    except NoRouteError:
        return False


def obstacles(of: PortMapping, client: Client) -> Iterator[str]:
    """Yield, as sentences, what can keep the kernel from routing a client's connection to the pod."""
    if client.interface and client.destination.is_loopback:
        yield f"{client.destination} is for the node itself: connections from elsewhere have no business there."
    if client.interface and forwarding(of, client).remedy:
        yield "The node does not forward it."
    interface = ""
    try:
        if of.pod_ip:
            interface = interfaces.name(to(of.pod_ip).get_attr("RTA_OIF"))
    except NoRouteError as error:
        yield f"There is no route to the pod's address {of.pod_ip}: {error.strerror}."
    name = f"net/ipv4/conf/{interface}/route_localnet"
    if interface and client.source.is_loopback and not (setting(name) or setting("net/ipv4/conf/all/route_localnet")):
        yield f"{_dotted(name)} is 0: nothing leaves there from {client.source}."
    if client.interface:
        yield from _strict(client.interface, client.source, "the route back leads elsewhere")


def obstacles_back(interface: str, of: PortMapping, client: Client) -> Iterator[str]:
    """Yield, as sentences, what can keep the kernel from routing what comes in from a pod to a client."""
    name = f"net/ipv4/conf/{interface}/forwarding"
    if of.version == 4 and client.interface and setting(name) == 0:  # noqa: PLR2004 - IP version
        yield f"{_dotted(name)} is 0: the node forwards nothing that comes in there."
    try:
        to(client.source)
    except NoRouteError as error:
        yield f"There is no route to {client.source}: {error.strerror}."
    if of.pod_ip:
        yield from _strict(interface, of.pod_ip, f"the route to {of.pod_ip} leads elsewhere")
    called = CALLS[of.version]
    if client.source == of.pod_ip and setting(f"net/bridge/{called}"):
        yield (
            f"While net.bridge.{called} is 1, a bridge sends nothing back to the port on which it came, unless that is"
            ' in hairpin mode ("hairpinMode": true for the bridge plugin).'
        )


def _strict(interface: str, source: Address, condition: str) -> Iterator[str]:
    if source.version == 4 and _rp_filter(interface) == STRICT:  # noqa: PLR2004 - IP version
        yield f"rp_filter is 1 (strict) on {interface}: what comes in there is dropped if {condition}."


def to(address: Address, source: Address | None = None) -> Any:
    """Return the route to an address from this network namespace, for what one of its addresses sends if it is given.

    Raises ``NoRouteError`` if there is none, another ``OSError`` if the kernel cannot be asked.
    """
    by_source = {"src": str(source)} if source else {}
    with IPRoute() as route:
        try:
            return next(iter(route.route("get", dst=str(address), family=FAMILIES[address.version], **by_source)))
        except NetlinkError as error:
            kind = NoRouteError if error.code in UNROUTED else OSError
            raise kind(error.code, os.strerror(error.code)) from error


def _interfaces() -> list[str]:
    with IPRoute() as route:
        return [message.get_attr("IFLA_IFNAME") for message in route.get_links() if message["state"] == "up"]


def _rp_filter(interface: str) -> int:
    """Return the value that counts: the greater one (ip-sysctl.rst)."""
    return max(setting(f"net/ipv4/conf/{name}/rp_filter") or 0 for name in ("all", interface))


def setting(name: str) -> int | None:
    """Return a sysctl by its path below ``/proc/sys``, ``None`` if it is not there or not a number.

    Raises ``OSError`` if it cannot be read.
    """
    with suppress(FileNotFoundError, ValueError):
        return int((SYSCTLS / name).read_text())
    return None


def _dotted(name: str) -> str:
    return name if "." in name else name.replace("/", ".")
