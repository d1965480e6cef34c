from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from explanation import explain
from lab import CLIENT4, Node, Pod, mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

ETH_P_ALL = 3
CANNOT_LISTEN = "whether anything listens on 10.88.0.2:80/tcp cannot be seen"


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with host port 8080, and no server that can be seen."""
    made = node.pod(4)
    node.add(made, mapping(8080))
    return made


def address_gone(pod: Pod) -> None:
    pod.ip("addr flush dev eth0")


@pytest.fixture
def netstack(pod: Pod) -> Iterator[Pod]:
    """The pod as gVisor makes it: a program takes the interface's packets, and has its addresses."""
    address_gone(pod)
    with pod.inside():
        taking = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with taking:
        taking.bind(("eth0", ETH_P_ALL))
        yield pod


@pytest.fixture
def machine(pod: Pod) -> Pod:
    """The pod as Kata Containers makes it: all goes on to a tap device, which a virtual machine has."""
    pod.run("ip", "tuntap", "add", "tap0_kata", "mode", "tap")
    for local, present in (("eth0", "tap0_kata"), ("tap0_kata", "eth0")):
        pod.ip(f"link set {local} up")
        pod.run("tc", "qdisc", "add", "dev", local, "handle", "ffff:", "ingress")
        match = "parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev"
        pod.run("tc", "filter", "add", "dev", local, *match.split(), present)
    return pod


def test_a_pod_with_a_network_stack_in_a_process(node: Node, netstack: Pod) -> None:
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.notes == [
        f"whether container {netstack.id} has 10.88.0.2 cannot be seen: eth0 has no addresses",
        CANNOT_LISTEN,
        f"how container {netstack.id} routes its answers cannot be seen: they are taken to come in on cni0",
    ]
    assert (explanation.status, explanation.answer) == (0, f"(in on cni0) leaves for {CLIENT4} by uplink")


def test_a_pod_in_a_virtual_machine(node: Node, machine: Pod) -> None:
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.notes[:1] == [CANNOT_LISTEN]
    assert f"ok: eth0 of container {machine.id} is up and has 10.88.0.2" in [
        f"{statement['status']}: {statement['text']}" for statement in explanation.statements
    ]
    assert (explanation.status, explanation.answer) == (0, f"(in on cni0) leaves for {CLIENT4} by uplink")


def test_a_pod_in_a_virtual_machine_on_macvtap(node: Node, pod: Pod) -> None:
    pod.ip("link add link eth0 name tap0_kata type macvtap mode bridge")
    address_gone(pod)
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert CANNOT_LISTEN in explanation.notes
    assert explanation.status == 0


def test_a_rule_that_drops_answers_is_a_problem_there_too(node: Node, netstack: Pod) -> None:
    node.nft_file("table inet firewall { chain f { type filter hook forward priority 0; ct direction reply drop; }; }")
    [problem] = explain(node, "8080", "--from", CLIENT4).problems
    assert problem == "the pod's answer (in on cni0) is dropped by a rule in inet firewall f"
    assert netstack.id


def test_a_pod_that_lost_its_addresses_without_such_a_program(node: Node, pod: Pod) -> None:
    address_gone(pod)
    assert explain(node, "8080").problems == [
        f"eth0 of container {pod.id} does not have the address 10.88.0.2",
        "nothing listens on 10.88.0.2:80/tcp in the pod",
    ]


def test_a_pod_with_a_sniffer_or_a_tunnel_is_an_ordinary_one(node: Node, pod: Pod) -> None:
    pod.run("ip", "tuntap", "add", "tun0", "mode", "tun")
    with pod.inside():
        sniffing = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with sniffing:
        sniffing.bind(("eth0", ETH_P_ALL))
        assert explain(node, "8080").problems == ["nothing listens on 10.88.0.2:80/tcp in the pod"]
