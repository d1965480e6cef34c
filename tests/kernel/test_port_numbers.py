from __future__ import annotations

import pytest
from lab import NODE4, Node, config, mapping


@pytest.mark.parametrize("port", [6, 17, 132])
def test_host_ports_with_the_number_of_a_protocol_are_ports_like_others(node: Node, port: int) -> None:
    absent, holder, many = node.pod(4), node.pod(4), node.pod(4)
    node.add(absent, mapping(port))
    absent.remove()
    assert "takes over" in node.add(holder, mapping(port), mapping(port, 53, "udp")).stderr
    refused = node.cni("ADD", many, config(many, mapping(port)))
    assert (refused.code, f"host port {port}/tcp is taken" in refused.msg) == (100, True)
    node.delete(holder)
    node.add(many, mapping(port), *(mapping(8000 + number) for number in range(20)))
    node.delete(many)
    assert not node.footprint(many)
    node.add(holder, mapping(port, hostIP=NODE4))
    keys = {"cniVersion": "1.1.0", "name": "pods", "cni.dev/valid-attachments": []}
    assert node.cni("GC", None, keys).status == 0
    assert not node.footprint(holder)
