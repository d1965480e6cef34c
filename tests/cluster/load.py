"""Pods that come and go on both nodes while something else happens, and what failed meanwhile."""

from __future__ import annotations

import re
import threading
from collections import Counter
from typing import TYPE_CHECKING, Self

from cluster.cluster import pod, port

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.cluster import Cluster
    from cluster.machine import Machine

STEADY, CHANGING = 9000, 9001  # host ports
# what containerd logs, and the kubelet tells, of an ADD or DEL that failed
FAILED_CALL = re.compile(r"^.*failed to (?:setup|destroy) network.*$", re.MULTILINE)
EVENTS = ("FailedCreatePodSandBox", "FailedKillPod")


class Load:
    """A context: on each node one pod stays, whose port is asked all the time, and others come and go.

    After it, ``failures`` says in a line each what went wrong, and ``rounds`` how many pods came and went, by node.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.failures: list[str] = []
        self.rounds: Counter[str] = Counter()
        self._cluster = cluster
        self._stop = threading.Event()
        self._steady = [pod(f"steady-{node.number}", port(STEADY), node=node) for node in cluster.nodes]
        self._threads = [
            threading.Thread(target=self._repeat, args=(action, node))
            for node in cluster.nodes
            for action in (self._ask, self._change)
        ]

    def __enter__(self) -> Self:
        self._logged = {node.name: len(node.log("containerd").read_text()) for node in self._cluster.nodes}
        self._events = self._failed_events()
        self._running = self._cluster.running(*self._steady)
        self._running.__enter__()
        for thread in self._threads:
            thread.start()
        self.wait_for_rounds(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._running.__exit__(None, None, None)
        for node in self._cluster.nodes:
            self.failures += FAILED_CALL.findall(node.log("containerd").read_text()[self._logged[node.name] :])
        self.failures += sorted(self._failed_events() - self._events)

    def wait_for_rounds(self, number: int) -> None:
        """Wait until this many pods more have come and gone on each node, or something has failed."""
        wanted = {node.name: self.rounds[node.name] + number for node in self._cluster.nodes}
        self._cluster.wait_for(
            lambda: self.failures or all(self.rounds[name] >= rounds for name, rounds in wanted.items()), 120
        )

    def _repeat(self, action: Callable[[Machine], None], node: Machine) -> None:
        try:
            while not self._stop.is_set():
                action(node)
        except AssertionError as error:
            self.failures.append(str(error))

    def _ask(self, node: Machine) -> None:
        if self._cluster.answer(node.ip4, STEADY) != f"steady-{node.number}":
            self.failures.append(f"no answer from steady-{node.number}")
        self._stop.wait(0.02)

    def _change(self, node: Machine) -> None:
        name = f"changing-{node.number}-{self.rounds[node.name]}"
        with self._cluster.running(pod(name, port(CHANGING), node=node)):
            for address in (node.ip4, node.ip6):
                if (answer := self._cluster.answer(address, CHANGING)) != name:
                    self.failures.append(f"{address} answers {answer!r} instead of {name}")
        self.rounds[node.name] += 1

    def _failed_events(self) -> set[str]:
        return {
            event["message"]
            for reason in EVENTS
            for event in self._cluster.get("events", "--all-namespaces", f"--field-selector=reason={reason}")
            if FAILED_CALL.search(event["message"])
        }
