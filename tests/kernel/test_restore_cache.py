from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from lab import CLIENT4, NODE4, Node, mapping
from libcni_cache import CAPABLE, Cache
from restoration import restore, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cni")


@pytest.mark.parametrize(
    "keys",
    [
        {"netns": None},
        {
            "capabilityArgs": {
                "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": ""}]
            }
        },
        {"capabilityArgs": {"portMappings": [mapping(8080), mapping(0, 9090)], "bandwidth": None}},
        {"cniArgs": None},
    ],
    ids=["without the namespace", "containerd's keys", "host port 0", "without arguments"],
)
def test_entries_of_every_runtime_are_understood(node: Node, cache: Cache, keys: dict[str, Any]) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    cache.add(pod, mapping(8080), **keys)
    assert restore(node, cache) == "1 restored\n"
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


@pytest.mark.parametrize(
    "keys",
    [
        {"plugin": {"type": "portmap", "capabilities": {"portMappings": True}}},
        {"plugin": {"type": "hostport"}},
        {"plugin": {"type": "hostport", "capabilities": {"portMappings": False}}},
        {"capabilityArgs": None},
        {"capabilityArgs": {"portMappings": [mapping(0)]}},
        {"kind": "another"},
    ],
    ids=["portmap's", "no capabilities", "capability off", "no mappings", "host port 0 alone", "another kind of file"],
)
def test_attachments_without_host_ports_of_this_plugin_are_none_of_its_business(
    node: Node, cache: Cache, keys: dict[str, Any]
) -> None:
    cache.add(node.pod(), mapping(8080), **keys)
    assert restore(node, cache) == "Nothing to restore.\n"
    assert node.ruleset() == ""


def test_a_node_without_host_ports_gets_no_table(node: Node, cache: Cache) -> None:
    cache.add(node.pod(), plugin={**CAPABLE, "type": "portmap"})
    restore(node, cache)
    assert node.nft("list ruleset") == ""


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_restored(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    broken = cache.directory / "results" / "pods-broken-eth0"
    broken.write_text('{"kind": "cniCacheV1", "containerId"')
    output = restore(node, cache, status=1)
    assert f"failed: {broken}: " in output
    assert output.endswith("1 failed, 1 restored\n")
    assert node.footprint(pod)


def test_a_wrong_configuration_is_named(node: Node, cache: Cache) -> None:
    cache.add(node.pod(), mapping(8080), plugin={**CAPABLE, "snat": "yes"})
    assert "snat 'yes' is invalid" in restore(node, cache, status=1)


def test_several_caches_are_read_and_one_that_is_missing_is_no_error(node: Node, cache: Cache, tmp_path: Path) -> None:
    other, absent = Cache(tmp_path / "other"), Cache(tmp_path / "absent")
    (absent.directory / "results").rmdir()
    pods = running(node, cache, mapping(8080)), running(node, other, mapping(9090))
    node.nft("flush ruleset")
    output = restore(node, cache, other, absent)
    assert output == f"There is no cache of a runtime in {absent.directory}.\n2 restored\n"
    assert all(node.footprint(pod) for pod in pods)


@pytest.mark.parametrize(
    "keys",
    [
        {"plugin": {"type": "hostport", "capabilities": ["portMappings"]}},
        {"netns": None, "result": {"interfaces": ["eth0"], "ips": []}},
        {"netns": None, "result": {"interfaces": [{"name": "eth0", "sandbox": None}], "ips": []}},
        {"containerId": 'x" : drop }; add table inet injected; #'},
        {"networkName": "a b"},
        {"ifName": "a/b"},
        {"config": "e30="},
    ],
    ids=["capabilities", "interfaces", "no sandbox", "container", "network", "interface", "configuration"],
)
def test_an_odd_entry_stops_nobody_else(node: Node, cache: Cache, keys: dict[str, Any]) -> None:
    cache.add(node.pod(), mapping(8080), **keys)
    (cache.directory / "results" / "deep").write_text("[" * 100_000)
    pod = node.pod()
    cache.add(pod, mapping(9090))
    output = restore(node, cache, status=1)
    assert "Traceback" not in output
    assert "1 restored" in output
    assert node.footprint(pod)
    assert "injected" not in node.nft("list tables")


def test_a_namespace_that_is_not_told_is_not_called_gone(node: Node, cache: Cache) -> None:
    pod = node.pod(4)
    cache.add(pod, mapping(8080), netns=None, result={"ip4": {"ip": pod.addresses[0]}})
    assert "its runtime does not tell its network namespace" in restore(node, cache, status=1)


def test_the_sandbox_of_a_result_is_the_containers(node: Node, cache: Cache) -> None:
    pod = node.pod(4)
    interfaces = [{"name": "eth0"}, {"name": "eth0", "sandbox": pod.path}]
    cache.add(pod, mapping(8080), netns=None, result={"interfaces": interfaces, "ips": [{"address": pod.addresses[0]}]})
    assert restore(node, cache) == "1 restored\n"


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return "it is not a regular file"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "it is not a regular file"


def huge(path: Path) -> str:
    with path.open("wb") as file:
        file.truncate(3 << 30)
    return "it is larger than 16 MiB"


def circle(path: Path) -> str:
    path.symlink_to(path.name)
    return "Too many levels of symbolic links"


@pytest.mark.parametrize("make", [fifo, device, huge, circle])
def test_what_cannot_be_libcnis_is_told_and_the_others_are_restored(
    node: Node, cache: Cache, make: Callable[[Path], str]
) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    strange = cache.directory / "results" / "pods-strange-eth0"
    reason = make(strange)
    output = restore(node, cache, status=1)
    assert f"failed: {strange}: {reason}\n" in output
    assert output.endswith("1 failed, 1 restored\n")
    assert node.footprint(pod)


def test_what_leads_nowhere_and_directories_are_no_entries(node: Node, cache: Cache) -> None:
    running(node, cache, mapping(8080))
    (cache.directory / "results" / "nowhere").symlink_to("/none")
    (cache.directory / "results" / "directory").mkdir()
    assert restore(node, cache) == "1 present\n"
