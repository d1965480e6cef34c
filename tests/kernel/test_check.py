from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from lab import NODE4, NODE6, Node, Pod, config, mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

CONDITIONS: dict[str, dict[str, list[str]]] = {
    "no conditions": {},
    "a match": {
        "conditionsV4": ["ip", "saddr", "!=", "203.0.113.0/24"],
        "conditionsV6": ["ip6", "saddr", "!=", "2001:db8:1::/48"],
    },
    "a set": {
        "conditionsV4": ["ip", "saddr", "!=", "{", "203.0.113.0/24,", "198.51.100.7,", "192.0.2.64/26", "}"],
        "conditionsV6": ["ip6", "saddr", "!=", "{", "2001:db8:2::/48,", "2001:db8:1::7", "}"],
    },
}
MASQUERADE = {
    "default": {"snat": True, "masqAll": False},
    "masqAll": {"snat": True, "masqAll": True},
    "no snat": {"snat": False, "masqAll": False},
    "no snat although masqAll": {"snat": False, "masqAll": True},
}
MAPPINGS = {
    "rules": [
        mapping(8080),
        mapping(8080, 81, "udp"),
        mapping(8080, 82, "sctp"),
        mapping(8081, 80, hostIP="0.0.0.0"),
        mapping(8081, 80, hostIP="::"),
        mapping(8082, 80, hostIP=NODE4),
        mapping(8082, 80, "udp", hostIP="2001:0DB8::0:1"),
        mapping(8083, 80, hostIP="127.0.0.1"),
        mapping(8084, 80, hostIP="::ffff:192.0.2.1"),
    ],
    "maps": [mapping(port, protocol=protocol) for port in range(8000, 8009) for protocol in ("tcp", "udp", "sctp")]
    + [mapping(port, 81, hostIP=address) for port in range(8000, 8018) for address in (NODE4, NODE6)],
}
REORDER_DISPATCH = """
    flush chain inet hostport dispatch
    add rule inet hostport dispatch ip daddr != 127.0.0.0/8 update @local_ip4 { ip daddr }
    add rule inet hostport dispatch update @local_ip6 { ip6 daddr }
    add rule inet hostport dispatch meta nfproto . meta l4proto . th dport vmap @hostports
    add rule inet hostport dispatch ip6 daddr @ipvs_ip6 return
    add rule inet hostport dispatch ip daddr @ipvs_ip4 return
    add rule inet hostport dispatch ip6 daddr . meta l4proto . th dport vmap @hostports_ip6
    add rule inet hostport dispatch ip daddr . meta l4proto . th dport vmap @hostports_ip4
    add rule inet hostport dispatch ip6 daddr fe80::/10 return
    add rule inet hostport dispatch ip6 daddr ::1 return
"""
DROP_8080 = """
    delete element inet hostport hostports { ipv4 . tcp . 8080 }
    add element inet hostport hostports { ipv4 . tcp . 8080 : drop }
"""
BOTH = [mapping(8080), mapping(5353, 53, "udp", hostIP=NODE4)]


@pytest.fixture(scope="module")
def pods(_kernel: None) -> Iterator[dict[str, tuple[Node, Pod]]]:
    with Node() as node:
        yield {"v4": (node, node.pod(4)), "v6": (node, node.pod(6)), "both": (node, node.pod())}


@pytest.fixture
def pod(node: Node) -> Pod:
    pod = node.pod()
    node.add(pod, *BOTH)
    return pod


@pytest.mark.parametrize("families", ["v4", "v6", "both"])
@pytest.mark.parametrize("mappings", MAPPINGS)
@pytest.mark.parametrize("conditions", CONDITIONS)
@pytest.mark.parametrize("masquerade", MASQUERADE)
def test_passes_after_add(
    pods: dict[str, tuple[Node, Pod]], families: str, mappings: str, conditions: str, masquerade: str
) -> None:
    node, pod = pods[families]
    call = config(pod, *MAPPINGS[mappings], **CONDITIONS[conditions], **MASQUERADE[masquerade])
    assert node.cni("ADD", pod, call).code == 0
    checked = node.cni("CHECK", pod, call)
    assert (checked.status, checked.stdout, checked.stderr) == (0, "", "")
    node.delete(pod)


@pytest.mark.parametrize(
    "condition",
    [
        ["iif", "uplink"],
        ["iifname", "uplink"],
        ["iifname", '"up*"'],
        ["ct", "state", "new"],
        ["ip", "saddr", ".", "ip", "daddr", "!=", "{", "192.0.2.7", ".", "192.0.2.1", "}"],
        ["meta", "mark", "and", "0x10", "==", "0x0"],
        ["ip", "dscp", "{", "cs1,", "cs0", "}"],
        ["limit", "rate", "100/second"],
    ],
    ids=" ".join,
)
def test_passes_after_add_with_a_condition_that_nft_prints_in_its_own_way(node: Node, condition: list[str]) -> None:
    pod = node.pod()
    node.add(pod, *BOTH, conditionsV4=condition)
    assert node.cni("CHECK", pod, config(pod, *BOTH, conditionsV4=condition)).code == 0


@pytest.mark.parametrize("condition", [[], ["quota", "10", "mbytes"]], ids=["counters", "a quota"])
def test_passes_after_traffic_was_counted(node: Node, condition: list[str]) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, *BOTH, conditionsV4=condition)
    assert node.client.ask("tcp", NODE4, 8080).startswith("web")
    assert re.search(r"packets [1-9]", node.nft("list table inet hostport"))
    assert node.cni("CHECK", pod, config(pod, *BOTH, conditionsV4=condition)).code == 0


