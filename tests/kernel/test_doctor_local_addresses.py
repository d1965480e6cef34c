from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import pytest
from doctor_node import Practice
from lab import CLIENT4, NODE4, NODE6, Node, mapping
from libcni_cache import CAPABLE

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Pod

CONDITION = {"conditionsV4": ["ip", "saddr", "203.0.113.0/24"]}


@pytest.fixture
def practice(node: Node, tmp_path: Path) -> Practice:
    return Practice(node, tmp_path)


def configured(practice: Practice, *mappings: dict[str, Any], families: tuple[int, ...] = (4,), **keys: Any) -> Pod:
    """Have a pod whose network configuration has further keys."""
    pod = practice.node.pod(*families)
    pod.serve("tcp", 80, "web")
    practice.node.add(pod, *mappings, **keys)
    practice.cache.add(pod, *mappings, plugin={**CAPABLE, **keys})
    return pod


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_program_on_a_mapped_port_gets_no_new_connections(practice: Practice, protocol: str) -> None:
    practice.node.serve(protocol, 2222, "node")
    pod = practice.running(mapping(2222, 80, protocol))
    pod.serve("udp", 80, "web")
    found = practice.finding()
    assert found.status == "note"
    assert " (process " in found.text
    assert found.text.endswith(
        f" listens on 0.0.0.0:2222/{protocol} and [::]:2222/{protocol}, where container {pod.id} has a host port"
    )
    assert found.meaning.startswith("New connections over IPv4 and IPv6 go to the pod.")
    assert practice.node.client.ask(protocol, NODE4, 2222) == f"web {CLIENT4}"


def test_a_resolver_on_an_address_of_its_own_is_hidden_too(practice: Practice) -> None:
    practice.node.serve("udp", 53, "resolver", "127.0.0.53")
    pod = configured(practice, mapping(53, 53, "udp"))
    pod.serve("udp", 53, "pod")
    assert " listens on 127.0.0.53:53/udp, " in practice.finding().text
    assert practice.node.ask("udp", "127.0.0.53", 53).startswith("pod ")


@pytest.mark.parametrize(
    ("address", "keys"),
    [
        ("::1", {}),
        ("127.0.0.53", {"hostIP": NODE4}),
        (NODE6, {"hostIP": NODE4}),
        (NODE6, {"hostIP": "0.0.0.0"}),
    ],
)
def test_a_program_where_the_mapping_does_not_answer_is_not_hidden(
    practice: Practice, address: str, keys: dict[str, Any]
) -> None:
    practice.node.serve("tcp", 2222, "node", address)
    practice.running(mapping(2222, **keys))
    assert practice.finds() == []
    assert practice.node.ask("tcp", address, 2222).startswith("node ")


def test_a_program_outside_of_the_host_addresses_is_not_hidden(practice: Practice) -> None:
    practice.node.serve("tcp", 2222, "node", "127.0.0.53")
    configured(practice, mapping(2222), hostAddresses=["192.0.2.0/24"])
    assert practice.finds() == []
    assert practice.node.ask("tcp", "127.0.0.53", 2222).startswith("node ")


@pytest.mark.parametrize(
    ("keys", "of_mapping", "which"),
    [
        ({}, {"hostIP": NODE4}, f" to {NODE4}"),
        ({"hostAddresses": ["192.0.2.0/25", "198.51.100.7/32"]}, {}, " to 192.0.2.0/25 or 198.51.100.7"),
        (CONDITION, {}, " that meet the conditions of its network (conditionsV4, conditionsV6)"),
        (
            CONDITION,
            {"hostIP": NODE4},
            f" to {NODE4} that meet the conditions of its network (conditionsV4, conditionsV6)",
        ),
    ],
    ids=["hostIP", "hostAddresses", "conditions", "both"],
)
@pytest.mark.parametrize("many", [False, True])
def test_it_is_said_which_connections_go_to_the_pod(
    practice: Practice, keys: dict[str, Any], of_mapping: dict[str, Any], which: str, *, many: bool
) -> None:
    practice.node.serve("tcp", 2222, "node", "0.0.0.0")
    more = [mapping(port, **of_mapping) for port in range(3000, 3020 if many else 3000)]
    configured(practice, mapping(2222, **of_mapping), *more, **keys)
    assert practice.finding().meaning.startswith(f"New connections over IPv4{which} go to the pod.")


