"""Pods that spoke first: the node masquerades what they send, and their peers answer to the node's address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import pytest
from conntrack_entries import crowd, identities, keep_for_long
from kernel.test_conntrack_tcp import Dialling
from lab import CLIENT4, CLIENT6, NODE4, NODE6, PATIENCE, QUIET, Namespace, Node, Pod, config, ip, mapping
from resident import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

PORT, PEER_PORT = 51820, 40000
FAMILY = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
CROWDED = pytest.mark.parametrize("entries", [0, 12_000], ids=["few-entries", "many-entries"])
CLIENTS, NODES = {4: CLIENT4, 6: CLIENT6}, {4: NODE4, 6: NODE6}
UDP = mapping(PORT, PORT, "udp")


@pytest.fixture
def node(node: Node) -> Node:
    """Have the node masquerade what its pods send, as the plugin before this one in a chain does."""
    node.nft_file(
        "table inet foreign { chain c { type nat hook postrouting priority srcnat;"
        " ip saddr 10.88.0.0/24 ip daddr 192.0.2.0/24 masquerade;"
        " ip6 saddr fd00:88::/64 ip6 daddr 2001:db8::/64 masquerade; };"
        " chain d { type filter hook output priority 0; ct state new counter; }; }"
    )
    keep_for_long(node)
    return node


class Peer:
    """Somebody outside with whom pods talk by UDP from the host port's number."""

    def __init__(self, node: Node, family: int) -> None:
        self._node, self._address = node, NODES[family]
        self._family = family
        self._socket: socket.socket = node.client.socket("udp", CLIENTS[family])
        self._socket.bind(("", PEER_PORT))
        self._pods: dict[str, socket.socket] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._socket, *self._pods.values()):
            opened.close()

    def listens(self, pod: Namespace) -> None:
        """Open the pod's socket."""
        self._pods[pod.name] = pod.socket("udp", CLIENTS[self._family])
        self._pods[pod.name].bind(("", PORT))

    def is_spoken_to(self, pod: Namespace) -> None:
        """Have the pod speak, and see it come from the node."""
        self.listens(pod)
        self._pods[pod.name].sendto(b"first", (CLIENTS[self._family], PEER_PORT))
        self._socket.settimeout(PATIENCE)
        assert self._socket.recvfrom(64)[1][:2] == (self._address, PORT)

    def reaches(self, pod: Namespace, timeout: float = PATIENCE) -> bool:
        """Send something to the node's address, and tell whether the pod hears it."""
        self._socket.sendto(b"answer", (self._address, PORT))
        self._pods[pod.name].settimeout(timeout)
        try:
            return self._pods[pod.name].recv(64) == b"answer"
        except TimeoutError:
            return False


def flows(node: Node, protocol: str = "udp") -> set[str]:
    return identities(node, protocol, rf"dport={PEER_PORT}\b.*dport={PORT}\b")


def collect(node: Node, pod: Pod) -> None:
    collected = node.cni("GC", None, config(pod) | {"cni.dev/valid-attachments": []})
    assert not collected.status, collected


def die(_: Node, pod: Pod) -> None:
    """Go, but for what the test's sockets keep, so that only the next ADD finds out."""
    ip(f"netns del {pod.name}")


END = pytest.mark.parametrize("end", [Node.delete, collect, die], ids=["DEL", "GC", "take-over"])


@FAMILY
@CROWDED
@END
def test_the_peer_of_a_pod_that_spoke_first_follows_the_port_to_the_next_pod(
    node: Node, family: int, entries: int, end: Callable[[Node, Pod], object]
) -> None:
    crowd(node, entries)
    old, new = node.pod(), node.pod()
    with Peer(node, family) as peer:
        node.add(old, UDP)
        peer.is_spoken_to(old)
        assert peer.reaches(old)
        end(node, old)
        peer.listens(new)
        node.add(new, UDP)
        assert peer.reaches(new)


@FAMILY
def test_the_peer_of_a_pod_that_spoke_first_does_not_reach_it_after_del(node: Node, family: int) -> None:
    pod = node.pod()
    with Peer(node, family) as peer:
        node.add(pod, UDP)
        peer.is_spoken_to(pod)
        assert len(flows(node)) == 1
        node.delete(pod)
        assert not flows(node)
        assert not peer.reaches(pod, QUIET)


@FAMILY
@CROWDED
@pytest.mark.parametrize("given", [False, True], ids=["any-address", "given-address"])
def test_the_peer_of_a_pod_without_the_port_follows_it_to_the_pod_that_gets_it(
    node: Node, family: int, entries: int, given: bool
) -> None:
    crowd(node, entries)
    old, new = node.pod(), node.pod()
    with Peer(node, family) as peer:
        peer.is_spoken_to(old)
        peer.listens(new)
        node.add(new, {**UDP, "hostIP": NODES[family] if given else ""})
        assert eventually(lambda: peer.reaches(new, 0.1))


