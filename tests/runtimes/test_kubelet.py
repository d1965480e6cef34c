from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import pytest
from dynamic_ports import given
from go_tools import TOOLS
from lab import NODE4, NODE6, Node, require
from runtimes.containerd import NEWEST, Containerd, mapped
from runtimes.host import Host
from runtimes.kubelet import Kubelet, answering

from cni_hostport.dynamic_ports import keys, pod_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def kubelet(newest_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    require((TOOLS / "kubelet").exists(), "needs a kubelet, built by tests/build-tools.sh")
    with Node() as node, Host(node) as host:
        containerd = Containerd(host, NEWEST, tmp_path_factory.mktemp("containerd"), newest_tools)
        yield Kubelet(containerd, tmp_path_factory.mktemp("kubelet"))


def _answers(node: Node, port: int, name: str) -> bool:
    return all(
        not asking.is_silent("tcp", address, port) and asking.ask("tcp", address, port) == name
        for asking, address in ((node.client, NODE4), (node.client, NODE6), (node, "127.0.0.1"))
    )


def test_a_pod_with_a_host_port_and_two_unspecified_ones_is_reached_on_the_one_port_only(kubelet: Kubelet) -> None:
    node = kubelet.containerd.host.node
    kubelet.add(
        "web",
        {"containerPort": 80, "hostPort": 8080},
        {"containerPort": 81, "hostPort": 0},
        {"containerPort": 82},
    )  # fmt: skip
    kubelet.wait_for(lambda: _answers(node, 8080, "web"))
    assert kubelet.sent_ports("web") == [8080, 0, 0]
    assert mapped(node) == ["ipv4 . tcp . 8080", "ipv6 . tcp . 8080"]

    kubelet.remove("web")
    kubelet.wait_for(lambda: "dnat-" not in node.ruleset())
    assert node.client.is_silent("tcp", NODE4, 8080)


def test_pods_removed_while_containerd_is_down_are_unmapped_when_it_is_back(kubelet: Kubelet) -> None:
    node, pods = kubelet.containerd.host.node, {"stays": 8081, "leaves": 8082, "goes": 8083}
    for name, port in pods.items():
        kubelet.add(name, {"containerPort": 80, "hostPort": port})
    for name, port in pods.items():
        kubelet.wait_for(partial(_answers, node, port, name))

    kubelet.containerd.kill()
    kubelet.remove("leaves")
    kubelet.remove("goes")
    for name, port in pods.items():
        kubelet.wait_for(partial(_answers, node, port, name))

    kubelet.containerd.start()
    kubelet.wait_for(lambda: mapped(node) == ["ipv4 . tcp . 8081", "ipv6 . tcp . 8081"])
    kubelet.wait_for(lambda: _answers(node, 8081, "stays"))
    assert node.client.is_silent("tcp", NODE4, 8082)


def test_a_static_pod_reads_its_dynamic_port_before_it_serves(kubelet: Kubelet) -> None:
    node = kubelet.containerd.host.node
    spec = answering("web")
    tells = "test -s /told/dynamic-ports.json && exec nc -ll -p 80 -e cat /told/dynamic-ports.json"
    uid = {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    mount = {"name": "hostport", "mountPath": "/told", "subPathExpr": "$(POD_UID)", "readOnly": True}
    spec["containers"][0] |= {"command": ["/bin/busybox", "sh", "-c", tells], "env": [uid], "volumeMounts": [mount]}
    spec["volumes"] = [{"name": "hostport", "hostPath": {"path": pod_files.DIRECTORY, "type": "DirectoryOrCreate"}}]
    metadata = {"name": "game", "namespace": "test", "annotations": {keys.REQUEST: "80"}}
    kubelet.apply("game", json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))
    kubelet.wait_for(lambda: given(node))
    [ports] = given(node).values()
    kubelet.wait_for(lambda: not node.client.is_silent("tcp", NODE4, ports["80/tcp"]))
    told = {"80/tcp": {"hostPort": ports["80/tcp"]}}
    assert json.loads(node.client.ask("tcp", NODE4, ports["80/tcp"])) == told
    kubelet.remove("game")
    kubelet.wait_for(lambda: not given(node))
