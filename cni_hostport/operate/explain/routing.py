"""How the kernel routes a connection: forwarding, reverse path filtering, routes, and what can be wrong with them."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from cni_hostport.kernel import interfaces
from cni_hostport.kernel.routes import UNROUTED, NoRouteError
from cni_hostport.netlink import ADDRESS_FAMILIES
from cni_hostport.operate import sysctls
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.explain.packet import IPAddress
    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.statements import Statement


def forwarding(mapping: InstalledMapping, client: Client) -> Statement:
    """Say whether the node forwards what comes in on a client's interface."""
    node_setting = sysctls.FORWARDING[mapping.version]
    settings = [node_setting]
    if mapping.version == 4:  # noqa: PLR2004 - IP version
        # of IPv6, the kernel asks for the setting of all interfaces only
        settings.append(sysctls.interface_setting(client.interface, "forwarding"))
    off = next((name for name in settings if sysctls.value(name) == 0), None)
    if off is None:
        value = sysctls.value(node_setting)
        return ok(f"the node forwards IPv{mapping.version}: {sysctls.dotted(node_setting)} is {value}")
    scope = "to pods" if off == node_setting else "that comes in there"
    return problem(
        f"{sysctls.dotted(off)} is 0",
        f"The node forwards nothing {scope}.",
        f"sysctl -w {shlex.quote(sysctls.dotted(off))}=1",
    )


def reverse_path(client: Client) -> Iterator[Statement]:
    """Name the interfaces on which rp_filter drops a client's packets, since the answers leave by another interface."""
    names = [name for name in _interfaces_up() if name not in {"lo", client.interface}]
    strict = [name for name in names if sysctls.is_rp_filter_strict(name)]
    if client.source.version == 4 and client.interface and strict:  # noqa: PLR2004 - IP version
        yield note(
            f"the answers to {client.source} leave by {client.interface}: its connections have to come in there",
            f"rp_filter is 1 (strict) on {', '.join(strict)}: what comes in there from {client.source} is dropped.",
            "if it does come in there, set net.ipv4.conf.IF.rp_filter (and that of all) to 2 (loose), IF being that"
            " interface",
        )


def connection_obstacles(mapping: InstalledMapping, client: Client) -> Iterator[str]:
    """Yield, as sentences, what can keep the kernel from routing a client's connection to the pod."""
    if client.interface and client.destination.is_loopback:
        yield f"{client.destination} is for the node itself: connections from elsewhere have no business there."
    if client.interface and forwarding(mapping, client).remedy:
        yield "The node does not forward it."
    interface = ""
    try:
        if mapping.pod_ip:
            interface = interfaces.name(route(mapping.pod_ip).get_attr("RTA_OIF"))
    except NoRouteError as error:
        yield f"There is no route to the pod's address {mapping.pod_ip}: {error.strerror}."
    if interface and client.source.is_loopback:
        name = sysctls.interface_setting(interface, "route_localnet")
        if not (sysctls.value(name) or sysctls.value(sysctls.interface_setting("all", "route_localnet"))):
            yield f"{sysctls.dotted(name)} is 0: nothing leaves there from {client.source}."
    if client.interface:
        yield from _reverse_path_obstacle(client.interface, client.source, "the route back leads elsewhere")


def answer_obstacles(interface: str, mapping: InstalledMapping, client: Client) -> Iterator[str]:
    """Yield, as sentences, what can keep the kernel from routing a pod's answer to a client.

    The answer comes in on ``interface``.
    """
    name = sysctls.interface_setting(interface, "forwarding")
    if mapping.version == 4 and client.interface and sysctls.value(name) == 0:  # noqa: PLR2004 - IP version
        yield f"{sysctls.dotted(name)} is 0: the node forwards nothing that comes in there."
    try:
        route(client.source)
    except NoRouteError as error:
        yield f"There is no route to {client.source}: {error.strerror}."
    if mapping.pod_ip:
        yield from _reverse_path_obstacle(interface, mapping.pod_ip, f"the route to {mapping.pod_ip} leads elsewhere")
    bridge_calls = sysctls.BRIDGE_CALLS[mapping.version]
    if client.source == mapping.pod_ip and sysctls.value(bridge_calls):
        yield (
            f"While {sysctls.dotted(bridge_calls)} is 1, a bridge sends nothing back to the port on which it came,"
            ' unless that is in hairpin mode ("hairpinMode": true for the bridge plugin).'
        )


def _reverse_path_obstacle(interface: str, source: IPAddress, condition: str) -> Iterator[str]:
    if source.version == 4 and sysctls.is_rp_filter_strict(interface):  # noqa: PLR2004 - IP version
        yield f"rp_filter is 1 (strict) on {interface}: what comes in there is dropped if {condition}."


def route(destination: IPAddress, source: IPAddress | None = None) -> Any:
    """Return the route from this network namespace to an address, as a message of pyroute2's.

    With ``source``, it is the route for what that address of the namespace sends. Raises ``NoRouteError`` if there is
    none, another ``OSError`` if the kernel cannot be asked.
    """
    source_option = {"src": str(source)} if source else {}
    family = ADDRESS_FAMILIES[destination.version]
    with IPRoute() as netlink:
        try:
            return next(iter(netlink.route("get", dst=str(destination), family=family, **source_option)))
        except NetlinkError as error:
            kind = NoRouteError if error.code in UNROUTED else OSError
            raise kind(error.code, os.strerror(error.code)) from error


def _interfaces_up() -> list[str]:
    with IPRoute() as netlink:
        return [message.get_attr("IFLA_IFNAME") for message in netlink.get_links() if message["state"] == "up"]
