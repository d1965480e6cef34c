"""Why a connection to a host port does or does not reach a pod, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.attachment import SHORT_ID
from cni_hostport.errors import NFTError
from cni_hostport.operate import shadowed_programs as hidden
from cni_hostport.operate.explain import clients, pod, probe, routing, unmapped
from cni_hostport.operate.explain import foreign_chains as earlier
from cni_hostport.operate.explain.answer import Answer
from cni_hostport.operate.explain.packet import PROTOCOLS
from cni_hostport.operate.explain.path import RESTORE, Traced
from cni_hostport.operate.explain.rules import Rules
from cni_hostport.operate.mappings import Holder, read
from cni_hostport.operate.statements import Status, note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address
    from pathlib import Path

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.explain.pod import Seen
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

    Address = IPv4Address | IPv6Address


def explain(
    nft: Nft, host_port: tuple[int, str], source: Address | None, to: Address | None, caches: Sequence[Path]
) -> Iterator[list[Statement]]:
    """Yield the steps of each mapping of a host port, only for one client, or one address of the node, if it is given.

    Raises ``NFTError`` if the ruleset cannot be read.
    """
    port, protocol = host_port
    if to is not None and not routing.is_local(to):
        yield [problem(f"{to} is not an address of this node", "Connections to it are not for host ports here.")]
        return
    everything = read(nft)
    versions = [address.version for address in (source, to) if address is not None][:1] or (4, 6)
    all_of_port = [
        of for of in everything if (of.host_port, of.protocol) == (port, protocol) and of.version in versions
    ]
    found = [of for of in all_of_port if to is None or of.host_ip == to or of.host_ip.is_unspecified]
    without = [version for version in versions if version not in {of.version for of in found}]
    lost = list(unmapped.lost(port, protocol, without, caches))
    if not found:
        yield lost
        if not any(of.status is Status.PROBLEM for of in lost):
            yield list(unmapped.nothing(port, protocol, versions, to, everything))
        yield list(unmapped.instead(port, protocol, versions, to))
    for mapping in found:
        others = [other for other in all_of_port if other is not mapping and other.version == mapping.version]
        yield list(_steps(nft, mapping, others, source, to))
    if found:
        yield lost


def _steps(
    nft: Nft, of: PortMapping, others: Sequence[PortMapping], source: Address | None, to: Address | None
) -> Iterator[Statement]:
    yield _mapping(of, others)
    yield _holder(of)
    seen = None
    if of.holder is Holder.ALIVE and of.pod_ip is not None:
        try:
            seen = pod.look(of)
            said = list(pod.statements(of, seen))
        except OSError as error:
            said = [note(f"nothing can be seen in the pod's network namespace {of.netns}: {error.strerror}")]
        yield from said
        if any(statement.status is Status.PROBLEM for statement in said):
            seen = None
    if not of.host_ip.is_unspecified and not routing.is_local(of.host_ip):
        yield problem(
            f"{of.host_ip} is not an address of this node",
            "Connections to any other are not for this mapping.",
            f"give the node the address, or the mapping another hostIP than {of.host_ip}",
        )
        return
    taken = {other.host_ip for other in others}

    def fits(address: Address) -> bool:
        return address not in taken and (of.rule is None or of.rule.takes(address))

    try:
        client = clients.choose(of, source, to, fits)
    except OSError as error:
        yield problem(error.strerror or str(error), "Whatever the mapping, the node could not answer.")
        return
    rules = Rules(nft)
    yield from _path(rules, of, others, client, seen)
    for further in clients.beside(of, client, fits) if to is None else ():
        yield from _path(rules, of, others, further, seen)


def _path(
    rules: Rules, of: PortMapping, others: Sequence[PortMapping], client: Client, seen: Seen | None
) -> Iterator[Statement]:
    """Follow a client's connection to the pod, and the answer back if the pod was ``seen`` to be able to give one."""
    if client.interface:
        yield routing.forwarding(of, client)
    if not client.made_up:
        yield from routing.reverse_path(client)
    yield from earlier.statements(rules.nft, of, client)
    if of.protocol not in PROTOCOLS:
        yield note(f"the path of a connection is not traced: there is no probe for {of.protocol.upper()}")
        return
    packet = probe.make(of.protocol, client.source, client.destination, of.host_port)
    try:
        way = probe.send(packet, client.interface)
    except (OSError, NFTError) as error:
        yield from hidden.listeners([of])
        reason = getattr(error, "strerror", None) or error
        yield note(
            f"the path of a connection could not be traced: {reason}", "What the rules of others do to it is not known."
        )
        return
    traced = Traced(rules, of, others, client, way)
    if not traced.stays:
        yield from hidden.listeners([of])
    yield traced.statement()
    if seen and traced.arrives:
        yield from Answer(rules, of, client, packet, way).statements(hidden=seen.hidden)


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
