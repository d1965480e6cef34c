"""Whose a port is: taken ports, pods that are gone, and what DEL removes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.cases import case
from compare.expect import reached, refused, silent, succeeded
from lab import NODE4, mapping

if TYPE_CHECKING:
    from compare.plugins import Bench
    from lab import Pod

TAKEN = "of two containers on one port only one can be reached; the person who starts the second wants to know"
CRASHED = "a runtime that crashed, or a node that lost power to it, never calls DEL for its old pods"


@case(TAKEN)
def taken_port(node: Bench) -> None:
    """A port that another pod holds is refused, by its number."""
    node.add(node.web(name="first"), mapping(8080))
    refused(node.attempt(node.web(name="second"), mapping(8080)), "ADD", "8080")


@case(TAKEN)
def taken_port_names_its_holder(node: Bench) -> None:
    """The refusal of a taken port names the container that holds it."""
    first = node.web(name="first")
    node.add(first, mapping(8080))
    refused(node.attempt(node.web(name="second"), mapping(8080)), "ADD", first.id[:12])


@case()
def first_keeps_a_taken_port(node: Bench) -> None:
    """A pod keeps its port when another asks for it, and after the other's DEL."""
    second = node.web(name="second")
    node.add(node.web(name="first"), mapping(8080))
    node.attempt(second, mapping(8080))
    reached(node.client, NODE4, by="first")
    node.delete(second)
    reached(node.client, NODE4, by="first")


@case(TAKEN)
def second_gets_nothing_half(node: Bench) -> None:
    """A pod that does not get one of its ports has none of the others open."""
    node.add(node.web(name="first"), mapping(8080))
    node.attempt(node.web(name="second"), mapping(9001), mapping(9002, 80, "udp"), mapping(8080))
    silent(node.client, NODE4, 9001)
    silent(node.client, NODE4, 9002, protocol="udp")


@case()
def port_is_free_after_del(node: Bench) -> None:
    """After a pod's DEL the next one gets its port."""
    first = node.web(name="first")
    node.add(first, mapping(8080))
    node.delete(first)
    node.add(node.web(name="second"), mapping(8080))
    reached(node.client, NODE4, by="second")


@case(CRASHED)
def dead_holder(node: Bench) -> None:
    """The port of a pod that is gone without a DEL goes to the next that asks."""
    dead = node.web(name="dead")
    node.add(dead, mapping(8080))
    dead.remove()
    node.add(node.web(name="next"), mapping(8080))
    reached(node.client, NODE4, by="next")


@case(CRASHED)
def late_del(node: Bench) -> None:
    """The late DEL of the pod that is gone leaves the next one's port."""
    dead = node.web(name="dead")
    node.add(dead, mapping(8080))
    dead.remove()
    node.add(node.web(name="next"), mapping(8080))
    node.delete(dead)
    reached(node.client, NODE4, by="next")


@case("a port of a pod that is gone must not open another pod, whose owner never asked for it")
def reused_address(node: Bench) -> None:
    """The ports of a pod that is gone without a DEL do not lead to the next pod with its address."""
    dead = node.web(name="dead")
    node.add(dead, mapping(8080))
    dead.remove()
    heir = node.web(name="heir", addresses=dead.addresses, gateways=["10.88.0.1", "fd00:88::1"])
    node.add(heir, mapping(9090))
    reached(node.client, NODE4, 9090, by="heir")
    silent(node.client, NODE4, 8080)


@case()
def late_del_and_reused_address(node: Bench) -> None:
    """The late DEL of a pod that is gone leaves the ports of the next pod with its address."""
    dead = node.web(name="dead")
    node.add(dead, mapping(8080))
    dead.remove()
    heir = node.web(name="heir", addresses=dead.addresses, gateways=["10.88.0.1", "fd00:88::1"])
    node.add(heir, mapping(9090))
    node.delete(dead)
    reached(node.client, NODE4, 9090, by="heir")


@case()
def repeated_add(node: Bench) -> None:
    """A repeated ADD is removed by one DEL."""
    pod = node.web()
    for _ in range(2):
        node.add(pod, mapping(8080))
    reached(node.client, NODE4)
    node.delete(pod)
    silent(node.client, NODE4)


@case("the runtime's last word counts")
def repeated_add_with_another_port(node: Bench) -> None:
    """A repeated ADD with another port closes the first one."""
    pod = node.web()
    node.add(pod, mapping(8080))
    node.add(pod, mapping(9090))
    reached(node.client, NODE4, 9090)
    silent(node.client, NODE4, 8080)


@case("a container can be on two networks, and be taken from one of them")
def two_networks_of_one_container(node: Bench) -> None:
    """DEL on one network leaves the ports of the same container on another."""
    pod = node.web()
    node.add(pod, mapping(9090), name="another")
    node.add(pod, mapping(8080), prevResult={"cniVersion": "1.1.0", "ips": [{"address": _second_address(pod)}]})
    node.delete(pod)
    silent(node.client, NODE4, 8080)
    reached(node.client, NODE4, 9090)


def _second_address(pod: Pod) -> str:
    pod.ip("addr add 10.88.0.201/24 dev eth0")
    return "10.88.0.201/24"


@case()
def one_port_on_two_networks(node: Bench) -> None:
    """One container asks for one port on each of its two networks, as podman does for it."""
    pod = node.web()
    node.add(pod, mapping(8080))
    second = {"cniVersion": "1.1.0", "ips": [{"address": _second_address(pod)}]}
    succeeded(node.cni("ADD", pod, node.arguments(pod, name="another", prevResult=second), IFNAME="eth1"), "ADD")
    reached(node.client, NODE4)
