"""A host port without a mapping: the pods that asked for it, mappings like it, and who gets the connections instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport import plugin
from cni_hostport.errors import CNIError
from cni_hostport.libcni import cache, directory
from cni_hostport.lookup import Lookup
from cni_hostport.operate import requests, sockets
from cni_hostport.operate.statements import RESTORE, note, problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.operate.explain.packet import IPAddress
    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.statements import Statement
    from cni_hostport.ruleset.plan import Forward


def missing_mappings(
    port: int, protocol: str, versions: Collection[int], caches: Sequence[Path]
) -> Iterator[Statement]:
    """Name the pods that asked for a host port and have no mapping of it, and what in the caches cannot be read.

    ``versions`` are the IP versions of which there is no mapping of the port. Raises ``OSError`` if a cache cannot be
    looked at.
    """
    for path in directory.entries(caches) if versions else ():
        try:
            pod, forwards = _wanted(path, port, protocol)
        except (ValueError, CNIError) as error:
            yield note(f"what {path} says cannot be told: {error}", "Its container may have asked for this port.")
            continue
        missing = [forward for forward in forwards if forward.version in versions]
        if missing:
            family = f" of IPv{missing[0].version}" if len({forward.version for forward in missing}) == 1 else ""
            owner = f"{pod} was given it for {missing[0].request}" if missing[0].request else f"{pod} asked for it"
            yield problem(
                f"no mapping of host port {port}/{protocol}{family} is installed, and {owner}",
                "Its mapping was taken away, by a firewall's reload or 'nft flush ruleset'.",
                RESTORE,
            )


def no_mapping(
    port: int,
    protocol: str,
    versions: Collection[int],
    destination: IPAddress | None,
    mappings: Iterable[InstalledMapping],
) -> Statement:
    """Say that there is no mapping of a host port, and show the node's ``mappings`` of the same number.

    It is about one of the node's addresses if ``destination`` is given.
    """
    family = f" for {destination}" if destination else f" of IPv{next(iter(versions))}" if len(versions) == 1 else ""
    return problem(
        f"no mapping of host port {port}/{protocol}{family} is installed",
        "No running pod asked for it, or its runtime does not keep libcni's cache where this was looked for.",
        "hostport doctor checks the network configurations; 'hostPort' has to be set in the pod's specification",
        tuple(
            f"but {mapping.host} leads to {mapping.target}, {mapping.container}"
            for mapping in mappings
            if mapping.host_port == port
        ),
    )


def local_listeners(
    port: int, protocol: str, versions: Collection[int], destination: IPAddress | None
) -> Iterator[Statement]:
    """Name the processes of the node that get the connections to a port that is not mapped.

    It is about one of the node's addresses if ``destination`` is given.
    """
    for version in versions if protocol in sockets.LISTENING_STATES else ():
        for listener in sockets.listeners(protocol, port, version):
            if destination is None or listener.serves(destination):
                process = listener.process
                yield note(f"{process} on this node listens on it, at {listener.address}: it gets the connections")


def _wanted(path: Path, port: int, protocol: str) -> tuple[str, list[Forward]]:
    """Return the pod of an entry of a cache, and what it asked for or was given of a host port: nothing if it is gone.

    Raises ``ValueError`` or ``CNIError`` if that cannot be told.
    """
    call = cache.read(path)
    plan = requests.plan(call)[0] if call else None
    if call is None or plan is None or Lookup(shared=True).is_deleted(plugin.attachment_of(call).key):
        return "", []
    forwards = [forward for forward in plan.forwards if (forward.host_port, forward.protocol) == (port, protocol)]
    return requests.container(call), forwards
