from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from lab import Node, config, key_of, mapping

BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}


def test_foreign_tables_chains_and_sets_are_never_touched(node: Node) -> None:
    node.nft_file("""
        table ip nat {
            chain CNI-HOSTPORT-DNAT { tcp dport 8080 counter dnat to 10.88.0.99:80; }
            chain PREROUTING { type nat hook prerouting priority dstnat; jump CNI-HOSTPORT-DNAT; }
        }
        table ip hostport { chain dispatch { drop; }; map hostports { type inet_service : verdict; }; }
        table inet other { chain dnat-0-0 { }; chain dispatch { goto dnat-0-0; }; }
        table inet hostport {
            set mine { type ipv4_addr; elements = { 192.0.2.7 }; }
            chain mine { type filter hook input priority 0; ip saddr @mine counter drop; }
        }""")
    foreign = ("table ip nat", "table ip hostport", "table inet other", "chain inet hostport mine",
               "set inet hostport mine")  # fmt: skip
    before = [node.nft(f"-a list {item}") for item in foreign]
    pod = node.pod()
    node.add(pod, mapping(8080), mapping(9090))
    node.add(pod, mapping(8080))
    assert node.cni("CHECK", pod, config(pod, mapping(8080))).code == 0
    assert node.cni("STATUS", None, BARE).code == 0
    assert node.cni("GC", None, {**BARE, "cni.dev/valid-attachments": None}).code == 0
    node.delete(pod)
    assert [node.nft(f"-a list {item}") for item in foreign] == before


def test_container_ids_and_network_names_of_200_characters_are_told_apart_to_the_last(node: Node) -> None:
    stem = "n" * 199
    pods = {stem + end: node.pod() for end in "ab"}
    for port, (name, pod) in enumerate(pods.items(), 8080):
        call = config(pod, mapping(port), name=name)
        assert node.cni("ADD", pod, call, CONTAINERID=name).code == 0
        assert node.cni("CHECK", pod, call, CONTAINERID=name).code == 0
    before, (name, pod) = node.ruleset(), pods.popitem()
    assert node.cni("DEL", pod, {**BARE, "name": name}, CONTAINERID=stem + "a").code == 0
    assert node.cni("DEL", pod, {**BARE, "name": stem + "a"}, CONTAINERID=name).code == 0
    assert node.ruleset() == before
    assert node.cni("DEL", pod, {**BARE, "name": name}, CONTAINERID=name).code == 0
    assert "8080" in node.ruleset()
    assert "8081" not in node.ruleset()


def test_add_heals_a_flushed_ruleset(node: Node) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080))
    before = node.ruleset()
    node.nft("flush ruleset")
    node.set_sysctl("net/ipv4/conf/cni0/route_localnet", 0)  # else it might be somebody else's
    node.add(pod, mapping(8080))
    assert node.ruleset() == before


@pytest.mark.parametrize(
    "damage",
    [
        *(f"flush chain inet hostport {name}" for name in ("dispatch", "prerouting", "postrouting", "loopback")),
        *(f"delete chain inet hostport {name}" for name in ("prerouting", "output", "postrouting", "loopback")),
        "flush chain inet hostport dispatch; delete map inet hostport hostports_ip6",
        "insert rule inet hostport dispatch tcp dport 8080 return",
        "add table inet hostport { flags dormant; }",
        "add chain inet hostport prerouting { policy drop; }",
    ],
)
def test_a_damaged_base_heals_at_the_next_add_of_any_pod(node: Node, damage: str) -> None:
    pod, other = node.pod(), node.pod()
    node.add(pod, mapping(8080))
    before = node.ruleset()
    node.nft_file(damage)
    assert node.ruleset() != before
    node.add(other, mapping(9090))
    assert node.cni("CHECK", pod, config(pod, mapping(8080))).code == 0
    node.delete(other)
    remembered = f"\t\telements = {{ {ip_address(bytes.fromhex(key_of(other).replace('-', '')))} }}"
    # a chain added again comes last
    assert sorted(node.ruleset().splitlines()) == sorted([*before.splitlines(), remembered])


def test_an_attachments_own_flushed_chains_heal_at_its_own_next_add(node: Node) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080))
    before = node.ruleset()
    node.nft("flush table inet hostport")
    node.add(pod, mapping(8080))
    assert node.ruleset() == before


@pytest.mark.parametrize("ports", [[0], [0, None, 0]], ids=["one", "several"])
def test_unspecified_host_ports_alone_touch_nothing(node: Node, ports: list[Any]) -> None:
    pod = node.pod()
    call = config(pod, *(mapping(port, 80, "UDP") for port in ports), {"containerPort": 81})
    assert node.cni("ADD", pod, call).json == call["prevResult"]
    assert node.nft("list ruleset") == ""


@pytest.mark.parametrize(
    ("wanted", "keys", "code"),
    [
        ([mapping(9090), mapping(70000)], {}, 7),
        ([mapping(9090), mapping(9091, 0)], {}, 7),
        ([mapping(9090), mapping(9090, 81)], {}, 7),
        *(
            ([mapping(9090)], {"conditionsV4": tokens}, 101)
            for tokens in (
                ["foo", "bar"],
                ["ip", "saddr"],
                ["ip", "saddr", "300.0.0.1"],
                ["ip", "saddr", "{", "192.0.2.7"],
                ["}"],
                ["accept"],
            )
        ),
        ([mapping(9090)], {"conditionsV6": ["ip6", "saddr", "@nothing"]}, 101),
    ],
)
def test_what_is_wrong_in_part_installs_nothing(
    node: Node, wanted: list[dict[str, Any]], keys: dict[str, Any], code: int
) -> None:
    pod, other = node.pod(), node.pod()
    call = config(other, mapping(8080), *wanted, **keys)
    assert node.cni("ADD", other, call).code == code
    assert node.nft("list ruleset") == ""
    node.add(pod, mapping(7070))
    before = node.nft("-sa list ruleset")
    assert node.cni("ADD", other, call).code == code
    assert node.nft("-sa list ruleset") == before
