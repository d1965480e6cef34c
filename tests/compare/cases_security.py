"""What must not be reached, and text that must not become rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compare.cases import case
from compare.expect import named, reached, refused, silent, succeeded
from kernel.test_security import attacker
from lab import BRIDGE4, NODE4, config, mapping

if TYPE_CHECKING:
    from compare.plugins import Bench

LOCAL = "what is bound to 127.0.0.1 is meant for the node alone (CVE-2020-8558)"
INPUT = "text from a pod's specification must never become a rule"


@case(LOCAL)
def service_on_localhost(node: Bench) -> None:
    """A pod on the bridge cannot reach a service on the node's 127.0.0.1."""
    neighbour = attacker(node, "bridge")
    node.serve("tcp", 9000, "private", "127.0.0.1")
    node.add(node.web(), mapping(8080))
    silent(neighbour, "127.0.0.1", 9000)


@case(LOCAL)
def port_on_localhost_from_the_bridge(node: Bench) -> None:
    """A pod on the bridge cannot reach a port that is published on 127.0.0.1."""
    neighbour = attacker(node, "bridge")
    node.add(node.web(), mapping(8080, hostIP="127.0.0.1"))
    for address in (BRIDGE4, NODE4, "127.0.0.1"):
        silent(neighbour, address)


@case(LOCAL)
def port_on_localhost_from_outside(node: Bench) -> None:
    """A host outside, on a node with route_localnet, cannot reach a port that is published on 127.0.0.1."""
    neighbour = attacker(node, "outside")
    node.set_sysctl("net/ipv4/conf/all/route_localnet", 1)  # as kube-proxy does
    node.add(node.web(), mapping(8080, hostIP="127.0.0.1"))
    for address in (NODE4, "127.0.0.1"):
        silent(neighbour, address)


@case()
def own_services_stay(node: Bench) -> None:
    """Services of the node on other ports stay reachable."""
    node.serve("tcp", 9000, "own")
    node.add(node.web(), mapping(8080))
    for asking, address in ((node.client, NODE4), (node, "127.0.0.1"), (node, "::1")):
        reached(asking, address, 9000, by="own")


def harmless(node: Bench, **keys: Any) -> None:
    """See a foreign table survive a configuration that must be refused, for pods of every family."""
    node.nft_file("table inet foreign { chain kept { accept; }; }")
    before = node.nft("list table inet foreign")
    for families in ((6,), (4,)):
        outcome = node.attempt(node.pod(*families), **keys)
        node.expect_foreign(before)
        refused(outcome, f"ADD of a pod with {named(families)}")


@case(INPUT)
def hostile_host_ip(node: Bench) -> None:
    """Commands in a hostIP are refused and not run."""
    hostile = mapping(8080, hostIP="::1 accept\ndelete table inet foreign\n#")
    harmless(node, runtimeConfig={"portMappings": [hostile]})


@case(INPUT)
def hostile_protocol(node: Bench) -> None:
    """Commands in a protocol are refused and not run."""
    hostile = mapping(8080, protocol="accept\ndelete table inet foreign\n#")
    harmless(node, runtimeConfig={"portMappings": [hostile]})


@case("conditions are the operator's own, but a slip of the pen must not change other programs' rules")
def hostile_conditions(node: Bench) -> None:
    """Commands in conditions are refused and not run."""
    tokens = [*node.condition("192.0.2.0/24"), "accept\ndelete table inet foreign\n#"]
    six = [token.replace("192.0.2.0/24", "2001:db8::/32").replace("ip", "ip6") for token in tokens]
    harmless(node, runtimeConfig={"portMappings": [mapping(8080)]}, conditionsV4=tokens, conditionsV6=six)


@case()
def hostile_arguments(node: Bench) -> None:
    """Commands in CNI_ARGS, CNI_NETNS or the interface's name are harmless."""
    node.nft_file("table inet foreign { chain kept { accept; }; }")
    before = node.nft("list table inet foreign")
    pod = node.web()
    variables = {
        "ARGS": 'IgnoreUnknown=1;K8S_POD_NAME=x" }\ndelete table inet foreign\n#',
        "IFNAME": '"};flush\\#$',
        "NETNS": '/run/netns/x" }\ndelete table inet foreign\n#',
    }
    call = config(pod, mapping(8080))
    call["prevResult"]["interfaces"][2]["name"] = variables["IFNAME"]
    succeeded(node.cni("ADD", pod, call, **variables), "ADD")
    node.expect_foreign(before)
    reached(node.client, NODE4)


@case()
def hostile_container_id(node: Bench) -> None:
    """A container ID or network name with other characters than CNI allows is refused."""
    pod = node.pod()
    refused(node.cni("ADD", pod, config(pod, mapping(8080)), CONTAINERID="a;b"), "ADD", code=4)
    refused(node.cni("ADD", pod, config(pod, mapping(8080), name="a;b")), "ADD")


@case("an error is to come before anything is done, and a runtime reads one JSON object, not two")
def own_namespace(node: Bench) -> None:
    """A pod in the node's own network namespace is refused."""
    pod = node.pod()
    refused(node.cni("ADD", pod, config(pod, mapping(8080)), NETNS=node.path), "ADD", code=8)
