"""A flood of new connections at once, while pods are added and deleted on the same node."""

from __future__ import annotations

import multiprocessing
import resource
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.contenders import FIRST_PORT, call_for, run
from bench.markdown import table
from lab import NODE4, Node, mapping

if TYPE_CHECKING:
    import argparse

    from bench.contenders import Contender, Installation
    from lab import Pod

SERVERS, CLIENTS, COMING = 4, 4, 4  # pods that answer; processes that ask; pods that come and go
COMMANDS = ("ADD", "DEL")
ROUNDS = 5
DEADLINE = 30  # seconds in which an answer counts
BACKLOG = 65535
FORK = multiprocessing.get_context("fork")


@dataclass
class Flood:
    """What became of the connections through one contender's mappings, of all rounds."""

    attempted: int = 0
    waits: list[float] = field(default_factory=list)  # seconds from the start of each that was answered
    repeated: int = 0  # packets that began a connection and had to be sent again
    calls: int = 0  # ADDs and DELs that ended meanwhile


def measure(installation: Installation, options: argparse.Namespace) -> dict[str, Flood]:
    """Flood the mappings of each contender, in turns."""
    with ExitStack() as stack:
        targets = [_Target(stack, contender) for contender in installation.contenders]
        for _ in range(min(options.rounds, ROUNDS)):
            for target in targets:
                target.flood(options.flood // CLIENTS)
        return {target.contender.name: target.found for target in targets}


class _Target:
    """A node with pods that answer each connection with one byte, and others that come and go."""

    def __init__(self, stack: ExitStack, contender: Contender) -> None:
        self.contender, self.found = contender, Flood()
        self._node = node = stack.enter_context(Node())
        node.client.set_sysctl("net/ipv4/ip_local_port_range", "1024 65535")
        for number in range(SERVERS):
            pod = node.pod(4)
            pod.set_sysctl("net/core/somaxconn", BACKLOG)
            pod.set_sysctl("net/ipv4/tcp_max_syn_backlog", BACKLOG)
            listening = stack.enter_context(pod.socket("tcp", "0.0.0.0"))
            listening.bind(("0.0.0.0", 80))
            listening.listen(BACKLOG)
            server = FORK.Process(target=_answer, args=(listening,), daemon=True)
            server.start()
            stack.callback(server.join)
            stack.callback(server.kill)
            self._run("ADD", pod, FIRST_PORT + number)
        self._coming = [node.pod(4) for _ in range(COMING)]

    def _run(self, command: str, pod: Pod, port: int) -> None:
        run(self.contender, self._node, command, (pod.id, pod.path), call_for(self.contender, pod, mapping(port)))

    def flood(self, share: int) -> None:
        """Have each client process open so many, and meanwhile add and delete each pod again and again."""
        with self._node.client.inside():
            clients = FORK.Pool(CLIENTS)
        start, repeated = time.monotonic() + 0.5, self._repeated()
        asked = clients.starmap_async(_ask, [(share, start)] * CLIENTS)

        def come_and_go(pod: Pod, port: int) -> int:
            calls = 0
            while not asked.ready():
                for command in COMMANDS:
                    self._run(command, pod, port)
                    calls += time.monotonic() > start and not asked.ready()
            return calls

        with clients, ThreadPoolExecutor() as threads:
            self.found.calls += sum(threads.map(come_and_go, self._coming, range(9000, 9000 + COMING)))
        answers = [answer for client in asked.get() for answer in client]
        self.found.attempted += share * CLIENTS
        self.found.waits += [end - begin for begin, end in answers]
        self.found.repeated += self._repeated() - repeated

    def _repeated(self) -> int:
        with self._node.client.inside():
            lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
        return int(dict(zip(*map(str.split, lines[:2]), strict=True))["TCPSynRetrans"])


def _answer(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        connection.send(b"!")
        connection.close()


def _ask(share: int, start: float) -> list[tuple[float, float]]:
    """Open so many connections, and return when each of those that were answered began, and when it was answered."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    waiting, answers = {}, []
    time.sleep(max(0, start - time.monotonic()))
    with select.epoll() as polled:
        for number in range(share):
            connection = socket.socket()
            connection.settimeout(0)
            begin = time.monotonic()
            connection.connect_ex((NODE4, FIRST_PORT + number % SERVERS))
            waiting[connection.fileno()] = connection, begin
            polled.register(connection, select.EPOLLIN)
        while waiting and time.monotonic() < start + DEADLINE:
            for descriptor, _ in polled.poll(1):
                connection, begin = waiting.pop(descriptor)
                try:
                    if connection.recv(1) == b"!":
                        answers.append((begin, time.monotonic()))
                except OSError:
                    pass  # no answer
                connection.close()
    return answers


def report(floods: dict[str, Flood]) -> str:
    """Return what was answered as Markdown."""
    lines = [
        "New connections, all started at once, while pods are added and deleted.",
        "",
    ]
    headings = ["flood", "attempted", "answered", "slowest answer, s", "SYNs sent again", "ADDs and DELs meanwhile"]
    rows = []
    for name, flood in floods.items():
        answered, slowest = len(flood.waits), max(flood.waits, default=float("nan"))
        share = f"{answered:,} ({answered / flood.attempted:.2%})"
        rows.append([name, f"{flood.attempted:,}", share, f"{slowest:.2f}", f"{flood.repeated}", f"{flood.calls}"])
    return "\n".join([*lines, *table(headings, rows)])
