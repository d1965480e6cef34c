from __future__ import annotations

import re
from typing import TYPE_CHECKING, Self

import pytest
from conntrack_entries import keep_for_long
from lab import CLIENT4, CLIENT6, NODE4, NODE6, PATIENCE, QUIET, Namespace, Node, config, mapping
from resident import eventually

if TYPE_CHECKING:
    import socket

OTHER4, OTHER6 = "192.0.2.9", "2001:db8::9"
PORT = 5353
FAMILY = pytest.mark.parametrize("node_address", [NODE4, NODE6], ids=["IPv4", "IPv6"])
HOST_IP = pytest.mark.parametrize("given", [False, True], ids=["any-address", "given-address"])
COUNT = pytest.mark.parametrize("count", [1, 17], ids=["one-port", "many-ports"])


@pytest.fixture
def node(node: Node) -> Node:
    """Have the node track and translate connections before the plugin does, as one with services or a firewall."""
    hooks = ("filter hook prerouting priority 0", "nat hook prerouting priority -100", "nat hook output priority -100")
    chains = "".join(f"chain c{n} {{ type {hook}; ct state new counter; }}\n" for n, hook in enumerate(hooks))
    node.nft_file(f"table inet foreign {{\n{chains}}}\n")
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
    node.ip(f"addr add {OTHER4}/24 dev uplink", f"addr add {OTHER6}/64 dev uplink nodad")
    keep_for_long(node)
    return node


