"""The settings of the kernel that host ports depend on, and the base of the ruleset that all of them share."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING

from cni_hostport.kernel import interfaces, namespaces, routes
from cni_hostport.names import FAMILY, LOCALNET, PODS, TABLE
from cni_hostport.operate import sysctls
from cni_hostport.operate.statements import note, problem
from cni_hostport.ruleset.base import BASE_CHAINS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from typing import Any

    from cni_hostport.check import Comparison
    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.statements import Statement
    from cni_hostport.ruleset.installed import Installed

    Listing = Sequence[Mapping[str, Any]]

NOT_INTERFACES = {"all", "default"}
GUARD_CHAIN = "loopback"
PATH_CHAINS = [name for name in BASE_CHAINS if name != GUARD_CHAIN]  # that connections to host ports pass


def forwarding(mappings: Sequence[InstalledMapping]) -> Iterator[Statement]:
    """Say where the kernel does not forward; raises ``OSError`` if a setting cannot be read."""
    for version, setting in sysctls.FORWARDING.items():
        count = sum(mapping.version == version for mapping in mappings)
        try:
            if sysctls.read(setting):
                continue
        except FileNotFoundError:  # a kernel without IPv6
            if not count:
                continue
            raise
        name = sysctls.dotted(setting)
        severity = problem if count else note
        yield severity(
            f"{name} is 0",
            f"The kernel does not forward IPv{version} between interfaces: "
            + (f"the {count} mappings of IPv{version} lead nowhere." if count else f"no IPv{version} mapping works."),
            f"sysctl -w {name}=1, and write {name}=1 into a file in /etc/sysctl.d so that it lasts.",
        )
    if sysctls.read(sysctls.FORWARDING[4]):
        values = sysctls.interface_values("forwarding")
        off = [name for name, value in values.items() if not value and name not in NOT_INTERFACES]
        if off:
            yield note(
                f"net.ipv4.conf.IF.forwarding is 0 for {', '.join(off)}",
                "What comes in there is not forwarded: host ports do not answer clients on that side.",
                "Set it to 1 for interfaces on which clients or pods are.",
            )


def reverse_path(mappings: Sequence[InstalledMapping], bridges: Collection[str]) -> Iterator[Statement]:
    """Say where strict reverse path filtering can drop clients; ``bridges`` are those that pods are on.

    Raises ``OSError`` if a setting or the addresses cannot be read.
    """
    pods = [mapping.pod_ip for mapping in mappings if mapping.pod_ip]
    strict = set()
    for ip, index, is_global in namespaces.addresses():
        name = interfaces.name(index)  # none of one that has just gone
        is_pods = name in bridges or any(pod in ip.network for pod in pods)
        is_uplink = ip.version == 4 and is_global and name not in {"", "lo"} and not is_pods  # noqa: PLR2004 - IP version
        if is_uplink and sysctls.is_rp_filter_strict(name):
            strict.add(name)
    if len(strict) > 1:
        yield note(
            f"rp_filter is strict (1) on {' and '.join(sorted(strict))}",
            "A client that comes in by another of these interfaces than the one by which the node would answer it is"
            " dropped, at host ports too.",
            "If there are such clients: sysctl -w net.ipv4.conf.IF.rp_filter=2 (loose) for these interfaces, and"
            " net.ipv4.conf.all.rp_filter below that, of which the kernel takes the greater.",
        )


def base_rules(comparison: Comparison, table: Listing, mappings: Sequence[InstalledMapping]) -> Iterator[Statement]:
    """Say in what the chains that all connections to host ports pass are not as ADD makes them, where there are any.

    ``table`` is nft's listing of the table.

    Raises ``NFTError``, and ``CNIError`` if there is nothing to compare with.
    """
    damaged = comparison.damaged_base_chains(PATH_CHAINS) if mappings else []
    if damaged:
        yield problem(
            f"the base of table {FAMILY} {TABLE} is not as this version of the plugin makes it",
            "Host ports may not be reached. The next ADD of a container that has host ports puts it right.",
            "hostport restore puts it right now.",
            tuple(damaged),
        )
    declared_by_type = comparison.declared_by_type(table) if mappings else []
    if declared_by_type:
        yield note(
            f"nft 1.1.1 and earlier crashes on table {FAMILY} {TABLE}, which an older version of the plugin declared",
            "Programs on this node that bring their own nftables may crash, such as a firewall or kube-proxy in its"
            " container. Host ports work.",
            f"nft delete table {FAMILY} {TABLE} && hostport restore; in between, host ports take no new connections.",
            tuple(declared_by_type),
        )


def route_localnet(comparison: Comparison, table: Listing, installed: Installed) -> Iterator[Statement]:
    """Say where neighbours can reach 127.0.0.0/8 of the node; raises ``NFTError``, ``CNIError``, ``OSError``."""
    # that of "all" holds for every interface, that of "default" for those to come
    routed = {name for name, value in sysctls.interface_values("route_localnet").items() if value}
    if not routed:
        return
    needed = _pod_interfaces(table, installed)
    guarded = set() if comparison.damaged_base_chains([GUARD_CHAIN]) else _guarded_interfaces(table)
    open_interfaces = (needed if "all" in routed else needed & routed) - guarded
    if open_interfaces:
        yield problem(
            f"route_localnet is 1 for {', '.join(sorted(open_interfaces))}, and chain {FAMILY} {TABLE} {GUARD_CHAIN}"
            " does not guard 127.0.0.0/8 there",
            "A neighbour on such an interface can reach what listens on this node's 127.0.0.1 (CVE-2020-8558).",
            "hostport restore puts the guard right. Without it: sysctl -w net.ipv4.conf.IF.route_localnet=0 for these,"
            " and host ports do not answer on 127.0.0.1.",
        )
    others = routed - needed - guarded
    if others:
        yield note(
            f"route_localnet is 1 for {', '.join(sorted(others))}, and no host port of the ruleset needs that",
            "Neighbours there reach what listens on this node's 127.0.0.1 (CVE-2020-8558), unless whoever set it keeps"
            " them from that, as kube-proxy does, which sets that of all.",
            "If nobody needs it: sysctl -w net.ipv4.conf.IF.route_localnet=0.",
        )


def _pod_interfaces(table: Listing, installed: Installed) -> set[str]:
    """Return the names of the interfaces to pods whose host ports answer on 127.0.0.1: they are masqueraded."""
    masquerading = {item["rule"]["chain"] for item in table if "rule" in item}
    indexes = set()
    for element in installed.elements:
        if element.map == PODS[4] and element.chain in masquerading:
            with suppress(routes.NoRouteError):
                route = routes.route_to(ip_address(element.key))
                indexes |= {route.interface} if route.prefix_length else set()
    return {*map(interfaces.name, indexes)} - {""}


def _guarded_interfaces(table: Listing) -> set[str]:
    listed = (item["set"] for item in table if "set" in item and item["set"]["name"] == LOCALNET)
    elements = (element for members in listed for element in members.get("elem", ()))
    return {element if isinstance(element, str) else element["elem"]["val"] for element in elements}