def test_the_pod_of_an_address_hides_a_program_there_and_not_the_pod_of_every_address(practice: Practice) -> None:
    practice.node.serve("tcp", 2222, "node", NODE4)
    practice.running(mapping(2222))
    given = practice.running(mapping(2222, hostIP=NODE4))
    assert given.id in practice.finding().text


def test_a_program_in_a_pod_is_not_one_of_the_node(practice: Practice) -> None:
    pod = practice.running(mapping(8080))
    pod.serve("tcp", 8080, "web")
    assert practice.finds() == []


def test_the_sockets_of_the_node_are_looked_at_once(practice: Practice, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, asked = psutil.net_connections, []

    def count(kind: str) -> list[Any]:
        asked.append(kind)
        return listing(kind)

    monkeypatch.setattr(psutil, "net_connections", count)
    ports = range(2200, 2205)
    practice.node.serve("tcp", 2200, "node")
    practice.node.serve("tcp", 2201, "node")
    for port in ports:
        practice.running(mapping(port), mapping(port, protocol="udp"))
    assert len(practice.finds()) == 2
    assert len(asked) == 1


def test_a_host_address_that_the_node_does_not_have_is_worth_a_note(practice: Practice) -> None:
    pod = practice.running(mapping(8080, hostIP="192.0.2.77"), mapping(8080, hostIP="2001:db8::77"))
    found = practice.finds()
    assert [item.status for item in found] == ["note", "note"]
    assert [item.text for item in found] == [
        f"{address} is not an address of this node, and a hostIP of container {pod.id}"
        for address in ("192.0.2.77", "2001:db8::77")
    ]
    assert found[0].details == (f"192.0.2.77:8080/tcp -> {pod.ip4}:80",)
    practice.node.ip("addr add 192.0.2.77/32 dev uplink", "addr add 2001:db8::77/128 dev uplink nodad")
    assert practice.finds() == []
    assert practice.node.client.ask("tcp", "192.0.2.77", 8080) == f"web {CLIENT4}"


def test_an_address_that_is_local_by_a_route_is_one_of_the_node(practice: Practice) -> None:
    practice.node.ip("route add local 198.51.100.0/24 dev lo")
    practice.running(mapping(8080, hostIP="198.51.100.7"), mapping(8081, hostIP="127.1.2.3"))
    assert practice.finds() == []


def test_the_addresses_of_services_are_told_of(practice: Practice) -> None:
    practice.node.ip("link add kube-ipvs0 type bridge", "addr add 10.96.0.1/32 dev kube-ipvs0")
    found = practice.finding()
    assert found.status == "note"
    assert found.text == "kube-ipvs0 has 1 address of Services: kube-proxy is in its IPVS mode"
    assert '"hostAddresses"' in found.remedy
    practice.running(mapping(8080))
    assert [find.status for find in practice.finds()] == ["note"]


def test_a_service_that_came_after_the_last_add_is_a_problem_and_the_next_add_is_a_remedy(practice: Practice) -> None:
    practice.running(mapping(8443))
    practice.node.ip("link add kube-ipvs0 type bridge")
    for number in range(1, 13):
        practice.node.ip(f"addr add 10.96.0.{number}/32 dev kube-ipvs0")
    practice.node.ip("addr add fd00:96::1/128 dev kube-ipvs0")
    _, of4, of6 = practice.finds()
    assert (of4.status, of4.text) == ("problem", "set inet hostport ipvs_ip4 lacks 12 addresses of kube-ipvs0")
    assert (of4.details[0], of4.details[-1]) == ("10.96.0.1", "and 2 more")
    assert (of6.status, of6.text) == ("problem", "set inet hostport ipvs_ip6 lacks 1 address of kube-ipvs0")
    assert of6.details == ("fd00:96::1",)
    assert practice.node.ask("tcp", "10.96.0.1", 8443).startswith("web ")
    practice.running(mapping(9090))
    assert [find.status for find in practice.finds()] == ["note"]
    assert practice.node.is_silent("tcp", "10.96.0.1", 8443)


def test_a_mapping_of_one_address_takes_nothing_of_services(practice: Practice) -> None:
    practice.running(mapping(8443, hostIP=NODE4))
    practice.node.ip("link add kube-ipvs0 type bridge", "addr add 10.96.0.1/32 dev kube-ipvs0")
    assert [find.status for find in practice.finds()] == ["note"]
