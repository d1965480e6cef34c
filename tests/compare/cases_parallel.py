"""Many calls at once, and calls that are killed."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from compare.cases import case
from compare.cases_ownership import TAKEN
from compare.expect import fall_short, reached, silent
from lab import NODE4, config, mapping, wait

if TYPE_CHECKING:
    from compare.plugins import Bench
    from lab import Pod


@case()
def adds_at_once(node: Bench) -> None:
    """16 ADDs of different pods at once all land."""
    pods = [node.web(4, name=f"pod{number}") for number in range(16)]
    started = [node.start("ADD", pod, config(pod, mapping(8000 + n))) for n, pod in enumerate(pods)]
    if failures := sum(bool(outcome.status) for outcome in map(wait, started)):
        fall_short(f"{failures} of 16 fail")
    for number in range(16):
        reached(node.client, NODE4, 8000 + number, by=f"pod{number}")


@case(TAKEN)
def adds_for_one_port(node: Bench) -> None:
    """Of 8 ADDs for one port at once exactly one succeeds, and gets the connections."""
    pods = [node.web(4, name=f"pod{number}") for number in range(8)]
    started = [node.start("ADD", pod, config(pod, mapping(8080))) for pod in pods]
    winners = [f"pod{number}" for number, item in enumerate(started) if not wait(item).status]
    if len(winners) != 1:
        fall_short(f"{len(winners)} succeed")
    reached(node.client, NODE4, by=winners[0])


@case()
def storm(node: Bench) -> None:
    """ADDs and DELs of several pods at once leave each as its last call left it, and a bystander alone."""
    node.add(node.web(4, name="bystander"), mapping(7070))
    pods = [node.web(4, name=f"pod{number}") for number in range(4)]

    def live(number: int) -> None:
        for _ in range(3):
            node.add(pods[number], mapping(8000 + number), mapping(8100 + number, 80, "udp"))
            node.delete(pods[number])
        if number % 2:
            node.add(pods[number], mapping(8000 + number), mapping(8100 + number, 80, "udp"))

    with ThreadPoolExecutor(len(pods)) as threads:
        list(threads.map(live, range(len(pods))))
    for number in range(len(pods)):
        if number % 2:
            reached(node.client, NODE4, 8000 + number, by=f"pod{number}")
        else:
            silent(node.client, NODE4, 8000 + number)
    reached(node.client, NODE4, 7070, by="bystander")


def killed(node: Bench, pod: Pod, command: str, after: float) -> None:
    started = node.start(command, pod, config(pod, mapping(8080), mapping(8081), mapping(8082)))
    time.sleep(after)
    started.kill()
    wait(started)


@case()
def killed_add(node: Bench) -> None:
    """A DEL after an ADD that was killed at any moment leaves no port open."""
    pod = node.web(4)
    begin = time.monotonic()
    node.add(pod, mapping(8080), mapping(8081), mapping(8082))
    long = time.monotonic() - begin
    node.delete(pod)
    schedule = random.Random(1)  # noqa: S311 - a schedule, not a secret
    for _ in range(6):
        killed(node, pod, "ADD", schedule.uniform(0, long))
        time.sleep(0.05)  # a program that the killed one had started may be at work still
        node.delete(pod)
        for port in (8080, 8081, 8082):
            if not node.client.is_silent("tcp", NODE4, port):
                fall_short(f"port {port} answers")


@case()
def killed_del(node: Bench) -> None:
    """A DEL after a DEL that was killed at any moment leaves no port open."""
    pod = node.web(4)
    schedule = random.Random(2)  # noqa: S311 - a schedule, not a secret
    for _ in range(4):
        node.add(pod, mapping(8080), mapping(8081), mapping(8082))
        killed(node, pod, "DEL", schedule.uniform(0, 0.1))
        time.sleep(0.05)
        node.delete(pod)
        for port in (8080, 8082):
            silent(node.client, NODE4, port)