class Talker:
    """A UDP client that keeps to one source port, so that all it sends to an address is one flow."""

    def __init__(self, namespace: Namespace, address: str, port: int = PORT) -> None:
        self._socket: socket.socket = namespace.socket("udp", address)
        self._socket.bind(("", 40000))
        self._server = (address, port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def say(self) -> None:
        self._socket.sendto(b"?", self._server)

    def hears(self, timeout: float = PATIENCE) -> str:
        """Say something, and return who answers."""
        self.say()
        self._socket.settimeout(timeout)
        try:
            return self._socket.recv(64).decode().split()[0]
        except TimeoutError:
            return ""

    def hears_nothing(self) -> bool:
        return not self.hears(timeout=QUIET)


def flows(node: Node, port: int = PORT) -> set[str]:
    """Return the identities of the tracked UDP flows to a port number."""
    query = ("-L", "-p", "udp", "--orig-port-dst", str(port), "-o", "id")
    listings = [node.run("conntrack", *query, "-f", family).stdout for family in ("ipv4", "ipv6")]
    return set(re.findall(r"\bid=\d+", "".join(listings)))


def udp(count: int = 1, host_ip: str = "", container_port: int = 53) -> list[dict[str, object]]:
    """Map ``PORT`` and further UDP ports."""
    return [mapping(PORT + n, container_port, "udp", hostIP=host_ip) for n in range(count)]


@FAMILY
@HOST_IP
@COUNT
def test_a_client_faster_than_the_pod_gets_its_answer(node: Node, node_address: str, given: bool, count: int) -> None:
    pod = node.pod()
    pod.serve("udp", 53, "web")
    with Talker(node.client, node_address) as talker:
        for _ in range(3):
            talker.say()
        assert eventually(lambda: len(flows(node)) == 1)
        node.add(pod, *udp(count, node_address if given else ""))
        assert talker.hears() == "web"


@pytest.mark.parametrize("node_address", [NODE4, NODE6, "127.0.0.1"])
def test_the_node_itself_faster_than_the_pod_gets_its_answer(node: Node, node_address: str) -> None:
    pod = node.pod()
    pod.serve("udp", 53, "web")
    with Talker(node, node_address) as talker:
        talker.say()
        assert eventually(lambda: len(flows(node)) == 1)
        node.add(pod, *udp())
        assert talker.hears() == "web"


@FAMILY
@HOST_IP
@COUNT
def test_a_removed_mapping_stops_for_a_client_that_keeps_sending(
    node: Node, node_address: str, given: bool, count: int
) -> None:
    pod = node.pod()
    pod.serve("udp", 53, "web")
    node.add(pod, *udp(count, node_address if given else ""))
    with Talker(node.client, node_address) as talker:
        assert talker.hears() == "web"
        node.delete(pod)
        assert talker.hears_nothing()


@FAMILY
def test_a_mapping_removed_by_gc_stops_as_well(node: Node, node_address: str) -> None:
    pod = node.pod()
    pod.serve("udp", 53, "web")
    node.add(pod, *udp())
    with Talker(node.client, node_address) as talker:
        assert talker.hears() == "web"
        collected = node.cni("GC", None, config(pod) | {"cni.dev/valid-attachments": []})
        assert not collected.status, collected
        assert talker.hears_nothing()


@FAMILY
@HOST_IP
@pytest.mark.parametrize("dead_holder", [False, True], ids=["after-DEL", "from-the-dead"])
def test_a_port_that_moved_to_another_pod_is_followed(
    node: Node, node_address: str, given: bool, dead_holder: bool
) -> None:
    mappings = udp(host_ip=node_address if given else "")
    old, new = node.pod(), node.pod()
    old.serve("udp", 53, "old")
    new.serve("udp", 53, "new")
    node.add(old, *mappings)
    with Talker(node.client, node_address) as talker:
        assert talker.hears() == "old"
        if dead_holder:
            old.remove()
        else:
            node.delete(old)
        talker.say()
        node.add(new, *mappings)
        assert talker.hears() == "new"


@FAMILY
def test_a_repeated_add_moves_a_port_to_another_container_port(node: Node, node_address: str) -> None:
    pod = node.pod()
    pod.serve("udp", 53, "old")
    pod.serve("udp", 54, "new")
    node.add(pod, *udp())
    with Talker(node.client, node_address) as talker:
        assert talker.hears() == "old"
        node.add(pod, *udp(container_port=54))
        assert talker.hears() == "new"
        node.add(pod, mapping(8080))
        assert talker.hears_nothing()


@FAMILY
def test_a_dead_pods_port_does_not_lead_into_the_next_pod_with_its_address(node: Node, node_address: str) -> None:
    dead = node.pod()
    dead.serve("udp", 53, "dead")
    node.add(dead, *udp())
    with Talker(node.client, node_address) as talker:
        assert talker.hears() == "dead"
        dead.remove()
        heir = node.pod(addresses=dead.addresses, gateways=["10.88.0.1", "fd00:88::1"])
        heir.serve("udp", 53, "heir")
        node.add(heir, mapping(8080))
        assert talker.hears_nothing()


@HOST_IP
@COUNT
@pytest.mark.parametrize("version", [4, 6])
def test_flows_of_bystanders_on_the_same_port_number_survive(node: Node, given: bool, count: int, version: int) -> None:
    server, host_ip, other = (CLIENT4, NODE4, OTHER4) if version == 4 else (CLIENT6, NODE6, OTHER6)
    pod, neighbour = node.pod(version), node.pod(version)
    its = neighbour.ip4 if version == 4 else neighbour.ip6
    own_listing = pod.ip4 if version == 4 else pod.ip6
    node.client.serve("udp", PORT, "server")
    neighbour.serve("udp", PORT, "neighbour")
    pod.serve("udp", PORT, "pod")
    bystanders: list[tuple[Namespace, str]] = [
        (pod, server),
        (neighbour, server),
        (node, server),
        (node.client, its),
        (node.client, own_listing),
    ]
    if given:
        node.serve("udp", PORT, "node", other)
        bystanders.append((node.client, other))
    for namespace, address in bystanders:
        namespace.ask("udp", address, PORT)
    before = flows(node)
    assert len(before) == len(bystanders)
    node.add(pod, *udp(count, host_ip if given else "", PORT))
    # no bystander speaks in the meantime: an entry that is there is the one that was there
    assert flows(node) == before
    node.delete(pod)
    assert flows(node) == before


@FAMILY
def test_a_flow_of_another_pods_mapping_on_a_given_address_survives(node: Node, node_address: str) -> None:
    specific, general = node.pod(), node.pod()
    specific.serve("udp", 53, "specific")
    general.serve("udp", 53, "general")
    node.add(specific, *udp(host_ip=node_address))
    with Talker(node.client, node_address) as talker:
        assert talker.hears() == "specific"
        before = flows(node)
        node.add(general, *udp())
        assert flows(node) == before
        node.delete(general)
        assert flows(node) == before
        assert talker.hears() == "specific"


@FAMILY
def test_a_flow_moves_from_the_wildcard_to_the_given_address_and_back(node: Node, node_address: str) -> None:
    specific, general = node.pod(), node.pod()
    specific.serve("udp", 53, "specific")
    general.serve("udp", 53, "general")
    node.add(general, *udp())
    with Talker(node.client, node_address) as talker:
        assert talker.hears() == "general"
        node.add(specific, *udp(host_ip=node_address))
        assert talker.hears() == "specific"
        node.delete(specific)
        assert talker.hears() == "general"
