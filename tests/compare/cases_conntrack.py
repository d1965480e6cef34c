"""Those who were talking already: their flows keep their old translation as long as they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.cases import case
from compare.expect import fall_short
from kernel.test_conntrack import PORT, Talker, flows
from kernel.test_conntrack_peers import PORT as PEERS_PORT
from kernel.test_conntrack_peers import Peer
from kernel.test_conntrack_tcp import Dialling, opened, towards_nobody
from kernel.test_sctp import raw, reaches
from lab import CLIENT4, NODE4, NODE6, QUIET, mapping
from resident import eventually
from tcp_connection import Conversation

if TYPE_CHECKING:
    from collections.abc import Callable

    from compare.plugins import Bench
    from lab import Namespace

UDP = mapping(PORT, 80, "udp")
BYSTANDER = "a pod's own talk with a server elsewhere has nothing to do with a host port of the same number"
GONE = "a pod's last client must not keep sending into the pod, or into nothing, after the mapping went or moved"


def prepare(node: Bench) -> None:
    """Have the node track connections before the plugin does, as one with services or a firewall."""
    node.nft_file(
        "table inet foreign { chain c { type nat hook prerouting priority -100; ct state new counter; };"
        " chain d { type filter hook output priority 0; ct state new counter; }; }"
    )
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")


def hears(talker: Talker, wanted: str) -> None:
    if (heard := talker.hears(timeout=1)) != wanted:
        fall_short(f"'{heard or 'nobody'}' answers, not '{wanted or 'nobody'}'")


@case()
def client_before_the_pod(node: Bench) -> None:
    """A UDP client that was faster than the pod gets its answer."""
    prepare(node)
    pod = node.web()
    for address in (NODE4, NODE6):
        with Talker(node.client, address) as talker:
            talker.say()
            node.add(pod, UDP)
            hears(talker, "web")
            node.delete(pod)


@case(GONE)
def client_after_the_pod(node: Bench) -> None:
    """A UDP client that keeps sending is not answered any more after DEL."""
    prepare(node)
    pod = node.web()
    node.add(pod, UDP)
    with Talker(node.client, NODE4) as talker:
        hears(talker, "web")
        node.delete(pod)
        hears(talker, "")


@case()
def client_of_two_pods(node: Bench) -> None:
    """A UDP client that keeps sending follows a port to its next pod."""
    prepare(node)
    old, new = node.web(name="old"), node.web(name="new")
    node.add(old, UDP)
    with Talker(node.client, NODE4) as talker:
        hears(talker, "old")
        node.delete(old)
        node.add(new, UDP)
        hears(talker, "new")


def keeps_flow(node: Bench, change: Callable[[], object], asking: Namespace) -> None:
    node.client.serve("udp", PORT, "server")
    asking.ask("udp", CLIENT4, PORT)
    before = flows(node)
    change()
    if not before or flows(node) != before:
        fall_short("the flow's entry is deleted")


@case(BYSTANDER)
def bystander_of_add(node: Bench) -> None:
    """A pod's UDP flow to a server elsewhere on the same port number survives an ADD."""
    prepare(node)
    pod, other = node.web(), node.web()
    keeps_flow(node, lambda: node.add(pod, UDP), other)


@case(BYSTANDER)
def bystander_of_del(node: Bench) -> None:
    """A pod's UDP flow to a server elsewhere on the same port number survives a DEL."""
    prepare(node)
    pod, other = node.web(), node.web()
    node.add(pod, UDP)
    keeps_flow(node, lambda: node.delete(pod), other)


@case("its mapping did not change")
def flow_of_another_address(node: Bench) -> None:
    """The UDP flow of a pod on one address survives the ADD of another pod on another address."""
    prepare(node)
    node.ip("addr add 192.0.2.9/24 dev uplink")
    item, two = node.web(name="one"), node.web(name="two")
    node.add(item, {**UDP, "hostIP": NODE4})
    with Talker(node.client, NODE4) as talker:
        hears(talker, "one")
        before = flows(node)
        node.add(two, {**UDP, "hostIP": "192.0.2.9"})
        if flows(node) != before:
            fall_short("the flow's entry is deleted")
        hears(talker, "one")


