from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab import Node, Pod, config, mapping, wait

BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
REFUSED = (100, 11)  # taken, or too many races lost: neither changes anything


def whole(ports: int) -> Counter[str]:
    """What a dual-stack attachment with so many ports consists of, beside the rules of its masquerade."""
    return Counter(hostports=2 * ports, pods_ip4=1, pods_ip6=1, chain=2, rule=2 * ports + 3)


def test_32_adds_of_different_pods_all_land(node: Node) -> None:
    pods = [node.pod() for _ in range(32)]
    calls = [config(pod, mapping(8000 + number)) for number, pod in enumerate(pods)]
    started = [node.start("ADD", pod, call) for pod, call in zip(pods, calls, strict=True)]
    assert [wait(item).code for item in started] == [0] * 32
    assert all(node.footprint(pod) == whole(1) for pod in pods)
    assert node.cni("CHECK", pods[0], calls[0]).code == 0
    started = [node.start("DEL", pod, BARE) for pod in pods]
    assert [wait(item).code for item in started] == [0] * 32
    assert not any(node.footprint(pod) for pod in pods)


@pytest.mark.parametrize("holder", ["nobody", "a dead pod", "a dead pod whose DEL comes now"])
def test_of_16_adds_for_one_port_one_wins(node: Node, holder: str) -> None:
    dead = node.pod()
    if holder != "nobody":
        node.add(dead, mapping(8080), mapping(5353, 53, "udp"))
        dead.remove()
    pods = [node.pod() for _ in range(16)]
    started = [node.start("ADD", pod, config(pod, mapping(8080), mapping(9000 + n))) for n, pod in enumerate(pods)]
    late = [node.start("DEL", dead, BARE) for _ in range(2)] if "DEL" in holder else []
    codes = [wait(item).code for item in started]
    assert sorted(codes) == [0] + [100] * 15
    assert [wait(item).code for item in late] == [0] * len(late)
    assert [node.footprint(pod) for pod in pods] == [Counter() if code else whole(2) for code in codes]
    assert not node.footprint(dead)


def live(node: Node, pod: Pod, schedule: random.Random) -> dict[str, Any] | None:
    """ADD and DEL at random; after each ADD that succeeded see all of it there. Return what is left installed."""
    rest = None
    for _ in range(6):
        if schedule.random() < 0.3:
            assert node.cni("DEL", pod, BARE).code == 0
            rest = None
        else:
            ports = schedule.sample(range(8080, 8085), schedule.randint(1, 2))
            wanted = config(pod, *(mapping(port, 80, schedule.choice(["tcp", "udp"])) for port in ports))
            added = node.cni("ADD", pod, wanted)
            assert added.code in {0, *REFUSED}, added
            rest = rest if added.code else wanted
        if rest:
            checked = node.cni("CHECK", pod, rest)
            assert checked.code == 0, checked
        else:
            assert not node.footprint(pod)
    return rest


@pytest.mark.parametrize("seed", range(2))
def test_a_storm_of_adds_and_dels_never_removes_anothers_mapping(node: Node, seed: int) -> None:
    bystander = node.pod()
    node.add(bystander, mapping(7070), mapping(7071, 80, "udp"))
    pods = [node.pod() for _ in range(5)]
    with ThreadPoolExecutor(len(pods)) as threads:
        lives = [
            threads.submit(live, node, pod, random.Random(f"{seed} {number}"))  # noqa: S311 - a schedule, not a secret
            for number, pod in enumerate(pods)
        ]
        rest = [life.result() for life in lives]
    for pod, wanted in zip(pods, rest, strict=True):
        mappings = wanted["runtimeConfig"]["portMappings"] if wanted else ()
        assert node.footprint(pod) == (whole(len(mappings)) if mappings else Counter())
    assert node.footprint(bystander) == whole(2)
    assert node.cni("CHECK", bystander, config(bystander, mapping(7070), mapping(7071, 80, "udp"))).code == 0


def test_a_kill_at_any_moment_leaves_all_of_an_attachment_or_nothing(node: Node) -> None:
    pods = [node.pod() for _ in range(3)]
    schedule = random.Random(4)  # noqa: S311 - a schedule, not a secret
    found, wanted = set[tuple[str, int]](), {("ADD", 0), ("ADD", -9), ("DEL", 0), ("DEL", -9)}
    for turn in range(60):
        if turn >= 10 and wanted <= found:
            break
        started_at = time.monotonic()
        node.add(pods[0], mapping(7000))
        long = 3 * (time.monotonic() - started_at)  # as long as three of them take at once, on one processor
        for command in ("ADD", "ADD", "DEL"):
            running = []
            for number, pod in enumerate(pods):
                ports = [mapping(8000 + 100 * number + port) for port in range(schedule.randint(1, 3))]
                running.append(node.start(command, pod, config(pod, *ports)))
            for killed in running:
                time.sleep(schedule.uniform(0, long / len(pods)))
                killed.kill()
                found.add((command, wait(killed).status))
            for pod in pods:
                assert node.footprint(pod) in [Counter(), whole(1), whole(2), whole(3)]
    assert wanted <= found
    for pod in pods:
        node.delete(pod)
        assert not node.footprint(pod)
