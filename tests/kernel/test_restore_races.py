from __future__ import annotations

import concurrent.futures
import contextlib
import json
import subprocess
import threading
import time
from random import uniform
from typing import TYPE_CHECKING, Any

import pytest
from lab import LAUNCHER, Node, config, mapping
from libcni_cache import Cache
from resident import Resident, launcher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Pod

OPERATE = list(LAUNCHER)  # what answers a person, whatever a test's node calls


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cni")


@pytest.fixture
def warm(tmp_path: Path, _kernel: None) -> Iterator[Node]:
    """A node whose calls are fast, so that many of them meet a restoration."""
    with Resident(tmp_path / "socket"), Node(launcher(tmp_path, tmp_path / "socket")) as node:
        yield node


def restoring(node: Node, cache: Cache) -> subprocess.Popen[str]:
    command = ["nsenter", f"--net={node.path}", *OPERATE, "restore", f"--cache-dir={cache.directory}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def restored_again_and_again(node: Node, cache: Cache) -> Iterator[list[str]]:
    """Restore, by two processes at once, for as long as the block takes; gives what they complain about."""
    over, complaints = threading.Event(), list[str]()

    def again() -> None:
        while not over.is_set():
            _, output = restoring(node, cache).communicate()
            complaints.extend(line for line in output.splitlines() if line.startswith(("failed", "Error", "Traceback")))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = [pool.submit(again) for _ in range(2)]
        try:
            yield complaints
        finally:
            over.set()
        for item in running:
            item.result()


def holders(node: Node) -> set[str]:
    listed = json.loads(node.run(*OPERATE, "list", "--json").stdout)
    return {item["container_id"] for item in listed}


@pytest.mark.parametrize("told", [True, False], ids=["DEL with mappings", "DEL without mappings"])
def test_no_deleted_pod_comes_back_and_no_living_one_is_lost(warm: Node, cache: Cache, told: bool) -> None:
    pods = [warm.pod(4) for _ in range(8)]

    def come_and_go(number: int, pod: Pod) -> None:
        wanted = mapping(8000 + number), mapping(5000 + number, 53, "udp")
        known: dict[str, Any] = {"runtimeConfig": {"portMappings": list(wanted)}} if told else {}
        for turn in range(6):
            warm.add(pod, *wanted)
            time.sleep(uniform(0, 0.02))  # noqa: S311 - not a secret
            cache.add(pod, *wanted)  # libcni writes it after the last plugin's ADD
            time.sleep(uniform(0, 0.2))  # noqa: S311 - not a secret
            if turn < 5 or number % 2:
                warm.delete(pod, **known)
                time.sleep(uniform(0, 0.2))  # noqa: S311 - not a secret
                cache.remove(pod)  # and removes it after the last plugin's DEL

    with restored_again_and_again(warm, cache) as complaints, concurrent.futures.ThreadPoolExecutor() as pool:
        for one in [pool.submit(come_and_go, *item) for item in enumerate(pods)]:
            one.result()
    assert complaints == []
    assert holders(warm) == {pod.id for number, pod in enumerate(pods) if not number % 2}


def test_pods_that_are_deleted_while_the_ruleset_is_flushed_do_not_come_back(warm: Node, cache: Cache) -> None:
    pods = [warm.pod(4) for _ in range(12)]
    for number, pod in enumerate(pods):
        warm.add(pod, mapping(8000 + number))
        cache.add(pod, mapping(8000 + number))

    def go(number: int, pod: Pod) -> None:
        time.sleep(uniform(0, 3))  # noqa: S311 - not a secret
        warm.delete(pod, runtimeConfig={"portMappings": [mapping(8000 + number)]})
        time.sleep(uniform(0, 0.5))  # noqa: S311 - not a secret
        cache.remove(pod)

    with restored_again_and_again(warm, cache), concurrent.futures.ThreadPoolExecutor() as pool:
        going = [pool.submit(go, *item) for item in enumerate(pods) if item[0] % 3]
        while not all(one.done() for one in going):
            warm.nft("flush ruleset")  # which also takes away what tells that pods were deleted
            time.sleep(0.3)
    restoring(warm, cache).communicate()
    assert holders(warm) == {pod.id for number, pod in enumerate(pods) if not number % 3}


def test_a_restoration_that_is_killed_leaves_all_of_an_attachment_or_nothing(node: Node, cache: Cache) -> None:
    pods = [node.pod(4) for _ in range(6)]
    for number, pod in enumerate(pods):
        cache.add(pod, mapping(8000 + number), mapping(8100 + number, hostIP="192.0.2.1"))
    restore = restoring(node, cache)
    restore.communicate()
    whole = {pod.id: node.footprint(pod) for pod in pods}
    assert all(whole.values())
    for _ in range(12):
        node.nft("flush ruleset")
        restore = restoring(node, cache)
        time.sleep(uniform(0.15, 0.5))  # noqa: S311 - not a secret
        restore.kill()
        restore.communicate()
        for pod in pods:
            assert node.footprint(pod) in ({}, whole[pod.id])
    restoring(node, cache).communicate()
    for number, pod in enumerate(pods):
        mappings = mapping(8000 + number), mapping(8100 + number, hostIP="192.0.2.1")
        assert node.cni("CHECK", pod, config(pod, *mappings)).status == 0


def test_two_restorations_at_once_agree(node: Node, cache: Cache) -> None:
    for number in range(20):
        cache.add(node.pod(4), mapping(8000 + number))
    both = [restoring(node, cache) for _ in range(2)]
    output = [item.communicate()[1] for item in both]
    assert [item.returncode for item in both] == [0, 0], output
    assert len(holders(node)) == 20
