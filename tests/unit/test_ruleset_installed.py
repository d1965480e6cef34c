from __future__ import annotations

import copy
from ipaddress import ip_address
from typing import Any

import pytest

from cni_hostport.ruleset import differences as comparison
from cni_hostport.ruleset import installed
from cni_hostport.ruleset.commands import target_removal_commands
from cni_hostport.ruleset.comment import Owner
from cni_hostport.ruleset.elements import Element
from cni_hostport.ruleset.installed import Installed

Listing = list[dict[str, Any]]
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}


def table_map(name: str, *elements: list[Any]) -> dict[str, Any]:
    body: dict[str, Any] = {"family": "inet", "name": name, "table": "hostport", "handle": 9, "map": "verdict"}
    return {"map": body | ({"elem": list(elements)} if elements else {})}


def chain(name: str, table: str = "hostport", handle: int = 1, **keys: Any) -> dict[str, Any]:
    return {"chain": {"family": "inet", "table": table, "name": name, "handle": handle, **keys}}


def rule(name: str, *expressions: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"rule": {"family": "inet", "table": "hostport", "chain": name, "expr": list(expressions), **keys}}


def port(*key: object, to: str, comment: str = "", counted: int = 0) -> list[Any]:
    element = {"val": {"concat": list(key)}, "counter": {"packets": counted, "bytes": 60 * counted}}
    return [{"elem": element | ({"comment": comment} if comment else {})}, {"goto": {"target": f"dnat-{to}"}}]


def pod(address: str, to: str, network: str = "") -> list[Any]:
    value = {"elem": {"val": address, "comment": network}} if network else address
    return [value, {"goto": {"target": f"masq-{to}"}}]


