from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import node_process
import pytest
from lab import NODE4, NODE6, Namespace, Node

from cni_hostport.kernel import namespaces, netns, routes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    with node_process.closing():
        yield


def addresses_at(path: str) -> set[str]:
    return {str(address) for item in namespaces.visible() if item.path == path for address in item.addresses}


@pytest.fixture
def process(node: Node) -> Iterator[str]:
    """The namespace of a process, whose name in /run/netns is gone."""
    command = ["nsenter", f"--net={node.path}", "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as sleeping:
        assert sleeping.stdout
        sleeping.stdout.readline()
        subprocess.run(["ip", "netns", "del", node.name], check=True)
        yield f"/proc/{sleeping.pid}/ns/net"
        sleeping.kill()


def test_a_pods_addresses_are_read_by_this_process_itself(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("it has forked"))
    pod = node.pod()
    with node_process.on(node):
        assert [str(address) for address in routes.pod_addresses(pod.path, "eth0")] == pod.addresses


def test_a_pods_addresses_are_the_global_ones_of_its_interface_in_the_kernels_order(node: Node) -> None:
    pod = node.pod()
    pod.ip("addr add 169.254.7.1/16 dev eth0 scope link", "addr add 10.9.0.1 peer 10.9.0.2/32 dev eth0")
    pod.ip("link add other type bridge", "addr add 10.8.0.1/24 dev other")
    with node_process.on(node):
        found = [str(address) for address in routes.pod_addresses(pod.path, "eth0")]
        assert routes.pod_addresses(pod.path, "absent") == []
    assert found == [pod.addresses[0], "10.9.0.1/32", pod.addresses[1]]


def test_a_namespace_with_a_name_is_seen(node: Node) -> None:
    assert addresses_at(node.path) >= {NODE4, NODE6, "127.0.0.1", "::1"}


def test_a_namespace_that_is_mounted_elsewhere_is_seen(tmp_path: Path) -> None:
    with Namespace("elsewhere") as made:
        made.ip("addr add 10.77.0.1/32 dev lo")
        place = tmp_path / "a place"
        place.touch()
        subprocess.run(["mount", "--bind", made.path, place], check=True)
        try:
            made.remove()
            assert "10.77.0.1" in addresses_at(str(place))
        finally:
            subprocess.run(["umount", place], check=True)


def test_a_namespace_that_only_a_process_is_in_is_seen(process: str) -> None:
    assert addresses_at(process) >= {NODE4, NODE6}


def test_the_addresses_of_a_process_whose_namespace_must_not_be_entered_are_seen(
    process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = addresses_at(process)
    inside = netns.inside

    def refuse(path: str) -> object:
        if path == process:
            raise PermissionError(13, "Permission denied", path)
        return inside(path)

    monkeypatch.setattr(netns, "inside", refuse)
    found = [item for item in namespaces.visible() if item.path == process]
    assert [item.inode for item in found] == [0]
    assert {str(address) for address in found[0].addresses} == entered


def test_a_namespace_is_seen_once(node: Node) -> None:
    inodes = [item.inode for item in namespaces.visible() if item.inode]
    assert len(inodes) == len(set(inodes))
    assert node.path in {item.path for item in namespaces.visible()}
