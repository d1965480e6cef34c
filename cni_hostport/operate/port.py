"""The host ports that lead to a pod, by its own ports: what ``docker port`` shows of a container."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from click import ClickException

from cni_hostport.attachment import COMMENT_BYTES, SHORT_ID, printable
from cni_hostport.operate.list import is_called
from cni_hostport.operate.mappings import HolderState, endpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cni_hostport.operate.mappings import InstalledMapping

    ByPort = Mapping[str, Sequence[InstalledMapping]]  # by a port of the pod, as in ``80/tcp``


def find(mappings: Iterable[InstalledMapping], pod: str, port: tuple[int, str] | None) -> ByPort:
    """Return the mappings that lead to a pod, or to one port of it, by its ports.

    ``pod`` is its name, with or without its namespace, or the beginning of its container's ID. Raises
    ``ClickException`` if nothing leads there, or it can be several pods.
    """
    found: dict[str, list[InstalledMapping]] = {}
    for mapping in sorted(_held(mappings, pod), key=lambda mapping: (mapping.pod_port or 0, mapping.protocol)):
        if mapping.pod_port and port in {None, (mapping.pod_port, mapping.protocol)}:
            found.setdefault(f"{mapping.pod_port}/{mapping.protocol}", []).append(mapping)
    if not found:
        target = f"{port[0]}/{port[1]} of {pod}" if port else pod
        msg = f"no host port of this node leads to {target}"
        raise ClickException(msg)
    return found


def lines(found: ByPort, *, with_ports: bool) -> Iterator[str]:
    """Yield each host's side, as in ``0.0.0.0:40017``; ``with_ports`` behind the pod's: ``80/tcp -> 0.0.0.0:40017``."""
    for port, mappings in found.items():
        for mapping in mappings:
            host = endpoint(mapping.host_ip, mapping.host_port)
            yield f"{port} -> {host}" if with_ports else host


def json(found: ByPort) -> dict[str, list[dict[str, Any]]]:
    """Return them in the words in which a pod is told of its dynamic host ports; each port can have several here."""
    return {
        port: [{"hostPort": mapping.host_port, "hostIP": str(mapping.host_ip)} for mapping in mappings]
        for port, mappings in found.items()
    }


def _held(mappings: Iterable[InstalledMapping], pod: str) -> Sequence[InstalledMapping]:
    """Return the mappings of the one pod that is meant: its name goes before an ID, a whole ID before a beginning."""
    mappings, name = list(mappings), printable(pod)
    held = (
        [mapping for mapping in mappings if is_called(mapping.pod, name)]
        or [mapping for mapping in mappings if mapping.container_id == pod]
        or [mapping for mapping in mappings if _may_be(mapping.container_id, pod)]
    )
    # of a pod that was started again, the container before may not have been deleted yet
    held = [mapping for mapping in held if mapping.holder is not HolderState.GONE] or held
    # what is left of two long names can be the same
    containers = sorted(
        {
            mapping.container if len(mapping.pod) < COMMENT_BYTES else f"container {mapping.container_id}"
            for mapping in held
        }
    )
    if len(containers) > 1:
        msg = f"{pod} can be any of these: {', '.join(containers)}"
        raise ClickException(msg)
    return held


def _may_be(known: str, given: str) -> bool:
    """Tell whether a container ID that is given can be one that is known from the ruleset, which may have cut it."""
    return bool(given) and (known.startswith(given) or (len(known) >= SHORT_ID and given.startswith(known)))
