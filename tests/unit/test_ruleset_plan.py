from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any

import pytest
from lab import mapping

from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError
from cni_hostport.ruleset import plan

if TYPE_CHECKING:
    from collections.abc import Mapping

ANY4 = "0.0.0.0"
V4, V6 = "10.1.0.2/24", "fd00::2/64"


def request(*mappings: Mapping[str, Any], pod: tuple[str, ...] = (V4,), **keys: Any) -> plan.Request:
    config = NetworkConfig.parse({"prevResult": {}, "runtimeConfig": {"portMappings": list(mappings)}, **keys})
    return plan.Request(config, [ip_interface(address) for address in pod])


def make(*mappings: Mapping[str, Any], pod: tuple[str, ...] = (V4,), **keys: Any) -> plan.Plan:
    return request(*mappings, pod=pod, **keys).plan()


def forwards(*mappings: Mapping[str, Any], pod: tuple[str, ...] = (V4,)) -> list[str]:
    return [f"{item} to {item.pod_ip} {item.container_port}" for item in make(*mappings, pod=pod).forwards]


def masquerade(*mappings: Mapping[str, Any], pod: tuple[str, ...], **keys: Any) -> dict[str, list[str]]:
    planned = make(*mappings, pod=pod, **keys).masquerade
    return {str(pod_ip): [str(source) for source in sources] for pod_ip, sources in planned.items()}


def test_a_mapping_leads_to_each_family_of_the_pod() -> None:
    assert forwards(mapping(8080), pod=(V6, V4)) == ["8080/tcp to fd00::2 80", "8080/tcp to 10.1.0.2 80"]


@pytest.mark.parametrize(
    ("host_ip", "planned"),
    [
        ("", ["8080/tcp to 10.1.0.2 80", "8080/tcp to fd00::2 80"]),
        (ANY4, ["8080/tcp to 10.1.0.2 80"]),
        ("::", ["8080/tcp to fd00::2 80"]),
        ("192.0.2.1", ["8080/tcp on 192.0.2.1 to 10.1.0.2 80"]),
        ("127.0.0.1", ["8080/tcp on 127.0.0.1 to 10.1.0.2 80"]),
        ("2001:db8::1", ["8080/tcp on 2001:db8::1 to fd00::2 80"]),
    ],
)
def test_a_host_address_chooses_the_family(host_ip: str, planned: list[str]) -> None:
    assert forwards(mapping(8080, hostIP=host_ip), pod=(V4, V6)) == planned


@pytest.mark.parametrize(("host_ip", "pod"), [("2001:db8::1", V4), ("::", V4), ("192.0.2.1", V6), (ANY4, V6)])
def test_a_host_address_of_a_family_the_pod_lacks_maps_nothing_and_is_told(host_ip: str, pod: str) -> None:
    asked = request(mapping(8080, hostIP=host_ip), mapping(8081), pod=(pod,))
    assert [forward.host_port for forward in asked.plan().forwards] == [8081]
    reason = "the container has no address to which it could be forwarded"
    assert asked.unmapped() == [f"host port 8080/tcp on {host_ip} is not mapped: {reason}"]


def test_the_first_address_of_each_family_counts() -> None:
    pod = (V4, "10.1.0.3/24", V6, "fd00::3/64")
    assert forwards(mapping(8080), pod=pod) == ["8080/tcp to 10.1.0.2 80", "8080/tcp to fd00::2 80"]


def test_the_same_mapping_several_times_is_one() -> None:
    assert forwards(mapping(8080), mapping(8080, protocol="TCP"), mapping(8080, hostIP=ANY4)) == [
        "8080/tcp to 10.1.0.2 80"
    ]


