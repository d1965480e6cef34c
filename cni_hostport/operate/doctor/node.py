"""The node around the ruleset: the settings of the kernel that host ports depend on, and the rules below them all."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from cni_hostport.kernel import interfaces, routes
from cni_hostport.kernel.namespaces import addresses
from cni_hostport.names import FAMILY, LOCALNET, PODS, TABLE
from cni_hostport.operate.statements import note, problem
from cni_hostport.ruleset.base import BASE_CHAINS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from cni_hostport.check import Comparison
    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement
    from cni_hostport.ruleset.installed import Installed

NET = Path("/proc/sys/net")
CONF4 = NET / "ipv4/conf"
NOT_INTERFACES = {"all", "default"}
STRICT = 1  # of rp_filter (ip-sysctl.rst)
GUARD = "loopback"
WAY = [name for name in BASE_CHAINS if name != GUARD]


def forwarding(mappings: Sequence[PortMapping]) -> Iterator[Statement]:
    """Say where the kernel does not forward; raises ``OSError`` if a setting cannot be read."""
    for version, path in ((4, NET / "ipv4/ip_forward"), (6, NET / "ipv6/conf/all/forwarding")):
        count = sum(mapping.version == version for mapping in mappings)
        try:
            if _value(path):
                continue
        except FileNotFoundError:  # a kernel without IPv6
            if not count:
                continue
            raise
        name = ".".join(path.relative_to(NET.parent).parts)
        say = problem if count else note
        yield say(
            f"{name} is 0",
            f"The kernel does not forward IPv{version} between interfaces: "
            + (f"the {count} mappings of IPv{version} lead nowhere." if count else f"no IPv{version} mapping works."),
            f"sysctl -w {name}=1, and write {name}=1 into a file in /etc/sysctl.d so that it lasts.",
        )
    if _value(NET / "ipv4/ip_forward"):
        off = [name for name, value in _settings("forwarding").items() if not value and name not in NOT_INTERFACES]
        if off:
            yield note(
                f"net.ipv4.conf.IF.forwarding is 0 for {', '.join(off)}",
                "What comes in there is not forwarded: host ports do not answer clients on that side.",
                "Set it to 1 for interfaces on which clients or pods are.",
            )


def reverse_path(mappings: Sequence[PortMapping], bridges: Collection[str]) -> Iterator[Statement]:
    """Say where strict reverse path filtering can drop clients; ``bridges`` are those that pods are on.

    Raises ``OSError`` if a setting or the addresses cannot be read.
    """
    pods = [mapping.pod_ip for mapping in mappings if mapping.pod_ip]
    strict, filters = set(), _settings("rp_filter")
    for ip, index, is_global in addresses():
        name = interfaces.name(index)  # none of one that has just gone
        is_pods = name in bridges or any(pod in ip.network for pod in pods)
        is_strict = max(filters["all"], filters.get(name, 0)) == STRICT
        if ip.version == 4 and is_global and name not in {"", "lo"} and is_strict and not is_pods:  # noqa: PLR2004 - IP version
            strict.add(name)
    if len(strict) > 1:
        yield note(
            f"rp_filter is strict (1) on {' and '.join(sorted(strict))}",
            "A client that comes in by another of these interfaces than the one by which the node would answer it is"
            " dropped, at host ports too.",
            "If there are such clients: sysctl -w net.ipv4.conf.IF.rp_filter=2 (loose) for these interfaces, and"
            " net.ipv4.conf.all.rp_filter below that, of which the kernel takes the greater.",
        )


def base_rules(comparison: Comparison, mappings: Sequence[PortMapping]) -> Iterator[Statement]:
    """Say in what the chains that all connections to host ports pass are not as ADD makes them, where there are any.

    Raises ``NFTError``, and ``CNIError`` if there is nothing to compare with.
    """
    found = comparison.of_base(WAY) if mappings else []
    if found:
        yield problem(
            f"the base of table {FAMILY} {TABLE} is not as this version of the plugin makes it",
            "Host ports may not be reached. The next ADD of a container that has host ports puts it right.",
            "hostport restore puts it right now.",
            tuple(found),
        )
    older = comparison.declared_by_type() if mappings else []
    if older:
        yield note(
            f"nft 1.1.1 and earlier crashes on table {FAMILY} {TABLE}, which an older version of the plugin declared",
            "Programs on this node that bring their own nftables may crash, such as a firewall or kube-proxy in its"
            " container. Host ports work.",
            f"nft delete table {FAMILY} {TABLE} && hostport restore; in between, host ports take no new connections.",
            tuple(older),
        )


def route_localnet(nft: Nft, comparison: Comparison, installed: Installed) -> Iterator[Statement]:
    """Say where neighbours can reach 127.0.0.0/8 of the node; raises ``NFTError``, ``CNIError``, ``OSError``."""
    # that of "all" holds for every interface, that of "default" for those to come
    routed = {name for name, value in _settings("route_localnet").items() if value}
    if not routed:
        return
    needed = _towards_pods(nft, installed)
    guarded = set() if comparison.of_base([GUARD]) else _guarded(nft)
    is_open = (needed if "all" in routed else needed & routed) - guarded
    if is_open:
        yield problem(
            f"route_localnet is 1 for {', '.join(sorted(is_open))}, and chain {FAMILY} {TABLE} {GUARD} does not guard"
            " 127.0.0.0/8 there",
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


def _towards_pods(nft: Nft, installed: Installed) -> set[str]:
    """Return the names of the interfaces to pods whose host ports answer on 127.0.0.1: they are masqueraded."""
    masquerading = {item["rule"]["chain"] for item in nft.listing(f"table {FAMILY} {TABLE}") if "rule" in item}
    found = set()
    for element in installed.elements:
        if element.map == PODS[4] and element.chain in masquerading:
            with suppress(routes.NoRouteError):
                route = routes.route_to(ip_address(element.key))
                found |= {interfaces.name(route.interface)} - {""} if route.prefix_length else set()
    return found


def _guarded(nft: Nft) -> set[str]:
    listed = (item["set"] for item in nft.listing(f"set {FAMILY} {TABLE} {LOCALNET}") if "set" in item)
    elements = (element for of in listed for element in of.get("elem", ()))
    return {element if isinstance(element, str) else element["elem"]["val"] for element in elements}


def _value(path: Path) -> int:
    return int(path.read_text())


def _settings(name: str) -> dict[str, int]:
    """Return the values of a setting of IPv4 by interface, with ``all`` and ``default``."""
    found = {}
    for path in sorted(CONF4.iterdir()):
        with suppress(FileNotFoundError):  # interfaces come and go
            found[path.name] = _value(path / name)
    return found