LISTING = [
    {"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
    table_map(
        "hostports",
        port("ipv4", "tcp", 8080, to="N-A", comment="c1 eth0 /run/netns/c1", counted=7),
        port("ipv6", "udp", 53, to="N-B", comment="c2 net1"),
    ),
    table_map("hostports_ip4", port("192.0.2.1", "sctp", 9, to="N-A")),
    table_map("hostports_ip6", port("::192.0.2.1", "tcp", 8080, to="N-B", comment="c2 net1")),
    table_map("pods_ip4", pod("10.1.0.2", to="N-A", network="front end")),
    table_map("pods_ip6", pod("fd00::2", to="N-B")),
    *(chain(name) for name in ("dispatch", "prerouting", "dnat-N-B", "masq-N-B")),
    *(chain(name, handle=handle) for handle, name in enumerate(("dnat-N-A", "masq-N-A", "dnat-M-C"), 7)),
    chain("dnat-X-Y", table="foreign"),
]


def test_listings_are_read_as_elements_with_their_holders_owners_networks_and_connections() -> None:
    assert Installed.read(LISTING).elements == (
        Element("hostports", "ipv4 . tcp . 8080", "dnat-N-A", Owner("c1", "eth0", "/run/netns/c1"), 7),
        Element("hostports", "ipv6 . udp . 53", "dnat-N-B", Owner("c2", "net1")),
        Element("hostports_ip4", "192.0.2.1 . sctp . 9", "dnat-N-A", Owner("", "")),
        Element("hostports_ip6", "::c000:201 . tcp . 8080", "dnat-N-B", Owner("c2", "net1")),
        Element("pods_ip4", "10.1.0.2", "masq-N-A", Owner("", ""), network="front end"),
        Element("pods_ip6", "fd00::2", "masq-N-B", Owner("", "")),
    )


def test_an_attachment_holds_what_leads_to_its_chains_or_has_a_chain() -> None:
    assert Installed.read(LISTING).holders == {"N-A", "N-B", "M-C"}


def test_no_table_is_nothing_installed() -> None:
    assert Installed.read([]) == Installed((), {})
    assert Installed.read([table_map("hostports"), chain("dnat-X-Y", table="foreign")]).holders == set()


@pytest.mark.parametrize("verdict", [{"drop": None}, {"jump": {"target": "dnat-N-A"}}, {"goto": {"target": "mine"}}])
def test_an_element_put_there_by_hand_has_no_holder(verdict: dict[str, Any]) -> None:
    (element,) = Installed.read([table_map("hostports", [{"concat": ["ipv4", "tcp", 80]}, verdict])]).elements
    assert (element.holder, element.owner, element.connections, element.network) == ("", Owner("", ""), 0, "")


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_a_protocol_is_known_by_number_on_a_machine_that_has_no_names_for_them(protocol: str) -> None:
    (element,) = Installed.read([table_map("hostports", port("ipv4", PROTOCOLS[protocol], 53, to="N-A"))]).elements
    assert (element.key, element.port) == (f"ipv4 . {protocol} . 53", (protocol, 53))


def test_an_element_tells_its_port_and_address() -> None:
    wildcard, _, given4, given6, pod4, _ = Installed.read(LISTING).elements
    assert [element.port for element in (wildcard, given4, given6)] == [("tcp", 8080), ("sctp", 9), ("tcp", 8080)]
    assert wildcard.address is None
    assert given4.address == ip_address("192.0.2.1")
    assert given6.address == ip_address("::192.0.2.1")
    assert pod4.address == ip_address("10.1.0.2")


@pytest.mark.parametrize(
    ("key", "commands"),
    [
        (
            "N-A",
            [
                "delete element inet hostport hostports { ipv4 . tcp . 8080 }",
                "delete element inet hostport hostports_ip4 { 192.0.2.1 . sctp . 9 }",
                "delete element inet hostport pods_ip4 { 10.1.0.2 }",
                "delete chain inet hostport masq-N-A",
                "delete chain inet hostport handle 7",
                *target_removal_commands("N-A"),
            ],
        ),
        ("M-C", ["delete chain inet hostport handle 9", *target_removal_commands("M-C")]),
        ("N-Z", []),
    ],
)
def test_detaching_deletes_all_of_one_attachment_and_its_token_and_maps_last(key: str, commands: list[str]) -> None:
    assert Installed.read(LISTING).detach_commands(key) == commands


def test_elements_of_one_map_are_deleted_together() -> None:
    elements = (port("ipv4", "tcp", number, to="N-A") for number in (1, 2))
    assert Installed.read([chain("dnat-N-A"), table_map("hostports", *elements)]).detach_commands("N-A") == [
        "delete element inet hostport hostports { ipv4 . tcp . 1, ipv4 . tcp . 2 }",
        "delete chain inet hostport handle 1",
        *target_removal_commands("N-A"),
    ]


def test_an_element_that_is_newer_than_the_list_of_chains_is_not_deleted() -> None:
    listing = [chain("masq-N-A"), table_map("hostports", port("ipv4", "tcp", 1, to="N-A"))]
    assert Installed.read(listing).detach_commands("N-A") == ["delete chain inet hostport masq-N-A"]


def test_a_label_is_the_comment_of_the_first_rule_that_has_one() -> None:
    listing = [chain("dnat-N-A"), rule("dnat-N-A"), rule("dnat-N-A", comment="default/web")]
    assert installed.pod_label(listing) == "default/web"
    assert installed.pod_label(listing[:2]) == ""


def test_the_state_of_an_attachment_is_every_map_and_every_chain_on_its_way() -> None:
    assert comparison.listing_names("N-A") == [
        "tables inet",
        "map inet hostport hostports",
        "map inet hostport hostports_ip4",
        "map inet hostport hostports_ip6",
        "map inet hostport dynamic_ports",
        "map inet hostport pods_ip4",
        "map inet hostport pods_ip6",
        "map inet hostport waiting_hostports",
        "map inet hostport waiting_hostports_ip4",
        "map inet hostport waiting_hostports_ip6",
        "map inet hostport localnet_needs",
        "map inet hostport any_ip4-N-A",
        "map inet hostport given_ip4-N-A",
        "map inet hostport any_ip6-N-A",
        "map inet hostport given_ip6-N-A",
        "chain inet hostport dispatch",
        "chain inet hostport prerouting",
        "chain inet hostport output",
        "chain inet hostport postrouting",
        "chain inet hostport loopback",
        "chain inet hostport dnat-N-A",
        "chain inet hostport masq-N-A",
    ]


def test_the_parts_of_the_listing_of_the_table_are_what_listing_each_would_be() -> None:
    element = port("ipv4", "tcp", 8080, to="N-A")
    own_listing = [chain("dnat-N-A"), table_map("hostports", element), rule("dnat-N-A"), rule("dnat-N-A", COUNTER)]
    others = [{"table": {"family": "inet", "name": "hostport"}}, chain("dnat-N-B"), rule("dnat-N-B")]
    parts = comparison.attachment_listings([*others, *own_listing], "N-A")
    assert ["tables inet", *parts] == comparison.listing_names("N-A")
    assert {subject: part for subject, part in parts.items() if part} == {
        "map inet hostport hostports": [own_listing[1]],
        "chain inet hostport dnat-N-A": [own_listing[0], *own_listing[2:]],
    }


LOCAL: dict[str, Any] = {"match": {"left": {"fib": {"result": "type"}}, "right": {"set": ["local", "x"]}}}
DNAT: dict[str, Any] = {"dnat": {"family": "ip", "addr": "10.1.0.2", "port": 80}}
COUNTER = {"counter": {"packets": 0, "bytes": 0}}
EXPECTED: dict[str, Listing] = {
    "tables inet": [{"table": {"family": "inet", "name": "hostport", "handle": 1}}],
    "map hostports": [table_map("hostports", port("ipv4", "tcp", 8080, to="N-A"))],
    "chain prerouting": [
        chain("prerouting", type="nat", hook="prerouting", prio=-100),
        rule("prerouting", LOCAL),
        rule("prerouting", COUNTER),
    ],
    "chain dnat-N-A": [chain("dnat-N-A"), rule("dnat-N-A", COUNTER, DNAT)],
}


def differences(**changed: Listing) -> list[str]:
    actual = copy.deepcopy(EXPECTED)
    for item in actual:
        actual[item] = changed.get(item.split()[1].partition("-")[0], actual[item])
    return comparison.differences("N-A", EXPECTED, actual)


def test_what_is_as_expected_has_no_differences() -> None:
    assert differences() == []


def test_handles_counters_comments_order_of_sets_and_elements_of_others_do_not_differ() -> None:
    own_listing = port("ipv4", "tcp", 8080, to="N-A", comment="c1 eth0")
    swapped = {"match": LOCAL["match"] | {"right": {"set": ["x", "local"]}}}
    counted = {"counter": {"packets": 7, "bytes": 700}}
    assert not differences(
        hostports=[table_map("hostports", port("ipv4", "tcp", 1, to="N-B"), own_listing)],
        prerouting=[
            chain("prerouting", type="nat", hook="prerouting", prio=-100) | {"handle": 99},
            rule("prerouting", swapped, handle=5),
            rule("prerouting", counted),
        ],
        dnat=[chain("dnat-N-A"), rule("dnat-N-A", counted, DNAT, comment="default/web")],
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hostports": []}, ["map hostports is missing"]),
        ({"dnat": []}, ["chain dnat-N-A is missing"]),
        (
            {"hostports": [table_map("hostports")]},
            ["map hostports lacks element { ipv4 . tcp . 8080 : goto dnat-N-A }"],
        ),
        (
            {"hostports": [table_map("hostports", port("ipv4", "tcp", 8080, to="N-B"))]},
            ["map hostports lacks element { ipv4 . tcp . 8080 : goto dnat-N-A }"],
        ),
        (
            {"hostports": [table_map("hostports", *(port("ipv4", "tcp", n, to="N-A") for n in (8080, 8081)))]},
            ["map hostports has element { ipv4 . tcp . 8081 : goto dnat-N-A }"],
        ),
        (
            {"inet": [{"table": {"family": "inet", "name": "hostport", "flags": "dormant"}}]},
            ["tables inet lacks table hostport", "tables inet has table hostport, dormant"],
        ),
        (
            {"prerouting": [EXPECTED["chain prerouting"][index] for index in (0, 2, 1)]},
            ["chain prerouting has its rules in another order"],
        ),
    ],
)
def test_a_difference_is_said_in_a_sentence(changed: dict[str, Listing], said: list[str]) -> None:
    assert differences(**changed) == said


