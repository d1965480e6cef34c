"""Why a connection to a host port does or does not reach a pod, step by step."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cni_hostport import host
from cni_hostport.attachment import SHORT_ID
from cni_hostport.errors import NFTError
from cni_hostport.operate import clients, probe, routing, unmapped
from cni_hostport.operate.mappings import Holder, read
from cni_hostport.operate.packet import PROTOCOLS
from cni_hostport.operate.path import LOOPBACK6, RESTORE, Traced
from cni_hostport.operate.sockets import listeners
from cni_hostport.operate.statements import Status, note, ok, problem
from cni_hostport.table import TABLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.nft import Nft
    from cni_hostport.operate.clients import Client
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

    Address = IPv4Address | IPv6Address

OWN_PRIORITY = -101  # of the chains that translate, at prerouting and output
LAST = (1 << 31) - 1
LEGACY = {4: Path("/proc/net/ip_tables_names"), 6: Path("/proc/net/ip6_tables_names")}


def explain(
    nft: Nft, port: int, protocol: str, source: Address | None, caches: Sequence[Path]
) -> Iterator[list[Statement]]:
    """Yield the steps of each mapping of a host port, those for one client only if its address is given.

    Raises ``NFTError`` if the ruleset cannot be read.
    """
    everything = read(nft)
    versions = (4, 6) if source is None else (source.version,)
    found = [of for of in everything if (of.host_port, of.protocol) == (port, protocol) and of.version in versions]
    without = [version for version in versions if version not in {of.version for of in found}]
    lost = list(unmapped.lost(port, protocol, without, caches))
    if not found:
        yield lost or list(unmapped.nothing(port, protocol, versions, everything))
        yield list(unmapped.instead(port, protocol, versions))
    for of in found:
        others = [other for other in found if other is not of and other.version == of.version]
        yield list(_steps(nft, of, others, source))
    if found:
        yield lost


def _steps(nft: Nft, of: PortMapping, others: Sequence[PortMapping], source: Address | None) -> Iterator[Statement]:
    yield _mapping(of, others)
    yield _holder(of)
    pod = list(_pod(of)) if of.holder is Holder.ALIVE and of.pod_ip is not None else []
    yield from pod
    taken = set() if not of.host_ip.is_unspecified else {other.host_ip for other in others}
    try:
        client = clients.choose(of, source, taken)
    except OSError as error:
        yield problem(error.strerror or str(error), "Whatever the mapping, the node could not answer.")
        return
    if client.interface:
        yield routing.forwarding(of, client)
    if source:
        yield from routing.reverse_path(client)
    yield from _other_tables(nft, of, client)
    if of.protocol not in PROTOCOLS:
        yield note(f"the path of a connection is not traced: there is no probe for {of.protocol.upper()}")
        return
    try:
        way = probe.send(probe.make(of.protocol, client.source, client.destination, of.host_port), client.interface)
    except (OSError, NFTError) as error:
        yield from _hidden(of)
        reason = getattr(error, "strerror", None) or error
        yield note(
            f"the path of a connection could not be traced: {reason}", "What the rules of others do to it is not known."
        )
        return
    traced = Traced(nft, of, others, client, way)
    if not traced.stays:
        yield from _hidden(of)
    is_sound = pod and not any(statement.status is Status.PROBLEM for statement in pod)
    if is_sound and traced.arrives and way.source:
        yield from _answer(of, way.source)
    yield traced.statement()


def _mapping(of: PortMapping, others: Sequence[PortMapping]) -> Statement:
    if of.pod_ip is None:
        return problem(
            f"{of.host} is held by {of.who}, but no rule translates it",
            "Somebody changed the rules of this plugin.",
            RESTORE,
        )
    exceptions = [f"but {other.host} leads to {other.target}, {other.who}" for other in others]
    if not of.host_ip.is_unspecified:
        exceptions = ["other addresses of this node are not for this mapping"]
    return ok(f"{of.host} leads to {of.target}, {of.who}", *exceptions)


def _holder(of: PortMapping) -> Statement:
    who = f"container {of.container_id[:SHORT_ID]} ({of.ifname}) on network {of.network}"
    if of.holder is Holder.ALIVE:
        return ok(f"the holder is alive: {who}, {of.netns}")
    if of.holder is Holder.UNKNOWN:
        return note(f"it cannot be told whether the holder is alive: {who}", "Its network namespace cannot be seen.")
    return problem(
        f"the holder is gone: {who}, {of.netns}",
        "Nobody answers, or whoever has the pod's address now.",
        "nothing, if another pod is to have the port: it takes it over. The runtime's DEL or GC removes the mapping",
    )


def _pod(of: PortMapping) -> Iterator[Statement]:
    try:
        with host.inside(of.netns):
            stats = psutil.net_if_stats().get(of.ifname)
            addresses = {of.address for of in psutil.net_if_addrs().get(of.ifname, [])}
            listening = listeners(of.protocol, of.pod_port or 0, of.version) if of.protocol in PROTOCOLS else None
    except OSError as error:
        yield note(f"nothing can be seen in the pod's network namespace {of.netns}: {error.strerror}")
        return
    if stats is None or not stats.isup:
        yield problem(
            f"{of.ifname} of {of.who} is {'missing' if stats is None else 'down'}", "Nothing reaches the pod."
        )
    elif str(of.pod_ip) not in addresses:
        yield problem(f"{of.ifname} of {of.who} does not have the address {of.pod_ip}", "Nothing reaches the pod.")
    else:
        yield ok(f"{of.ifname} of {of.who} is up and has {of.pod_ip}")
    if listening is None:
        yield note(f"whether anything listens on {of.target}/{of.protocol} cannot be seen")
        return
    serving = [listener for listener in listening if of.pod_ip and listener.serves(of.pod_ip)]
    if serving:
        yield ok(f"{serving[0].process} listens there on {of.pod_port}/{of.protocol}")
        return
    elsewhere = ", ".join(f"{listener.process} at {listener.address}" for listener in listening)
    yield problem(
        f"nothing listens on {of.target}/{of.protocol} in the pod",
        f"Only {elsewhere}, where connections from outside of the pod do not come." if elsewhere else "",
        "let it listen on 0.0.0.0 or ::" if elsewhere else "see that the container's process runs, and on which port",
    )


def _answer(of: PortMapping, to: Address) -> Iterator[Statement]:
    """Say whether the pod has a way to answer whoever it sees as its client."""
    try:
        with host.inside(of.netns):
            routing.to(to)
    except OSError as error:
        yield problem(
            f"{of.who} has no route back to {to}: {error.strerror}",
            "It gets the connection, and its answers go nowhere.",
            "give it a route by way of the node: the plugin that makes the interface has 'routes' for that",
        )
    else:
        yield ok(f"{of.who} has a route back to {to}; what rules do to its answers is not traced")


def _other_tables(nft: Nft, of: PortMapping, client: Client) -> Iterator[Statement]:
    """Name the chains of others that see a connection before this plugin translates it."""
    hooks = {"prerouting": OWN_PRIORITY, "ingress": LAST} if client.interface else {"output": OWN_PRIORITY}
    hook = next(iter(hooks))
    earlier = [
        f"{chain['family']} {chain['table']} {chain['name']} ({chain['type']} at {chain['hook']},"
        f" priority {chain['prio']})"
        for item in nft.listing("chains")
        if (chain := item.get("chain", {})).get("hook") in hooks
        and chain["table"] != TABLE
        and not chain["table"].startswith(probe.TABLE)
        and chain["prio"] <= hooks[chain["hook"]]
        and chain["family"] in {"inet", "netdev", "ip" if of.version == 4 else "ip6"}  # noqa: PLR2004 - IP version
        and chain.get("dev", client.interface) == client.interface
    ]
    if earlier:
        yield note(f"chains of others come before this plugin's at {hook}", details=tuple(earlier))
    else:
        yield ok(f"no chain of others comes before this plugin's at {hook}")
    legacy = LEGACY[of.version]
    with suppress(OSError):
        tables = legacy.read_text().split()
        if tables:
            command = "iptables-legacy-save" if of.version == 4 else "ip6tables-legacy-save"  # noqa: PLR2004
            yield note(
                f"legacy iptables is in use ({', '.join(tables)}): what its rules do is not shown here", remedy=command
            )


def _hidden(of: PortMapping) -> Iterator[Statement]:
    hidden = dict.fromkeys(
        listener.process
        for listener in (listeners(of.protocol, of.host_port, of.version) if of.protocol in PROTOCOLS else ())
        if listener.address != LOOPBACK6 and (of.host_ip.is_unspecified or listener.serves(of.host_ip))
    )
    for process in hidden:
        yield note(
            f"{process} on this node listens on {of.host_port}/{of.protocol} too",
            "It is hidden: the mapping comes first, and it gets no new connections.",
        )
