from __future__ import annotations

import re

import pytest
from kernel.test_conntrack import Talker, flows
from kernel.test_packets import set_bridge_nf
from lab import BRIDGE4, BRIDGE6, CLIENT4, CLIENT6, NODE4, NODE6, Node, Pod, mapping

SERVICE4, SERVICE6 = "10.96.0.1", "fd00:96::1"
ADDRESSES = {4: (NODE4, CLIENT4, BRIDGE4, SERVICE4), 6: (NODE6, CLIENT6, BRIDGE6, SERVICE6)}
FAMILY = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
COUNT = pytest.mark.parametrize("count", [1, 17], ids=["one-port", "many-ports"])
PORT = 5353
ZONE = 7


@pytest.fixture
def node(node: Node) -> Node:
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
    return node


@pytest.fixture
def pod(node: Node) -> Pod:
    """Serve a pod under a service address as well, which a table of somebody else's translates."""
    pod = node.pod()
    for protocol, port in (("tcp", 80), ("udp", 53)):
        pod.serve(protocol, port, "web")
    rules = "".join(
        f"{daddr} tcp dport 443 dnat {to}:80; {daddr} udp dport {PORT} dnat {to}:53; "
        for daddr, to in (
            (f"ip daddr {SERVICE4}", f"ip to {pod.ip4}"),
            (f"ip6 daddr {SERVICE6}", f"ip6 to [{pod.ip6}]"),
        )
    )
    hooks = (("prerouting", "prerouting"), ("output", "output"))
    chains = "".join(f"chain {name} {{ type nat hook {hook} priority -100; {rules}}}\n" for name, hook in hooks)
    node.nft_file(f"table inet services {{\n{chains}}}\n")
    return pod


@FAMILY
@pytest.mark.parametrize("masq_all", [False, True], ids=["snat", "masqAll"])
@pytest.mark.parametrize("bridge_nf", [0, 1])
def test_connections_to_a_service_keep_their_source_when_its_pod_gets_a_host_port(
    node: Node, pod: Pod, family: int, masq_all: bool, bridge_nf: int
) -> None:
    set_bridge_nf(node, bridge_nf)
    neighbour = node.pod()
    host, client, bridge, service = ADDRESSES[family]
    asking = {client: node.client}
    if bridge_nf:  # else the answer does not pass the node
        asking[neighbour.ip4 if family == 4 else neighbour.ip6] = neighbour

    def all_keep_their_source() -> bool:
        return all(peer.ask("tcp", service, 443) == f"web {source}" for source, peer in asking.items())

    assert all_keep_their_source()
    node.add(pod, mapping(8080), masqAll=masq_all)
    assert all_keep_their_source()
    assert neighbour.ask("tcp", host, 8080) == f"web {bridge}"
    assert node.client.ask("tcp", host, 8080) == f"web {bridge if masq_all else client}"
    assert all_keep_their_source()
    node.delete(pod)
    assert all_keep_their_source()


@FAMILY
@pytest.mark.parametrize("repeated", [mapping(PORT, 53, "udp"), mapping(8080)], ids=["same-port", "other-port"])
def test_a_udp_flow_to_a_service_survives_add_and_del_of_a_host_port_with_its_number(
    node: Node, pod: Pod, family: int, repeated: dict[str, object]
) -> None:
    with Talker(node.client, ADDRESSES[family][3]) as talker:
        assert talker.hears() == "web"
        service = flows(node)
        assert len(service) == 1
        node.add(pod, mapping(PORT, 53, "udp"))
        assert flows(node) == service
        with Talker(node.client, ADDRESSES[7 - family if False else family][0]) as other:
            pass
        node.add(pod, repeated)
        assert flows(node) == service
        node.delete(pod)
        assert flows(node) == service
        assert other
