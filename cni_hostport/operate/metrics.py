"""Figures for Prometheus: mappings, their holders, and the connections to them."""

from __future__ import annotations

import os
from collections import Counter
from errno import EINVAL
from threading import Lock
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cni_hostport.kernel.library import look_names_up_in
from cni_hostport.kernel.nft import Nft
from cni_hostport.operate.mappings import HolderState, read
from cni_hostport.text import escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from prometheus_client import Metric

LABELS = ("protocol", "host_ip", "host_port", "pod", "container_id", "interface", "network")


class Mappings(Collector):
    """The mappings in the ruleset at the moment of a scrape; of several scrapes at once, one waits for the other."""

    def __init__(self) -> None:
        """Open nftables in this network namespace; raises ``NFTError`` where there is none."""
        self._nft = Nft()
        self._lock = Lock()

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics; raises ``NFTError`` if the ruleset cannot be read."""
        with self._lock:
            mappings = read(self._nft)
        count = GaugeMetricFamily("hostport_mappings", "Host ports that lead to a pod.", labels=["protocol", "family"])
        counts = Counter((mapping.protocol, mapping.version) for mapping in mappings)
        for (protocol, version), number in sorted(counts.items()):
            count.add_metric([protocol, f"ipv{version}"], number)
        yield count

        dynamic = GaugeMetricFamily(
            "hostport_dynamic_ports",
            "Dynamic host ports that lead to a pod; hostport_mappings counts them too.",
            labels=["protocol", "family"],
        )
        picked = Counter((mapping.protocol, mapping.version) for mapping in mappings if mapping.request)
        for protocol, version in sorted(counts):
            dynamic.add_metric([protocol, f"ipv{version}"], picked[protocol, version])
        yield dynamic

        holders = GaugeMetricFamily(
            "hostport_holders", "Attachments that hold host ports, by what became of their container.", labels=["state"]
        )
        states = Counter({mapping.key: mapping.holder for mapping in mappings}.values())
        for state in HolderState:
            holders.add_metric([state], states[state])
        yield holders

        connections = CounterMetricFamily(
            "hostport_connections", "New connections to a host port since its mapping was installed.", labels=LABELS
        )
        for mapping in mappings:
            host = (mapping.protocol, str(mapping.host_ip), str(mapping.host_port))
            # which Prometheus does not escape
            holder = map(escaped, (mapping.pod, mapping.container_id, mapping.ifname, mapping.network))
            connections.add_metric([*host, *holder], mapping.connections)
        yield connections


def text() -> bytes:
    """Return the figures as they are now."""
    return generate_latest(make_registry())


def write(path: Path) -> None:
    """Replace a file by the figures, with one rename; raises ``OSError`` naming ``path``."""
    mask = os.umask(0o022)  # node exporter is another user, and has to be able to read it
    try:
        write_to_textfile(str(path), make_registry())
    except OSError as error:
        raise OSError(error.errno, f"cannot write it: {error.strerror}", str(path)) from error
    finally:
        os.umask(mask)


def serve(address: str, port: int, log: Callable[[str], None]) -> None:
    """Answer scrapes for ever; raises ``OSError`` naming the address if it cannot be listened on."""
    registry = make_registry()
    generate_latest(registry)  # if the ruleset cannot be read, it fails here
    look_names_up_in("files dns", "hosts")  # no other library of the node's, beside the C library that runs here
    endpoint = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        _, thread = start_http_server(port, address, registry)
    except UnicodeError as error:
        raise OSError(EINVAL, "cannot listen there: this is not the name of a host", endpoint) from error
    except OSError as error:
        raise OSError(error.errno, f"cannot listen there: {error.strerror}", endpoint) from error
    log(f"Listening on http://{endpoint}/metrics")
    thread.join()


def make_registry() -> CollectorRegistry:
    """Return the registry that has these figures and no others."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Mappings())
    return registry
