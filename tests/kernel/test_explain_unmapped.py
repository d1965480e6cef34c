from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from dynamic_ports import asking
from explanation import explain, silent_pod
from hostport_list import listed
from lab import CLIENT4, CLIENT6, NODE4, Node, Pod, mapping
from libcni_cache import CAPABLE, Cache

from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with host port 8080, and nothing that listens."""
    return silent_pod(node)


def test_no_mapping_is_installed(node: Node, pod: Pod) -> None:
    pod.serve("tcp", 80, "web")
    explanation = explain(node, "9090")
    assert explanation.problems == ["no mapping of host port 9090/tcp is installed"]
    assert not explanation.notes
    assert explain(node, "8080/udp").problems == ["no mapping of host port 8080/udp is installed"]
    assert explain(node, "8080", "--from", CLIENT6).problems == [
        "no mapping of host port 8080/tcp of IPv6 is installed"
    ]


def test_no_mapping_is_installed_and_a_process_of_the_node_listens(node: Node) -> None:
    node.serve("tcp", 9090, "node", NODE4)
    explanation = explain(node, "9090")
    assert explanation.problems == ["no mapping of host port 9090/tcp is installed"]
    assert explanation.notes[0].endswith(f"on this node listens on it, at {NODE4}: it gets the connections")


def test_what_is_like_it_is_shown_where_there_is_no_mapping(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(53, 53, "udp", hostIP=NODE4))
    [statement] = explain(node, "53").statements
    assert statement["details"] == [f"but {NODE4}:53/udp leads to 10.88.0.2:53, container {pod.id}"]
    [statement] = explain(node, "53/udp", "--from", CLIENT6).statements
    assert statement["details"] == [f"but {NODE4}:53/udp leads to 10.88.0.2:53, container {pod.id}"]


def test_a_mapping_of_one_family_was_taken_away(node: Node, tmp_path: Path) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    Cache(tmp_path).add(pod, mapping(8080))
    node.nft("delete element inet hostport hostports { ipv4 . tcp . 8080 }")
    text = f"no mapping of host port 8080/tcp of IPv4 is installed, and pod shop/{pod.host_end} asked for it"
    assert explain(node, "8080", cache=tmp_path).problems == [text]


def test_a_mapping_that_was_deleted_was_not_taken_away(node: Node, tmp_path: Path) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080))
    Cache(tmp_path).add(pod, mapping(8080))
    node.delete(pod)
    assert explain(node, "8080", cache=tmp_path).problems == ["no mapping of host port 8080/tcp is installed"]


def test_a_mapping_was_taken_away_that_the_cache_of_the_runtime_has(node: Node, tmp_path: Path) -> None:
    pod = node.pod()
    cache = Cache(tmp_path)
    cache.add(pod, mapping(8080))
    explanation = explain(node, "8080", cache=tmp_path)
    assert explanation.problems == [
        f"no mapping of host port 8080/tcp is installed, and pod shop/{pod.host_end} asked for it"
    ]
    assert explanation.last["remedy"] == "hostport restore"
    (tmp_path / "results" / "broken").write_text("{")
    assert explain(node, "8081", cache=tmp_path).problems == ["no mapping of host port 8081/tcp is installed"]
    pod.remove()
    assert explain(node, "8080", cache=tmp_path).problems == ["no mapping of host port 8080/tcp is installed"]


def test_a_dynamic_port_was_taken_away(node: Node, tmp_path: Path) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    asked = asking("80")
    node.add(pod, **asked)
    plugin = {**CAPABLE, "capabilities": {keys.ANNOTATIONS: True}, "dynamicPorts": asked["dynamicPorts"]}
    Cache(tmp_path).add(pod, plugin=plugin, capabilityArgs=asked["runtimeConfig"])
    [port] = [item["host_port"] for item in listed(node)]
    text = f"0.0.0.0:{port}/tcp, the dynamic port for 80/tcp, leads to {pod.ip4}:80, container {pod.id}"
    assert explain(node, str(port), "--from", CLIENT4, cache=tmp_path).statements[0] == {"status": "ok", "text": text}
    node.nft("flush ruleset")
    explanation = explain(node, str(port), "--from", CLIENT4, cache=tmp_path)
    text = (
        f"no mapping of host port {port}/tcp of IPv4 is installed, and pod shop/{pod.host_end} was given it for 80/tcp"
    )
    assert (explanation.problems, explanation.last["remedy"]) == ([text], "hostport restore")


def test_a_cache_that_cannot_be_read_is_told(node: Node, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cni")
    strange = cache.directory / "results" / "strange"
    os.mkfifo(strange)
    explanation = explain(node, "9090", f"--cache-dir={cache.directory}")
    assert explanation.problems == ["no mapping of host port 9090/tcp is installed"]
    assert explanation.notes == [f"what {strange} says cannot be told: it is not a regular file"]
