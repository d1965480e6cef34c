from __future__ import annotations

import itertools
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
import scratch
from lab import mapping
from scratch import KEY, nft, ruleset, run

from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Held, Lookup
from cni_hostport.names import PORT_MAPS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
BOTH_CHAINS = [f"masq-{KEY}", f"dnat-{KEY}"]
POD4, POD6 = ip_address("10.1.0.2").packed, ip_address("fd00::2").packed
PODS = [("pods_ip4", POD4), ("pods_ip6", POD6)]
MANY = [mapping(port) for port in range(8000, 8017)]
STRANGERS_RULES = {
    "drop": "insert rule inet hostport dnat-KEY ip saddr 203.0.113.7 tcp dport 8080 drop",
    "accept": "insert rule inet hostport dnat-KEY ip6 saddr 2001:db8::7 tcp dport 8080 accept",
    "count": "insert rule inet hostport dnat-KEY counter",
    "mark": "insert rule inet hostport dnat-KEY meta nfproto ipv6 tcp dport 8080 meta mark set 1",
    "elsewhere": "add rule inet hostport dnat-KEY meta nfproto ipv4 tcp dport 8080 dnat ip to 10.1.0.9:1",
}
CONDITIONS: list[dict[str, list[str]]] = [
    {"conditionsV4": ["ip", "daddr", "192.0.2.1"]},
    {"conditionsV4": ["ip", "daddr", "192.0.2.128/25"]},
    {"conditionsV4": ["ip", "saddr", "192.0.2.2"], "conditionsV6": ["ip6", "saddr", "2001:db8::/64"]},
    {"conditionsV4": ["tcp", "dport", "!=", "9"], "conditionsV6": ["tcp", "dport", "!=", "9"]},
    {"conditionsV4": ["tcp", "dport", "8080"]},
    {"conditionsV4": ["tcp", "dport", "1-9000"]},
    {"conditionsV4": ["ip", "saddr", "{", "192.0.2.2,", "192.0.2.3", "}"]},
    {"conditionsV4": ["ct", "mark", "2"], "conditionsV6": ["ct", "mark", "2"]},
    {"conditionsV4": ["meta", "mark", "set", "1"], "conditionsV6": ["meta", "mark", "set", "1"]},
]


@pytest.fixture(autouse=True)
def _scratch(_kernel: None) -> Iterator[None]:
    with scratch.namespace():
        yield


@pytest.fixture
def _no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_nft: Nft, what: str) -> None:
        raise AssertionError(what)

    monkeypatch.setattr(Nft, "listing", fail)


def any_address(version: int, protocol: str, port: int) -> tuple[str, bytes]:
    family = {4: 2, 6: 10}[version]
    return "hostports", bytes([family, 0, 0, 0, PROTOCOLS[protocol], 0, 0, 0]) + port.to_bytes(2) + bytes(2)


def given(address: str, protocol: str, port: int) -> tuple[str, bytes]:
    parsed = ip_address(address)
    key = parsed.packed + bytes([PROTOCOLS[protocol], 0, 0, 0]) + port.to_bytes(2) + bytes(2)
    return f"hostports_ip{parsed.version}", key


def found() -> Held:
    held = Lookup().find(KEY)
    assert held is not None
    return held


@pytest.mark.parametrize("beside", ["nothing", "an empty table", "another pod", "another network's"])
def test_nothing_is_found_of_what_is_not_installed(beside: str) -> None:
    if beside == "an empty table":
        nft("add table inet hostport")
    if beside == "another pod":
        run("ADD", mapping(8080), container="c2")
    if beside == "another network's":
        run("ADD", mapping(8080), name="other")
    assert Lookup().find(KEY) is None


@pytest.mark.parametrize(
    ("mappings", "expected", "ports"),
    [
        ([mapping(8080)], [any_address(4, "tcp", 8080), any_address(6, "tcp", 8080)], [("tcp", None, 8080)] * 2),
        (
            [mapping(8080), mapping(53, 53, "udp"), mapping(9, 9, "sctp")],
            [any_address(*item) for item in itertools.product((4, 6), ("tcp",), (8080,))]
            + [any_address(*item) for item in itertools.product((4, 6), ("udp",), (53,))]
            + [any_address(*item) for item in itertools.product((4, 6), ("sctp",), (9,))],
            [*[("tcp", None, 8080)] * 2, *[("udp", None, 53)] * 2, *[("sctp", None, 9)] * 2],
        ),
        (
            [mapping(53, 53, "udp", hostIP="192.0.2.1"), mapping(53, 53, "udp", hostIP="2001:db8::1")],
            [given("192.0.2.1", "udp", 53), given("2001:db8::1", "udp", 53)],
            [("udp", ip_address("192.0.2.1").packed, 53), ("udp", ip_address("2001:db8::1").packed, 53)],
        ),
        (
            [mapping(8080, hostIP="192.0.2.1"), mapping(8080, 81)],
            [given("192.0.2.1", "tcp", 8080), any_address(4, "tcp", 8080), any_address(6, "tcp", 8080)],
            [("tcp", ip_address("192.0.2.1").packed, 8080), *[("tcp", None, 8080)] * 2],
        ),
    ],
    ids=["tcp", "three protocols", "given addresses", "given and any address"],
)
def test_an_attachment_is_found_with_all_its_elements_and_chains(
    mappings: list[dict[str, Any]], expected: list[tuple[str, bytes]], ports: list[tuple[str, bytes | None, int]]
) -> None:
    run("ADD", mapping(7000, protocol="udp"), container="c2")
    run("ADD", *mappings)
    held = found()
    assert (sorted(held.elements), held.chains) == (sorted([*expected, *PODS]), BOTH_CHAINS)
    assert sorted(held.ports, key=str) == sorted(ports, key=str)
    assert held.pods == [POD4, POD6]