@pytest.mark.parametrize(
    "changed",
    [
        {"prerouting": [chain("prerouting", type="nat", hook="prerouting", prio=-100)]},
        {"prerouting": [chain("prerouting"), *EXPECTED["chain prerouting"][1:]]},
        {"dnat": [chain("dnat-N-A"), rule("dnat-N-A", COUNTER, {"dnat": DNAT["dnat"] | {"addr": "10.1.0.9"}})]},
        {"dnat": [chain("dnat-N-A"), rule("dnat-N-A", DNAT)]},
        {"hostports": [table_map("hostports", [{"concat": ["ipv4", "tcp", 8080]}, {"goto": {"target": "masq-N-A"}}])]},
    ],
    ids=["flushed chain", "no hook", "another target", "no counter", "element to the wrong chain"],
)
def test_a_changed_hook_rule_or_target_is_found(changed: dict[str, Listing]) -> None:
    assert differences(**changed)


TYPE = ["nf_proto", "ipv6_addr", "inet_proto", "inet_service"]
TYPEOF = [
    {"meta": {"key": "nfproto"}},
    {"payload": {"protocol": "ip6", "field": "daddr"}},
    {"meta": {"key": "l4proto"}},
    {"payload": {"protocol": "th", "field": "dport"}},
]


def declared(key: object) -> Listing:
    (present,) = EXPECTED["map hostports"]
    return [{"map": present["map"] | {"type": key}}]


