from __future__ import annotations

from typing import TYPE_CHECKING, Self

import pytest
from conntrack_entries import crowd, identities
from lab import NODE4, NODE6, QUIET, Namespace, Node, Pod, config, ip, mapping
from resident import eventually
from tcp_connection import Conversation

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

PORT, SOURCE = 8080, 40000
RETRIES = 60  # seconds in which a client sends its SYN six times
FAMILY = pytest.mark.parametrize("node_address", [NODE4, NODE6], ids=["IPv4", "IPv6"])
CROWDED = pytest.mark.parametrize("entries", [0, 12_000], ids=["few-entries", "many-entries"])
NOBODY = {NODE4: "10.88.0.200", NODE6: "fd00:88::200"}


@pytest.fixture
def node(node: Node) -> Node:
    translate(node)
    return node


def translate(node: Node) -> None:
    """Have the node track and translate connections before the plugin does, and when nobody else does any more."""
    hooks = ("filter hook prerouting priority 0", "nat hook prerouting priority -100", "nat hook output priority -100")
    chains = "".join(f"chain c{n} {{ type {hook}; ct state new counter; }}\n" for n, hook in enumerate(hooks))
    node.nft_file(f"table inet foreign {{\n{chains}}}\n")


class Dialling:
    """A client that goes on trying to connect from one source port, and what it hears in the end."""

    def __init__(self, namespace: Namespace, address: str, port: int = PORT, source_port: int = SOURCE) -> None:
        self.socket: socket.socket = namespace.socket("tcp", address)
        self.socket.bind(("", source_port))
        self.socket.settimeout(0)
        self.socket.connect_ex((address, port))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def hears(self) -> str:
        self.socket.settimeout(RETRIES)
        try:
            return self.socket.recv(64).decode().split()[0]
        except OSError:
            return ""


def opened(node: Node, port: int = PORT) -> set[str]:
    return identities(node, "tcp", rf"dport={port}\b.*src=")


def towards_nobody(node: Node, address: str) -> str:
    """Have somebody else's rules send connections to the port to a pod that is not there; return the table."""
    to = f"[{NOBODY[address]}]" if ":" in address else NOBODY[address]
    family = "ip6" if ":" in address else "ip"
    rule = f"{family} daddr {address} tcp dport {PORT} dnat to {to}:80"
    # with no neighbour there, the client would soon be told that the host cannot be reached
    node.ip(f"neigh add {NOBODY[address]} lladdr 02:00:00:00:00:01 dev cni0 nud permanent")
    node.nft_file(f"table {family} old {{ chain c {{ type nat hook prerouting priority -90; {rule}; }}\n }}")
    return f"{family} old"


def collect(node: Node, pod: Pod) -> None:
    collected = node.cni("GC", None, config(pod) | {"cni.dev/valid-attachments": []})
    assert not collected.status, collected


def take_over(node: Node, pod: Pod) -> None:
    """Let a pod die, of which the test's sockets keep everything but the path, and another have its port."""
    ip(f"netns del {pod.name}")
    node.add(node.pod(), mapping(PORT))


@FAMILY
@CROWDED
def test_a_client_that_goes_on_trying_reaches_the_pod_that_gets_the_port(
    node: Node, node_address: str, entries: int
) -> None:
    crowd(node, entries)
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    old = towards_nobody(node, node_address)
    with Dialling(node.client, node_address) as dialling:
        assert eventually(lambda: len(opened(node)) == 1)
        node.nft(f"delete table {old}")
        node.add(pod, mapping(PORT))
        assert dialling.hears() == "web"


@FAMILY
@CROWDED
@pytest.mark.parametrize("given", [False, True], ids=["any-address", "given-address"])
def test_a_connection_ends_with_its_mapping(node: Node, node_address: str, entries: int, given: bool) -> None:
    crowd(node, entries)
    pod = node.pod()
    node.add(pod, mapping(PORT, 8888, hostIP=node_address if given else ""))
    with Conversation(node.client, node_address, PORT, pod) as connection:
        node.delete(pod)
        assert eventually(lambda: not opened(node))
        assert not connection.is_heard(QUIET)


@FAMILY
@pytest.mark.parametrize("way", [collect, take_over])
def test_a_connection_ends_with_a_mapping_that_gc_or_another_pod_removes(
    node: Node, node_address: str, way: Callable[[Node, Pod], None]
) -> None:
    pod = node.pod()
    node.add(pod, mapping(PORT, 8888))
    with Conversation(node.client, node_address, PORT, pod) as connection:
        way(node, pod)
        assert not opened(node)
        assert not connection.is_heard(QUIET)


@FAMILY
def test_connections_of_a_port_that_a_repeated_add_leaves_out_end(node: Node, node_address: str) -> None:
    pod = node.pod()
    node.add(pod, mapping(PORT, 8888), mapping(PORT + 1, 8889))
    with (
        Conversation(node.client, node_address, PORT, pod) as leaves,
        Conversation(node.client, node_address, PORT + 1, pod, 8889) as stays,
    ):
        node.add(pod, mapping(PORT + 1, 8889))
        assert not leaves.is_heard(QUIET)
        assert stays.goes_on()


@FAMILY
@CROWDED
def test_a_connection_to_the_nodes_own_service_survives_the_add_and_the_del_of_its_port(
    node: Node, node_address: str, entries: int
) -> None:
    crowd(node, entries)
    pod = node.pod()
    with Conversation(node.client, node_address, PORT, node, PORT) as connection:
        kept = opened(node)
        towards_nobody(node, node_address)
        with Dialling(node.client, node_address):
            assert eventually(lambda: len(opened(node)) == 2)
            node.add(pod, mapping(PORT))
            assert eventually(lambda: opened(node) == kept)
        node.delete(pod)
        assert opened(node) == kept
        assert connection.goes_on()


@FAMILY
def test_a_connection_through_another_pods_port_or_elsewhere_survives(node: Node, node_address: str) -> None:
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
    pod, other = node.pod(), node.pod()
    direct = other.ip6 if ":" in node_address else other.ip4
    node.add(other, mapping(PORT, 8888, hostIP=node_address))
    with (
        Conversation(node.client, node_address, PORT, other) as given,
        Conversation(node.client, direct, PORT, other, PORT) as routed,
    ):
        node.add(pod, mapping(PORT, 8888))
        node.delete(pod)
        assert given.goes_on()
        assert routed.goes_on()


def test_the_answered_beginning_of_a_connection_to_the_node_itself_is_left_alone(node: Node) -> None:
    node.nft_file(
        "table ip lossy { chain c { type filter hook prerouting priority -300; tcp flags & (syn|ack) == ack drop; }\n }"
    )
    pod = node.pod()
    with node.socket("tcp", NODE4) as listening:
        listening.bind(("", PORT))
        listening.listen()
        with Dialling(node.client, NODE4):
            assert eventually(lambda: identities(node, "tcp", rf"SYN_RECV .*dport={PORT}\b"))
            answered = identities(node, "tcp", rf"SYN_RECV .*dport={PORT}\b")
            towards_nobody(node, NODE4)
            with Dialling(node.client, NODE4, source_port=SOURCE + 1):
                assert eventually(lambda: len(opened(node)) == 2)
                node.add(pod, mapping(PORT))
                assert eventually(lambda: opened(node) == answered)
