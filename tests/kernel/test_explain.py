from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from cache import Cache
from explaining import explain
from lab import BRIDGE4, CLIENT4, LAUNCHER, NODE4, NODE6, Namespace, Node, Pod, key_of, mapping

if TYPE_CHECKING:
    from pathlib import Path

OUTSIDE4 = [
    "prerouting: fib daddr type local goto dispatch",
    "dispatch: ip daddr != 127.0.0.0/8 update @local_ip4 { ip daddr }",
    "dispatch: meta nfproto . meta l4proto . th dport vmap @hostports",
    "dnat: meta nfproto ipv4 tcp dport 8080 dnat ip to 10.88.0.2:80",
    "postrouting: ct status dnat ct original ip daddr @local_ip4 ip daddr vmap @pods_ip4",
]


def ready(node: Node, *families: int, **keys: object) -> Pod:
    """Add a pod with a server, and host port 8080 for it."""
    pod = node.pod(*(families or (4,)))
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080), args=None, **keys)
    return pod


def python(pod: Pod) -> str:
    del pod
    return sys.executable.rpartition("/")[2]


def test_everything_is_fine(node: Node) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.cni("ADD", pod, {**config_of(pod), "args": {}}, ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web")
    said = explain(node, "8080")
    assert said.status == 0
    assert [of["text"].partition(" (process")[0] for of in said.statements] == [
        "0.0.0.0:8080/tcp leads to 10.88.0.2:80, pod shop/web",
        f"the holder is alive: container {pod.id[:12]}",
    ]