@pytest.mark.parametrize(
    ("host_ip", "element", "pod"),
    [
        ("0.0.0.0", any_address(4, "tcp", 8080), PODS[0]),
        ("::", any_address(6, "tcp", 8080), PODS[1]),
        ("127.0.0.1", given("127.0.0.1", "tcp", 8080), PODS[0]),
    ],
)
@pytest.mark.parametrize("snat", [True, False])
def test_a_mapping_of_one_version_is_found_alone(
    host_ip: str, element: tuple[str, bytes], pod: tuple[str, bytes], *, snat: bool
) -> None:
    run("ADD", mapping(8080, hostIP=host_ip), snat=snat)
    held = found()
    assert (sorted(held.elements), held.chains) == ([element, pod], BOTH_CHAINS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_16_mappings_of_each_version_are_found_and_removed_without_listing(protocol: str) -> None:
    run("ADD", *(mapping(port, protocol=protocol) for port in range(8000, 8016)))
    held = found()
    assert sorted(held.elements) == sorted(
        [*PODS, *(any_address(*item) for item in itertools.product((4, 6), (protocol,), range(8000, 8016)))]
    )
    assert Lookup().remove(KEY, held)
    assert KEY not in ruleset()


def test_an_element_that_another_pod_has_by_now_is_not_found() -> None:
    run("ADD", mapping(8080), mapping(9090))
    nft("delete element inet hostport hostports { ipv4 . tcp . 8080, ipv6 . tcp . 8080 }")
    run("ADD", mapping(8080), container="c2")
    held = found()
    assert sorted(held.elements) == sorted([any_address(4, "tcp", 9090), any_address(6, "tcp", 9090), *PODS])
    assert Lookup().remove(KEY, held)
    assert KEY not in ruleset()
    run("CHECK", mapping(8080), container="c2")


@pytest.mark.parametrize("conditions", CONDITIONS, ids=lambda keys: " ".join(keys["conditionsV4"]))
@pytest.mark.parametrize("host_ip", [None, "192.0.2.1"])
@pytest.mark.usefixtures("_no_listing")
def test_conditions_do_not_keep_an_attachment_from_being_found_and_removed(
    conditions: dict[str, Any], host_ip: str | None
) -> None:
    run("ADD", mapping(8080, hostIP=host_ip), **conditions)
    run("DEL")
    assert KEY not in ruleset()


@pytest.mark.parametrize("mappings", [[mapping(8080)], MANY], ids=["one", "many"])
@pytest.mark.parametrize("conditions", CONDITIONS, ids=lambda keys: " ".join(keys["conditionsV4"]))
def test_del_removes_all_whatever_the_conditions(
    mappings: Sequence[dict[str, Any]], conditions: dict[str, Any]
) -> None:
    run("ADD", mapping(7000), container="c2", **conditions)
    run("ADD", *mappings, **conditions)
    run("CHECK", *mappings, **conditions)
    assert run("DEL") == []
    assert KEY not in ruleset()
    run("CHECK", mapping(7000), container="c2", **conditions)


@pytest.mark.parametrize("name", STRANGERS_RULES)
def test_del_removes_all_of_a_chain_with_a_strangers_rule(name: str) -> None:
    run("ADD", mapping(8080), mapping(53, protocol="udp", hostIP="192.0.2.1"))
    nft(STRANGERS_RULES[name])
    run("DEL")
    assert KEY not in ruleset()


@pytest.mark.usefixtures("_no_listing")
def test_del_of_nothing_asks_for_single_objects_only() -> None:
    before = ruleset()
    run("DEL")
    assert ruleset() == before


def test_each_port_leads_to_the_chain_that_a_listing_tells() -> None:
    protocols = [mapping(8080), mapping(8081, 80, "udp"), mapping(8082, 80, "sctp")]
    given = [mapping(8080, hostIP="192.0.2.1"), mapping(8443, hostIP="2001:db8::1"), mapping(53, 53, hostIP="::ffff:1")]
    run("ADD", runtimeConfig={"portMappings": protocols + given})
    ports = [element for element in Nft().installed().elements if element.map in PORT_MAPS]
    assert len(ports) == 9
    assert {Lookup().chain_of(port.map, port.key) for port in ports} == {f"dnat-{KEY}"}
    assert not Lookup().chain_of("hostports", "ipv4 . tcp . 8443")
    run("DEL")
    assert {Lookup().chain_of(port.map, port.key) for port in ports} == {""}