@case()
def established_tcp(node: Bench) -> None:
    """An established TCP connection survives ADD and DEL of other pods."""
    pod, other = node.pod(), node.web()
    node.add(pod, mapping(8080, 8888))
    with Conversation(node.client, NODE4, 8080, pod) as four, Conversation(node.client, NODE6, 8080, pod) as six:
        node.add(other, mapping(9090))
        node.delete(other)
        if not (four.goes_on() and six.goes_on()):
            fall_short("the connection is broken")


@case(GONE)
def established_tcp_after_the_pod(node: Bench) -> None:
    """An established TCP connection does not reach the pod any more after DEL."""
    pod = node.pod()
    node.add(pod, mapping(8080, 8888))
    with Conversation(node.client, NODE4, 8080, pod) as four, Conversation(node.client, NODE6, 8080, pod) as six:
        node.delete(pod)
        if not eventually(
            lambda: not (four.is_heard(QUIET) or six.is_heard(QUIET)), 4
        ):  # that can end after the answer
            fall_short("the pod still hears the client")


@case()
def established_tcp_of_the_node(node: Bench) -> None:
    """An established TCP connection to a service of the node's survives the ADD of a pod with its port."""
    prepare(node)
    pod = node.web()
    with Conversation(node.client, NODE4, 8080, node, 8080) as connection:
        node.add(pod, mapping(8080))
        if not connection.goes_on():
            fall_short("the connection is broken")


@case("a client that keeps to its source port keeps the entry alive with each of its retries")
def half_open_tcp(node: Bench) -> None:
    """A TCP client that goes on trying from one source port reaches the pod that gets the port."""
    prepare(node)
    pod = node.web()
    old = towards_nobody(node, NODE4)
    with Dialling(node.client, NODE4) as dialling:
        if not eventually(lambda: opened(node)):
            fall_short("there is no entry")
        node.nft(f"delete table {old}")
        node.add(pod, mapping(8080))
        if (heard := dialling.hears()) != "web":
            fall_short(f"'{heard or 'nobody'}' answers, not 'web'")


@case(GONE)
def sctp_client_of_two_pods(node: Bench) -> None:
    """An SCTP client that goes on trying from one source port follows a port to its next pod."""
    old, new = node.pod(), node.pod()
    node.add(old, mapping(8080, 80, "SCTP"))
    with raw(node.client, NODE4) as outside, raw(old, NODE4) as first, raw(new, NODE4) as second:
        if not reaches(outside, NODE4, first):
            fall_short("the first pod hears nothing")
        node.delete(old)
        node.add(new, mapping(8080, 80, "SCTP"))
        if not eventually(lambda: reaches(outside, NODE4, second, 0.1), 2):
            fall_short("the second pod hears nothing")


@case("whoever talks with a WireGuard, SIP or game server that spoke first keeps its entry alive")
def peer_of_two_pods(node: Bench) -> None:
    """The peer of a pod that spoke first by UDP follows the port to its next pod."""
    node.nft_file(
        "table ip foreign { chain c { type nat hook postrouting priority srcnat;"
        " ip saddr 10.88.0.0/24 ip daddr 192.0.2.0/24 masquerade; }; }"
    )
    udp = mapping(PEERS_PORT, PEERS_PORT, "udp")
    old, new = node.pod(), node.pod()
    with Peer(node, 4) as peer:
        node.add(old, udp)
        peer.is_spoken_to(old)
        node.delete(old)
        peer.listens(new)
        node.add(new, udp)
        if not eventually(lambda: peer.reaches(new, 0.1), 2):
            fall_short("the next pod hears nothing")


@case()
def flow_of_the_node(node: Bench) -> None:
    """A UDP flow that the node opened from the port's number survives ADD and DEL."""
    prepare(node)
    pod = node.web()
    with Peer(node, 4) as peer:
        peer.is_spoken_to(node)
        node.add(pod, mapping(PEERS_PORT, 80, "udp"))
        node.delete(pod)
        if not peer.reaches(node):
            fall_short("the node hears nothing any more")
