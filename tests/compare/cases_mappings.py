"""What the plugin makes of the mappings: their keys, and values that are wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.cases import case
from compare.expect import named, reached, refused, silent
from lab import NODE4, NODE6, mapping

if TYPE_CHECKING:
    from compare.plugins import Bench

CRI = "kubelets send host port 0 for every container port without one, and the CRI says that it means unspecified"


@case()
def capitalised_keys(node: Bench) -> None:
    """The keys of a mapping are known in any case, as containerd sends them."""
    pod = node.web()
    node.add(pod, {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""})
    reached(node.client, NODE4)


@case("the CRI itself writes TCP, UDP and SCTP")
def upper_case_protocol(node: Bench) -> None:
    """A protocol in capitals is known."""
    pod = node.web()
    node.add(pod, mapping(8080, protocol="TCP"), mapping(8080, protocol="UDP"))
    for protocol in ("tcp", "udp"):
        reached(node.client, NODE4, protocol=protocol)


@case("tcp is what a port means without a protocol in Kubernetes, Docker and podman")
def missing_protocol(node: Bench) -> None:
    """A mapping without a protocol is TCP."""
    pod = node.web()
    node.add(pod, {"hostPort": 8080, "containerPort": 80})
    reached(node.client, NODE4)


@case(CRI)
def host_port_0_alone(node: Bench) -> None:
    """Host port 0 alone maps nothing and fails nothing."""
    pod = node.web()
    node.add(pod, mapping(0), mapping(0, 81, "udp"))
    node.delete(pod)


@case(CRI)
def host_port_0_among_others(node: Bench) -> None:
    """Host port 0 among others leaves the others mapped."""
    pod = node.web()
    node.add(pod, mapping(0), mapping(8080), mapping(0, 81, "udp"))
    reached(node.client, NODE4)


@case(CRI)
def host_port_0_on_del(node: Bench) -> None:
    """DEL with a host port 0 removes the others."""
    pod = node.web()
    node.add(pod, mapping(8080))
    node.delete(pod, runtimeConfig={"portMappings": [mapping(0), mapping(8080)]})
    silent(node.client, NODE4)


@case()
def negative_host_port(node: Bench) -> None:
    """A negative host port is refused."""
    refused(node.attempt(node.pod(), mapping(-1)), "ADD", "-1")


@case()
def container_port_0(node: Bench) -> None:
    """Container port 0 is refused."""
    refused(node.attempt(node.pod(), mapping(8080, 0)), "ADD")


@case()
def too_large_host_port(node: Bench) -> None:
    """Host port 70000 is refused, by its number."""
    refused(node.attempt(node.pod(), mapping(70000)), "ADD", "70000")


@case("a port that reaches another place than asked for is worse than an error")
def too_large_container_port(node: Bench) -> None:
    """Container port 65616 is refused, and not cut to 80."""
    refused(node.attempt(node.web(), mapping(8080, 65616)), "ADD", "65616")


@case()
def unknown_protocol(node: Bench) -> None:
    """An unknown protocol is refused."""
    refused(node.attempt(node.pod(), mapping(8080, protocol="carrier-pigeon")), "ADD", "carrier-pigeon")


@case("a mapping that is silently dropped, or opened to everybody, is worse than an error")
def wrong_host_ip(node: Bench) -> None:
    """The hostIP "abcd" is refused by its value, whatever the pod's families."""
    for families in ((4,), (6,), (4, 6)):
        refused(
            node.attempt(node.pod(*families), mapping(8080, hostIP="abcd")),
            f"ADD of a pod with {named(families)}",
            "abcd",
        )


@case("CNI has no half ADD: after an error nothing of the pod is to be on the node")
def bad_among_good(node: Bench) -> None:
    """A bad mapping after good ones installs none of them."""
    pod = node.web()
    for bad in (mapping(70000), mapping(8081, protocol="carrier-pigeon")):
        refused(node.attempt(pod, mapping(8080), bad), "ADD")
        for address in (NODE4, NODE6):
            silent(node.client, address)


@case("only one of the two can be reached, and nobody asked for just one")
def two_container_ports(node: Bench) -> None:
    """One host port for two container ports is refused."""
    refused(node.attempt(node.pod(), mapping(8080, 80), mapping(8080, 81)), "ADD", "8080")
