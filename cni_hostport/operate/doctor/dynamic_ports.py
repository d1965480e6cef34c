"""The ranges from which a node's networks give dynamic host ports: what else uses them, and how full they are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError, Code
from cni_hostport.operate import sysctls
from cni_hostport.operate.doctor import conflists
from cni_hostport.operate.statements import note, ok

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.statements import Statement

LOCAL_RANGE, RESERVED = "net/ipv4/ip_local_port_range", "net/ipv4/ip_local_reserved_ports"
# kube-proxy's default, and that of those in its place; the API server alone knows another (--service-node-port-range)
NODE_PORTS = range(30000, 32768)
NEARLY_FULL = 0.9
MAX_EXAMPLES = 10  # of what a statement says


def statements(directories: Sequence[Path], mappings: Sequence[InstalledMapping]) -> Iterator[Statement]:
    """Say what uses the ranges of network configurations; raises ``OSError`` if a setting cannot be read."""
    for path, conflist in conflists.readable(directories):
        try:
            ranges = NetworkConfig.parse(conflist.plugin() or {}).dynamic_ports
        except CNIError:
            continue  # which ``conflists.statements`` tells
        if ranges:
            ports = {port for first, last in ranges for port in range(first, last + 1)}
            yield from _local_port_statements(path, ports)
            yield from _node_port_statements(path, ports)
            yield from _mapping_statements(path, ports, mappings)


def _local_port_statements(path: Path, ports: set[int]) -> Iterator[Statement]:
    first, last = map(int, sysctls.text(LOCAL_RANGE).split())
    reserved = {port for part in sysctls.text(RESERVED).split(",") if part for port in _part(part)}
    shared = ports & {*range(first, last + 1)} - reserved
    if shared:
        name = sysctls.dotted(RESERVED)
        yield note(
            f"{path}: {_written(shared)} of dynamicPorts are in {sysctls.dotted(LOCAL_RANGE)} ({first}-{last})",
            "The kernel gives these ports to this node's own programs, too. No pod gets one on which a program"
            " listens; but what is sent to a program that takes a pod's port later goes to the pod.",
            f"sysctl -w {name}={_written(reserved | ports)}, which keeps what is reserved now. Write it into a file in"
            " /etc/sysctl.d so that it lasts, with what other files there reserve: the last one holds.",
        )


def _part(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _node_port_statements(path: Path, ports: set[int]) -> Iterator[Statement]:
    shared = ports.intersection(NODE_PORTS)
    if shared:
        yield note(
            f"{path}: {_written(shared)} of dynamicPorts are in Kubernetes' range of NodePorts"
            f" ({NODE_PORTS[0]}-{NODE_PORTS[-1]}, unless the API server was given another)",
            "Kubernetes does not know which of these ports pods have: a Service that gets the same one as its NodePort"
            " takes the pod's connections.",
            "In a cluster, take dynamicPorts from outside of that range.",
        )


def _mapping_statements(path: Path, ports: set[int], mappings: Sequence[InstalledMapping]) -> Iterator[Statement]:
    inside = [mapping for mapping in mappings if mapping.host_port in ports]
    fixed = [mapping for mapping in inside if not mapping.request]
    if fixed:
        yield note(
            f"{path}: pods have fixed host ports within dynamicPorts",
            "None of these ports is given to another pod meanwhile. But a pod that asks for one by its number is"
            " refused while another has it as its dynamic port.",
            "Give these pods other host ports, or take dynamicPorts from elsewhere.",
            tuple(f"{mapping.host} leads to {mapping.container}" for mapping in fixed[:MAX_EXAMPLES]),
        )
    taken = Counter(protocol for protocol, _ in {(mapping.protocol, mapping.host_port) for mapping in inside})
    numbers = ", ".join(f"{number} of {protocol}" for protocol, number in sorted(taken.items())) or "none"
    text = f"{path}: of the {len(ports)} dynamicPorts {_written(ports)}, these are taken: {numbers}"
    if max(taken.values(), default=0) < NEARLY_FULL * len(ports):
        yield ok(text)
        return
    yield note(
        text,
        f"Where no port is free, a pod that asks for one fails with code {Code.PORT_TAKEN:d}.",
        "Make the ranges larger: what pods have is not touched.",
    )


def _written(ports: Iterable[int]) -> str:
    """Write ports as the kernel does, and as ``dynamicPorts`` may be: ``8080,40000-40999``."""
    found: list[tuple[int, int]] = []
    for port in sorted(ports):
        if found and port == found[-1][1] + 1:
            found[-1] = found[-1][0], port
        else:
            found.append((port, port))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
