"""What goes on in a cluster while something happens to it: pods come and go, clients connect. Faults are counted."""

from __future__ import annotations

import itertools
import random
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from resident import eventually

from cluster.cluster import pod, port
from cluster.replicas import replicas

if TYPE_CHECKING:
    from cluster.cluster import Cluster

FIRST_PORT = 9000
TIMEOUT = 2.0  # seconds for a connection; who has accepted it has more time for its answer
PATIENCE = 30.0
FRESH = 4.0  # seconds for which a client goes by what it has begun to find out
INTERVAL = 0.1  # seconds between connections to a port


def _ask(cluster: Cluster, address: str, port: int) -> str:
    """Return the answer to a connection from outside; raises ``OSError`` if there is none."""
    with cluster.client.socket("tcp", address) as asking:
        asking.settimeout(TIMEOUT)
        asking.connect((address, port))
        asking.settimeout(PATIENCE)
        return asking.recv(4096).decode()


class _Traffic:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._ended = threading.Event()
        self.faults: list[str] = []
        self.rounds = 0
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended.is_set():
            try:
                self._round()
            except (AssertionError, OSError) as error:
                self.faults.append(f"{type(error).__name__}: {error}"[:4000])
            self.rounds += 1

    def _round(self) -> None:
        raise NotImplementedError

    def wait_for_rounds(self, number: int) -> None:
        """Wait until so many rounds have begun and ended from now on."""
        wanted = self.rounds + number + 1
        assert eventually(lambda: self.rounds >= wanted, 300), self.faults


class PodTraffic(_Traffic):
    """Pods with host ports that come and go on both nodes."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._numbers = itertools.count()

    def _round(self) -> None:
        number = next(self._numbers)
        host_port = FIRST_PORT + number
        nodes = self._cluster.nodes
        pods = [pod(f"passing-{number}-{node.number}", port(host_port), node=node) for node in nodes]
        with self._cluster.running(*pods):
            for node in nodes:
                assert _ask(self._cluster, node.ip4, host_port) == f"passing-{number}-{node.number}"


class PortTraffic(_Traffic):
    """Connections, one after the other, to host ports of pods that stay."""

    def __init__(self, cluster: Cluster, *host_ports: int) -> None:
        super().__init__(cluster)
        self._ports = host_ports

    def _round(self) -> None:
        for node, host_port in itertools.product(self._cluster.nodes, self._ports):
            with suppress(TimeoutError):
                _ask(self._cluster, node.ip4, host_port)
                continue
            self.faults.append(f"{node.name} does not answer on {host_port}")
        self._ended.wait(INTERVAL)


class ReplicaTraffic(_Traffic):
    """Clients of those replicas with dynamic host ports that are ready; ``answered`` has the names of who answered."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.answered = set[str]()

    def _round(self) -> None:
        until = time.monotonic() + FRESH
        found = replicas(self._cluster)
        random.shuffle(found)
        for replica in found:
            if time.monotonic() > until:
                break
            try:
                answer = _ask(self._cluster, replica.address, replica.port)
            except OSError as error:
                answer = str(error)
            if answer == replica.answer:
                self.answered.add(replica.name)
            else:
                self.faults.append(f"{replica}: {answer!r}")
        self._ended.wait(INTERVAL)
