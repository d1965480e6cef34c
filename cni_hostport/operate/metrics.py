"""Figures for Prometheus: mappings, their holders, and the connections to them."""

from __future__ import annotations

from collections import Counter
from threading import Lock
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cni_hostport.nft import Nft
from cni_hostport.operate.mappings import Holder, read

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        for state in Holder:
            holders.add_metric([state], states[state])
        yield holders

        connections = CounterMetricFamily(
            "hostport_connections", "New connections to a host port since its mapping was installed.", labels=LABELS
        )
        for of in mappings:
            host = (of.protocol, str(of.host_ip), str(of.host_port))
            connections.add_metric([*host, of.pod, of.container_id, of.ifname, of.network], of.connections)
        yield connections


def registry() -> CollectorRegistry:
    """Return the registry that has these figures and no others."""
    made = CollectorRegistry(auto_describe=False)
    made.register(Mappings())
    return made
