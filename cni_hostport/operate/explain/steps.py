"""Why a connection to a host port does or does not reach a pod, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.attachment import short_id
from cni_hostport.errors import NFTError
from cni_hostport.kernel import routes
from cni_hostport.operate import mappings, shadowed_programs
from cni_hostport.operate.explain import clients, foreign_chains, pod, probe, routing, unmapped_port
from cni_hostport.operate.explain.answer_path import AnswerPath
from cni_hostport.operate.explain.connection_path import ConnectionPath
from cni_hostport.operate.explain.packet import PROBED_PROTOCOLS
from cni_hostport.operate.explain.rule_listing import RuleListing
from cni_hostport.operate.mappings import HolderState
from cni_hostport.operate.statements import RESTORE, Status, note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.explain.packet import IPAddress
    from cni_hostport.operate.explain.pod import PodState
    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.statements import Statement


def explain(
    nft: Nft,
    host_port: tuple[int, str],
    source: IPAddress | None,
    destination: IPAddress | None,
    caches: Sequence[Path],
) -> Iterator[list[Statement]]:
    """Yield the steps of each mapping of a host port, of which the number and the protocol are given.

    With ``source`` they are about that client alone, with ``destination`` about that address of the node alone. Raises
    ``NFTError`` if the ruleset cannot be read.
    """
    port, protocol = host_port
    if destination is not None and not routes.is_local(destination):
        yield [
            problem(f"{destination} is not an address of this node", "Connections to it are not for host ports here.")
        ]
        return
    node_mappings = mappings.read(nft)
    versions = [address.version for address in (source, destination) if address is not None][:1] or (4, 6)
    port_mappings = [
        mapping
        for mapping in node_mappings
        if (mapping.host_port, mapping.protocol) == (port, protocol) and mapping.version in versions
    ]
    found = [
        mapping
        for mapping in port_mappings
        if destination is None or mapping.host_ip == destination or mapping.host_ip.is_unspecified
    ]
    unmapped_versions = [version for version in versions if version not in {mapping.version for mapping in found}]
    missing = list(unmapped_port.missing_mappings(port, protocol, unmapped_versions, caches))
    if not found:
        yield missing
        if not any(statement.status is Status.PROBLEM for statement in missing):
            yield [unmapped_port.no_mapping(port, protocol, versions, destination, node_mappings)]
        yield list(unmapped_port.local_listeners(port, protocol, versions, destination))
    for mapping in found:
        others = [other for other in port_mappings if other is not mapping and other.version == mapping.version]
        yield list(_steps(nft, mapping, others, source, destination))
    if found:
        yield missing


def _steps(
    nft: Nft,
    mapping: InstalledMapping,
    others: Sequence[InstalledMapping],
    source: IPAddress | None,
    destination: IPAddress | None,
) -> Iterator[Statement]:
    """Yield the steps of one mapping; ``others`` are the other ones of the same port and IP version."""
    yield _mapping_statement(mapping, others)
    yield _holder_statement(mapping)
    pod_state = yield from _pod_steps(mapping)
    if not mapping.host_ip.is_unspecified and not routes.is_local(mapping.host_ip):
        yield problem(
            f"{mapping.host_ip} is not an address of this node",
            "Connections to any other are not for this mapping.",
            f"give the node the address, or the mapping another hostIP than {mapping.host_ip}",
        )
        return
    other_addresses = {other.host_ip for other in others}

    def is_mapped(address: IPAddress) -> bool:
        return address not in other_addresses and (mapping.rule is None or mapping.rule.takes(address))

    try:
        client = clients.choose(mapping, source, destination, is_mapped)
    except OSError as error:
        yield problem(error.strerror or str(error), "Whatever the mapping, the node could not answer.")
        return
    listing = RuleListing(nft)
    yield from _path_steps(listing, mapping, others, client, pod_state)
    for further_client in clients.further(mapping, client, is_mapped) if destination is None else ():
        yield from _path_steps(listing, mapping, others, further_client, pod_state)


def _pod_steps(mapping: InstalledMapping) -> Generator[Statement, None, PodState | None]:
    """Yield what is seen of a mapping's pod; return its state if it was seen, and is able to answer."""
    if mapping.holder is not HolderState.ALIVE or mapping.pod_ip is None:
        return None
    try:
        state = pod.inspect(mapping)
        found = list(pod.statements(mapping, state))
    except OSError as error:
        yield note(f"nothing can be seen in the pod's network namespace {mapping.netns}: {error.strerror}")
        return None
    yield from found
    return None if any(statement.status is Status.PROBLEM for statement in found) else state


def _path_steps(
    listing: RuleListing,
    mapping: InstalledMapping,
    others: Sequence[InstalledMapping],
    client: Client,
    pod_state: PodState | None,
) -> Iterator[Statement]:
    """Follow a client's connection to the pod, and the pod's answer if there is a state of a pod that can answer."""
    if client.interface:
        yield routing.forwarding(mapping, client)
    if not client.is_example:
        yield from routing.reverse_path(client)
    yield from foreign_chains.statements(listing.nft, mapping, client)
    if mapping.protocol not in PROBED_PROTOCOLS:
        protocol = mapping.protocol.upper()
        yield note(f"the path of a connection is not traced: there is no probe for {protocol}")
        return
    packet = probe.first_packet(mapping.protocol, client.source, client.destination, mapping.host_port)
    try:
        trace = probe.send(packet, client.interface)
    except (OSError, NFTError) as error:
        yield from shadowed_programs.statements([mapping])
        reason = getattr(error, "strerror", None) or error
        yield note(
            f"the path of a connection could not be traced: {reason}", "What the rules of others do to it is not known."
        )
        return
    path = ConnectionPath(listing, mapping, others, client, trace)
    if not path.stays_on_node:
        yield from shadowed_programs.statements([mapping])
    yield path.statement()
    if pod_state and path.reaches_pod:
        answer_path = AnswerPath(listing, mapping, client, packet, trace)
        yield from answer_path.statements(has_own_stack=pod_state.has_own_stack)


def _mapping_statement(mapping: InstalledMapping, others: Sequence[InstalledMapping]) -> Statement:
    if mapping.pod_ip is None:
        return problem(
            f"{mapping.host} is held by {mapping.container}, but no rule translates it",
            "Somebody changed the rules of this plugin.",
            RESTORE,
        )
    exceptions = [f"but {other.host} leads to {other.target}, {other.container}" for other in others]
    if not mapping.host_ip.is_unspecified:
        exceptions = ["other addresses of this node are not for this mapping"]
    host = f"{mapping.host}, the dynamic port for {mapping.request}," if mapping.request else mapping.host
    return ok(f"{host} leads to {mapping.target}, {mapping.container}", *exceptions)


def _holder_statement(mapping: InstalledMapping) -> Statement:
    container = f"container {short_id(mapping.container_id)} ({mapping.ifname}) on network {mapping.network}"
    if mapping.holder is HolderState.ALIVE:
        return ok(f"the holder is alive: {container}, {mapping.netns}")
    if mapping.holder is HolderState.UNKNOWN:
        text = f"it cannot be told whether the holder is alive: {container}"
        return note(text, "Its network namespace cannot be seen.")
    return problem(
        f"the holder is gone: {container}, {mapping.netns}",
        "Nobody answers, or whoever has the pod's address now.",
        "nothing, if another pod is to have the port: it takes it over. The runtime's DEL or GC removes the mapping",
    )