def test_a_map_of_an_older_version_that_gave_types_does_not_differ() -> None:
    for item, other in (
        (TYPE, {"typeof": {"concat": TYPEOF}}),
        ({"typeof": {"concat": TYPEOF}}, TYPE),
        ("ipv6_addr", {"typeof": TYPEOF[1]}),
    ):
        expected = EXPECTED | {"map hostports": declared(item)}
        assert comparison.differences("N-A", expected, EXPECTED | {"map hostports": declared(other)}) == []


@pytest.mark.parametrize("key", [TYPE[1:], "ipv6_addr", {"typeof": {"concat": TYPEOF[1:]}}, {"typeof": TYPEOF[1]}])
def test_a_map_with_other_keys_differs(key: object) -> None:
    expected = EXPECTED | {"map hostports": declared({"typeof": {"concat": TYPEOF}})}
    assert comparison.differences("N-A", expected, EXPECTED | {"map hostports": declared(key)})


def test_an_attachments_own_map_is_compared_by_what_is_in_it() -> None:
    name = "any_ip4-N-A"
    targets = [[{"concat": ["tcp", port]}, {"concat": ["10.1.0.2", 80]}] for port in (1, 2)]
    expected, without = ({**EXPECTED, name: item} for item in ([table_map(name, *targets)], []))
    assert comparison.differences("N-A", expected, {**EXPECTED, name: [table_map(name, *reversed(targets))]}) == []
    assert comparison.differences("N-A", without, without) == []
    assert comparison.differences("N-A", expected, without) == [f"{name} is missing"]
    assert comparison.differences("N-A", without, expected)
    assert comparison.differences("N-A", expected, {**EXPECTED, name: [table_map(name, targets[0])]}) == [
        f'{name} lacks element [{{"concat": ["tcp", 2]}}, {{"concat": ["10.1.0.2", 80]}}]'
    ]


def test_a_rule_that_stands_there_twice_is_called_that() -> None:
    (output,) = differences(prerouting=[*EXPECTED["chain prerouting"], EXPECTED["chain prerouting"][1]])
    assert "order" not in output


def test_a_missing_table_is_one_difference() -> None:
    assert comparison.differences("N-A", EXPECTED, {item: [] for item in EXPECTED}) == [
        "table inet hostport is missing"
    ]
