from __future__ import annotations

import pytest
from conntrack_entries import keep_for_long
from kernel.test_conntrack import Talker, flows
from kernel.test_packets import set_bridge_nf
from lab import BRIDGE4, BRIDGE6, CLIENT4, CLIENT6, NODE4, NODE6, Node, Pod, mapping
from resident import eventually

SERVICE4, SERVICE6 = "10.96.0.1", "fd00:96::1"
ADDRESSES = {4: (NODE4, CLIENT4, BRIDGE4, SERVICE4), 6: (NODE6, CLIENT6, BRIDGE6, SERVICE6)}
FAMILY = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
COUNT = pytest.mark.parametrize("count", [1, 17], ids=["one-port", "many-ports"])
PORT, ZONE = 5353, 7


@pytest.fixture
def node(node: Node) -> Node:
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
    keep_for_long(node)
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


def udp(count: int) -> list[dict[str, object]]:
    return [mapping(PORT + n, 53, "udp") for n in range(count)]


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
@COUNT
def test_a_udp_flow_to_a_service_survives_every_add_and_the_del_of_a_host_port_with_its_number(
    node: Node, pod: Pod, family: int, count: int
) -> None:
    host, _, _, service = ADDRESSES[family]
    with Talker(node.client, service) as talker:
        assert talker.hears() == "web"
    bystander = flows(node)
    assert len(bystander) == 1
    for _ in range(2):
        node.add(pod, *udp(count))
        assert flows(node) == bystander
    with Talker(node.client, host) as talker:
        assert talker.hears() == "web"
    both = flows(node)
    assert len(both) == 2
    node.add(pod, *udp(count))
    assert flows(node) == both
    node.delete(pod)
    assert flows(node) == bystander


@FAMILY
@COUNT
def test_a_repeated_identical_add_keeps_the_pods_own_flow(node: Node, family: int, count: int) -> None:
    pod = node.pod()
    pod.serve("udp", 53, "web")
    node.add(pod, *udp(count))
    with Talker(node.client, ADDRESSES[family][0]) as talker:
        assert talker.hears() == "web"
        before = flows(node)
        assert len(before) == 1
        node.add(pod, *udp(count))
        assert flows(node) == before
        assert talker.hears() == "web"
        assert flows(node) == before


@FAMILY
@COUNT
def test_entries_of_another_conntrack_zone_are_left_alone(node: Node, family: int, count: int) -> None:
    pod = node.pod()
    host, client, _, _ = ADDRESSES[family]
    own_listing = pod.ip4 if family == 4 else pod.ip6

    def track(answering: str, *zone: str) -> set[str]:
        before = flows(node)
        entry = (
            *("-I", "-p", "udp", "-t", "300", "-s", client, "-d", host, "--sport", "40000", "--dport", str(PORT)),
            *("--reply-src", answering, "--reply-dst", client, "--reply-port-src", "53", "--reply-port-dst", "40000"),
        )
        node.run("conntrack", *entry, *zone)
        return flows(node) - before

    zones = track(host, "--zone", str(ZONE)) | track(own_listing, "--zone", str(ZONE + 1))
    twin = track(own_listing)
    assert len(zones | twin) == 3
    for _ in range(2):
        node.add(pod, *udp(count))
        assert flows(node) == zones | twin
    node.delete(pod)
    assert flows(node) == zones


@FAMILY
@pytest.mark.parametrize("bystander", ["a Service's address under IPVS", "an address that hostAddresses leaves out"])
def test_a_udp_flow_to_a_local_address_that_is_not_the_host_ports_survives(
    node: Node, family: int, bystander: str
) -> None:
    host, _, _, service = ADDRESSES[family]
    node.bridge("kube-ipvs0" if "IPVS" in bystander else "other", f"{service}/{32 if family == 4 else 128}")
    node.nft_file("table inet foreign { chain c { type filter hook prerouting priority 0; ct state new counter; }; }")
    keys = {} if "IPVS" in bystander else {"hostAddresses": [f"{host}/32" if family == 4 else f"{host}/128"]}
    for address in (service, host):
        with Talker(node.client, address) as talker:
            talker.say()
    assert eventually(lambda: len(flows(node)) == 2)
    node.add(node.pod(), *udp(1), **keys)
    kept = flows(node)
    assert len(kept) == 1
    with Talker(node.client, service) as talker:
        talker.say()
    assert flows(node) == kept
