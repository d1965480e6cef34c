"""Clients that were talking already: UDP keeps its old translation as long as they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.cases import case
from compare.expect import fall_short
from conversation import Conversation
from kernel.test_conntrack import PORT, Talker, flows
from lab import CLIENT4, NODE4, NODE6, mapping

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
    one, two = node.web(name="one"), node.web(name="two")
    node.add(one, {**UDP, "hostIP": NODE4})
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