def test_host_ports_that_differ_in_port_protocol_or_address_are_separate() -> None:
    assert forwards(
        mapping(8080, 80), mapping(8081, 80), mapping(8080, 53, "udp"), mapping(8080, 81, "sctp"),
        mapping(8080, 82, hostIP="192.0.2.1"), mapping(8080, 83, hostIP="127.0.0.1"),
    ) == [
        "8080/tcp to 10.1.0.2 80",
        "8081/tcp to 10.1.0.2 80",
        "8080/udp to 10.1.0.2 53",
        "8080/sctp to 10.1.0.2 81",
        "8080/tcp on 192.0.2.1 to 10.1.0.2 82",
        "8080/tcp on 127.0.0.1 to 10.1.0.2 83",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "port"),
    [
        ({}, {}, "8080/tcp"),
        ({"protocol": "UDP"}, {"protocol": "udp"}, "8080/udp"),
        ({"hostIP": ANY4}, {"hostIP": ANY4}, "8080/tcp"),
        ({"hostIP": "192.0.2.1"}, {"hostIP": "::ffff:192.0.2.1"}, "8080/tcp on 192.0.2.1"),
    ],
)
def test_one_host_port_to_two_container_ports_is_refused(
    first: dict[str, str], second: dict[str, str], port: str
) -> None:
    with pytest.raises(CNIError) as caught:
        make(mapping(8080, 80) | first, mapping(8080, 81) | second)
    assert caught.value.code == 7
    assert caught.value.msg == f"host port {port} is mapped to two container ports, 80 and 81"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"10.1.0.2": ["127.0.0.0/8", "10.1.0.0/24"], "fd00::2": ["fd00::/64"]}),
        ({"masqAll": True}, {"10.1.0.2": ["0.0.0.0/0"], "fd00::2": ["::/0"]}),
        ({"snat": False}, {"10.1.0.2": [], "fd00::2": []}),
        ({"snat": False, "masqAll": True}, {"10.1.0.2": [], "fd00::2": []}),
    ],
)
def test_what_is_masqueraded_follows_snat_and_masqall(keys: dict[str, bool], expected: dict[str, list[str]]) -> None:
    assert masquerade(mapping(8080), pod=(V4, V6), **keys) == expected


def test_only_an_address_with_forwards_is_masqueraded() -> None:
    assert masquerade(mapping(8080, hostIP=ANY4), pod=(V4, V6)) == {"10.1.0.2": ["127.0.0.0/8", "10.1.0.0/24"]}
    assert masquerade(mapping(8080, hostIP="::"), pod=(V4, V6)) == {"fd00::2": ["fd00::/64"]}


def test_a_pod_alone_on_its_link_is_its_own_only_neighbour() -> None:
    assert masquerade(mapping(8080), pod=("10.1.0.2/32",)) == {"10.1.0.2": ["127.0.0.0/8", "10.1.0.2/32"]}


@pytest.mark.parametrize(
    ("keys", "pod", "needed"),
    [
        ({}, (V6, V4), "10.1.0.2"),
        ({"masqAll": True}, (V4,), "10.1.0.2"),
        ({"snat": False}, (V4, V6), None),
        ({}, (V6,), None),
    ],
)
def test_localhost_is_routed_to_pods_whose_ipv4_connections_are_masqueraded(
    keys: dict[str, bool], pod: tuple[str, ...], needed: str | None
) -> None:
    assert make(mapping(8080), pod=pod, **keys).local_route_to == (ip_address(needed) if needed else None)


def test_conditions_are_kept_by_family() -> None:
    planned = make(mapping(8080), conditionsV4=["iif", "lo"], conditionsV6=["ip6", "saddr", "fd00::/8"])
    assert planned.conditions == {4: ("iif", "lo"), 6: ("ip6", "saddr", "fd00::/8")}


def test_nothing_to_map_is_an_empty_plan() -> None:
    assert make(mapping(0)) == plan.Plan((), {})
    assert make(mapping(8080), pod=()).forwards == ()


def test_everywhere_is_every_address() -> None:
    assert {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")} == plan.EVERYWHERE
