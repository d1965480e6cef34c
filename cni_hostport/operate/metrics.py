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

from cni_hostport.kernel.nft import Nft
from cni_hostport.operate.mappings import HolderState, read
from cni_hostport.text import escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from prometheus_client import Metric

LABELS = ("protocol", "host_ip", "host_port", "pod", "container_id", "interface", "network")


class Mappings(Collector):
    """The mappings in the ruleset, at the moment in which it is asked, by one after another."""

    def __init__(self) -> None:
        """Open nftables in this network namespace; raises ``NFTError`` where there is none."""
        self._nft = Nft()
        self._asked = Lock()

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics; raises ``NFTError`` if the ruleset cannot be read."""
        with self._asked:
            mappings = read(self._nft)
        count = GaugeMetricFamily("hostport_mappings", "Host ports that lead to a pod.", labels=["protocol", "family"])
        for (protocol, version), number in sorted(Counter((of.protocol, of.version) for of in mappings).items()):
            count.add_metric([protocol, f"ipv{version}"], number)
        yield count

        holders = GaugeMetricFamily(
            "hostport_holders", "Attachments that hold host ports, by what became of their container.", labels=["state"]
        )
        states = Counter({of.key: of.holder for of in mappings}.values())
        for state in HolderState:
            holders.add_metric([state], states[state])
        yield holders

        connections = CounterMetricFamily(
            "hostport_connections", "New connections to a host port since its mapping was installed.", labels=LABELS
        )
        for of in mappings:
            host = (of.protocol, str(of.host_ip), str(of.host_port))
            whose = map(escaped, (of.pod, of.container_id, of.ifname, of.network))  # which Prometheus does not do
            connections.add_metric([*host, *whose], of.connections)
        yield connections


def text() -> bytes:
    """Return the figures as they are now."""
    return generate_latest(_registry())


def write(path: Path) -> None:
    """Replace a file by the figures, with one rename; raises ``OSError`` naming ``path``."""
    mask = os.umask(0o022)  # node exporter is another user, and has to be able to read it
    try:
        write_to_textfile(str(path), _registry())
    except OSError as error:
        raise OSError(error.errno, f"cannot write it: {error.strerror}", str(path)) from error
    finally:
        os.umask(mask)


def serve(address: str, port: int, log: Callable[[str], None]) -> None:
    """Answer scrapes for ever; raises ``OSError`` naming the address if it cannot be listened on."""
    registry = _registry()
    generate_latest(registry)  # what cannot be read is said now
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        _, thread = start_http_server(port, address, registry)
    except UnicodeError as error:
        raise OSError(EINVAL, "cannot listen there: this is not the name of a host", where) from error
    except OSError as error:
        raise OSError(error.errno, f"cannot listen there: {error.strerror}", where) from error
    log(f"Listening on http://{where}/metrics")
    thread.join()


def _registry() -> CollectorRegistry:
    """Return the registry that has these figures and no others."""
    made = CollectorRegistry(auto_describe=False)
    made.register(Mappings())
    return made