@FAMILY
def test_what_the_pod_itself_said_before_its_add_goes_on(node: Node, family: int) -> None:
    old, pod = node.pod(), node.pod()
    with Peer(node, family) as peer:
        peer.is_spoken_to(pod)
        own = flows(node)
        with old.socket("udp", CLIENTS[family]) as other:
            other.bind(("", PORT))
            node.client.serve("udp", PEER_PORT + 1, "server")
            other.sendto(b"?", (CLIENTS[family], PEER_PORT + 1))
            assert eventually(lambda: identities(node, "udp", rf"dport={PEER_PORT + 1}\b"))
            others = identities(node, "udp", rf"dport={PEER_PORT + 1}\b")
            node.add(pod, UDP)
            assert eventually(lambda: not others & identities(node, "udp", rf"dport={PEER_PORT + 1}\b"))
        assert flows(node) == own
        assert peer.reaches(pod)


@FAMILY
def test_flows_of_the_node_itself_from_the_ports_number_survive(node: Node, family: int) -> None:
    pod, stray = node.pod(), node.pod()
    with Peer(node, family) as peer:
        peer.is_spoken_to(node)
        own = flows(node)
        assert len(own) == 1
        with stray.socket("udp", CLIENTS[family]) as other:
            other.bind(("", PORT))
            other.sendto(b"?", (CLIENTS[family], PEER_PORT + 1))
            assert eventually(lambda: len(identities(node, "udp", f"dport={PEER_PORT + 1}")) == 1)
            node.add(pod, UDP)
            assert eventually(lambda: not identities(node, "udp", f"dport={PEER_PORT + 1}"))
        assert flows(node) == own
        node.delete(pod)
        assert flows(node) == own
        assert peer.reaches(node)


@FAMILY
def test_a_flow_of_the_pod_that_has_the_port_of_a_given_address_survives_an_add_for_any_address(
    node: Node, family: int
) -> None:
    specific, general = node.pod(), node.pod()
    with Peer(node, family) as peer:
        node.add(specific, {**UDP, "hostIP": NODES[family]})
        peer.is_spoken_to(specific)
        before = flows(node)
        node.add(general, UDP)
        node.delete(general)
        assert flows(node) == before
        assert peer.reaches(specific)


@FAMILY
def test_flows_in_a_zone_of_their_own_survive(node: Node, family: int) -> None:
    node.nft_file(
        "table inet zoned { chain c { type filter hook prerouting priority raw; iifname cni0 ct zone set 7; }; }"
    )
    old, pod = node.pod(), node.pod()
    with Peer(node, family), old.socket("udp", CLIENTS[family]) as other:
        other.bind(("", PORT))
        other.sendto(b"?", (CLIENTS[family], PEER_PORT))
        assert eventually(lambda: len(flows(node)) == 1)
        before = flows(node)
        node.add(pod, UDP)
        node.delete(pod)
        assert flows(node) == before


@FAMILY
def test_a_connection_that_the_pod_opened_ends_with_its_mapping(node: Node, family: int) -> None:
    pod = node.pod()
    node.add(pod, mapping(PORT, PORT))
    with node.client.socket("tcp", CLIENTS[family]) as listening:
        listening.bind(("", PEER_PORT))
        listening.listen()
        with Dialling(pod, CLIENTS[family], PEER_PORT, PORT):
            listening.settimeout(PATIENCE)
            listening.accept()[0].close()
            assert len(flows(node, "tcp")) == 1
            node.delete(pod)
            assert eventually(lambda: not flows(node, "tcp"))


@FAMILY
@CROWDED
def test_of_what_others_opened_from_the_ports_number_an_add_forgets_what_nobody_has_answered(
    node: Node, family: int, entries: int
) -> None:
    crowd(node, entries)
    pod, tries, talks = node.pod(), node.pod(), node.pod()
    nobody = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    with node.client.socket("tcp", CLIENTS[family]) as listening:
        listening.bind(("", PEER_PORT))
        listening.listen()
        with Dialling(talks, CLIENTS[family], PEER_PORT, PORT), Dialling(tries, nobody, PEER_PORT, PORT):
            assert eventually(lambda: len(flows(node, "tcp")) == 2)
            listening.settimeout(PATIENCE)
            with listening.accept()[0]:
                answered = identities(node, "tcp", rf"ESTABLISHED .*sport={PORT}\b")
                unanswered = flows(node, "tcp") - answered
                assert (len(answered), len(unanswered)) == (1, 1)
                node.add(pod, mapping(PORT))
                assert eventually(lambda: not unanswered & flows(node, "tcp"))  # its next try is another one
                assert answered <= flows(node, "tcp")