def test_passes_beside_others_and_after_their_add_and_del(node: Node, pod: Pod) -> None:
    other, same_network = node.pod(), node.pod()
    node.add(other, mapping(9090), name="another", masqAll=True)
    node.add(same_network, mapping(9091))
    assert node.cni("CHECK", pod, config(pod, *BOTH)).code == 0
    node.delete(same_network)
    assert node.cni("CHECK", pod, config(pod, *BOTH)).code == 0


def test_of_only_unspecified_ports_passes_without_a_table(node: Node) -> None:
    pod = node.pod()
    assert node.cni("CHECK", pod, config(pod, mapping(0), mapping(0, 81, "udp"))).code == 0
    assert node.nft("list ruleset") == ""


def test_fails_before_add_and_after_del_and_makes_no_table(node: Node) -> None:
    pod = node.pod()
    refused = node.cni("CHECK", pod, config(pod, *BOTH))
    assert (refused.code, node.nft("list ruleset")) == (103, "")
    assert "table inet hostport is missing" in refused.msg
    node.add(pod, *BOTH)
    node.delete(pod)
    refused = node.cni("CHECK", pod, config(pod, *BOTH))
    assert refused.code == 103
    assert "lacks element { ipv4 . tcp . 8080 " in refused.msg


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("flush ruleset", "table inet hostport is missing"),
        ("flush table inet hostport", "dispatch"),
        ("replace rule inet hostport DNAT handle HANDLE tcp dport 8080 dnat ip to 10.9.9.9:80", "10.9.9.9"),
        ("delete rule inet hostport DNAT handle HANDLE", "DNAT"),
        ("add rule inet hostport DNAT tcp dport 8080 dnat ip to 10.9.9.9:80", "10.9.9.9"),
        ("insert rule inet hostport DNAT accept", "accept"),
        ("delete element inet hostport hostports { ipv6 . tcp . 8080 }", "ipv6 . tcp . 8080"),
        ("delete element inet hostport hostports_ip4 { 192.0.2.1 . udp . 5353 }", "192.0.2.1 . udp . 5353"),
        ("delete element inet hostport pods_ip4 { IP4 }", "IP4"),
        ("flush map inet hostport pods_ip6", "pods_ip6"),
        ("add element inet hostport hostports { ipv4 . tcp . 99 : goto DNAT }", "ipv4 . tcp . 99"),
        (DROP_8080, "ipv4 . tcp . 8080"),
        ("flush chain inet hostport MASQ", "MASQ"),
        ("flush chain inet hostport MASQ; add rule inet hostport MASQ ip saddr 10.9.9.0/24 masquerade", "MASQ"),
        ("insert rule inet hostport MASQ ip saddr 10.88.0.0/24 accept", "MASQ"),
        *(
            (f"{verb} chain inet hostport {name}", name)
            for verb in ("flush", "delete")
            for name in ("prerouting", "output", "postrouting", "loopback")
        ),
        ("flush chain inet hostport dispatch", "dispatch"),
        ("insert rule inet hostport dispatch tcp dport 8080 return", "dispatch"),
        (REORDER_DISPATCH, "order"),
        ("flush chain inet hostport dispatch; delete map inet hostport hostports_ip6", "hostports_ip6"),
        ("add chain inet hostport prerouting { policy drop; }", "policy"),
        ("add table inet hostport { flags dormant; }", "dormant"),
    ],
)
def test_fails_and_names_what_differs_and_changes_nothing(node: Node, pod: Pod, damage: str, named: str) -> None:
    dnat, masq = (re.findall(rf"chain ({kind}-\S+)", node.ruleset())[0] for kind in ("dnat", "masq"))
    handle = re.findall(r"8080.*handle (\d+)", node.nft(f"-a list chain inet hostport {dnat}"))[0]
    names = {"DNAT": dnat, "MASQ": masq, "HANDLE": handle, "IP4": pod.ip4}
    for name, value in names.items():
        damage, named = damage.replace(name, value), named.replace(name, value)
    node.nft_file(damage)
    before = node.nft("-sa list ruleset")
    refused = node.cni("CHECK", pod, config(pod, *BOTH))
    assert refused.code == 103
    assert pod.id in refused.msg
    assert named in refused.msg + refused.json.get("details", "")
    assert node.nft("-sa list ruleset") == before


@pytest.mark.parametrize(
    ("mappings", "keys", "named"),
    [
        ([*BOTH, mapping(9090)], {}, "ipv4 . tcp . 9090"),
        (BOTH[:1], {}, "192.0.2.1 . udp . 5353"),
        ([mapping(8080, 81), BOTH[1]], {}, "81"),
        ([mapping(8080, protocol="sctp"), BOTH[1]], {}, "ipv4 . sctp . 8080"),
        (BOTH, {"snat": False}, "masq-"),
        (BOTH, {"masqAll": True}, "masq-"),
        (BOTH, {"conditionsV4": ["ip", "saddr", "192.0.2.2"]}, "192.0.2.2"),
        (BOTH, {"name": "another"}, "dnat-"),
        (BOTH, {"prevResult": {"ips": [{"address": "10.88.0.77/24"}]}}, "10.88.0.77"),
    ],
)
def test_fails_for_another_configuration_than_adds(
    node: Node, pod: Pod, mappings: list[dict[str, Any]], keys: dict[str, Any], named: str
) -> None:
    refused = node.cni("CHECK", pod, config(pod, *mappings, **keys))
    assert refused.code == 103
    assert named in refused.msg + refused.json.get("details", "")


def test_fails_for_an_evicted_attachment(node: Node, pod: Pod) -> None:
    node.add(node.pod(addresses=pod.addresses), mapping(9090))
    assert node.cni("CHECK", pod, config(pod, *BOTH)).code == 103
