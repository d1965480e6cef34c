from __future__ import annotations

from typing import Any

import pytest
from lab import Node, config, mapping

BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
WEB = {"CONTAINERID": "web", "NETNS": "/ns/web", "ARGS": "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"}
MANY = range(8000, 8017)

SETS = """\
    set local_ip4 {
        type ipv4_addr
        size 65535
        flags dynamic,timeout
        timeout 1m
    }

    set local_ip6 {
        type ipv6_addr
        size 65535
        flags dynamic,timeout
        timeout 1m
    }
"""

BASE = """\
    chain dispatch {
        ip6 daddr ::1 return
        ip daddr != 127.0.0.0/8 update @local_ip4 { ip daddr }
        update @local_ip6 { ip6 daddr }
        ip daddr . meta l4proto . th dport vmap @hostports_ip4
        ip6 daddr . meta l4proto . th dport vmap @hostports_ip6
        meta nfproto . meta l4proto . th dport vmap @hostports
    }

    chain prerouting {
        type nat hook prerouting priority -101; policy accept;
        fib daddr type local goto dispatch
    }

    chain output {
        type nat hook output priority -101; policy accept;
        fib daddr type local goto dispatch
    }

    chain postrouting {
        type nat hook postrouting priority 100; policy accept;
        ct status dnat ct original ip daddr 127.0.0.0/8 ip daddr vmap @pods_ip4
        ct status dnat ct original ip daddr @local_ip4 ip daddr vmap @pods_ip4
        ct status dnat ct original ip6 daddr @local_ip6 ip6 daddr vmap @pods_ip6
    }

    chain loopback {
        type filter hook prerouting priority -300; policy accept;
        iifname != "lo" ip daddr 127.0.0.0/8 drop
        iifname != "lo" ip saddr 127.0.0.0/8 drop
    }
"""

DUAL_STACK = f"""\
table inet hostport {{
    comment "CNI hostport plugin"
    map hostports {{
        type nf_proto . inet_proto . inet_service : verdict
        elements = {{ ipv4 . tcp . 8080 comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6,
                 ipv6 . tcp . 8080 comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6,
                 ipv4 . sctp . 8080 comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map hostports_ip4 {{
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = {{ 192.0.2.1 . udp . 53 comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map hostports_ip6 {{
        type ipv6_addr . inet_proto . inet_service : verdict
        elements = {{ 2001:db8::1 . udp . 53 comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map pods_ip4 {{
        type ipv4_addr : verdict
        elements = {{ 10.88.0.2 : goto masq-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map pods_ip6 {{
        type ipv6_addr : verdict
        elements = {{ fd00:88::2 : goto masq-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

{SETS}
{BASE}
    chain dnat-664b16ffde93ac1d-f00e7030770b04e6 {{
        ip daddr 192.0.2.1 udp dport 53 dnat ip to 10.88.0.2:5353 comment "shop/web"
        meta nfproto ipv4 tcp dport 8080 dnat ip to 10.88.0.2:80 comment "shop/web"
        meta nfproto ipv4 sctp dport 8080 dnat ip to 10.88.0.2:80 comment "shop/web"
        ip6 daddr 2001:db8::1 udp dport 53 dnat ip6 to [fd00:88::2]:5354 comment "shop/web"
        meta nfproto ipv6 tcp dport 8080 dnat ip6 to [fd00:88::2]:80 comment "shop/web"
    }}

    chain masq-664b16ffde93ac1d-f00e7030770b04e6 {{
        ip saddr 127.0.0.0/8 masquerade
        ip saddr 10.88.0.0/24 masquerade
        ip6 saddr fd00:88::/64 masquerade
    }}
}}
"""

_ELEMENTS = ",\n                 ".join(
    f'ipv4 . tcp . {port} comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6' for port in MANY
)
_TARGETS = ", ".join(f"tcp . {port} : 10.88.0.2 . 80" for port in MANY)
MAP_FORM = f"""\
table inet hostport {{
    comment "CNI hostport plugin"
    map hostports {{
        type nf_proto . inet_proto . inet_service : verdict
        elements = {{ {_ELEMENTS} }}
    }}

    map hostports_ip4 {{
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = {{ 192.0.2.1 . tcp . 8000 comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map hostports_ip6 {{
        type ipv6_addr . inet_proto . inet_service : verdict
    }}

    map pods_ip4 {{
        type ipv4_addr : verdict
        elements = {{ 10.88.0.2 : goto masq-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map pods_ip6 {{
        type ipv6_addr : verdict
    }}

{SETS}
{BASE}
    chain dnat-664b16ffde93ac1d-f00e7030770b04e6 {{
        ip saddr != 203.0.113.0/24 dnat ip to ip daddr . meta l4proto . th dport map \
{{ 192.0.2.1 . tcp . 8000 : 10.88.0.2 . 81 }} comment "shop/web"
        ip saddr != 203.0.113.0/24 dnat ip to meta l4proto . th dport map {{ {_TARGETS} }} comment "shop/web"
    }}

    chain masq-664b16ffde93ac1d-f00e7030770b04e6 {{
        meta nfproto ipv4 masquerade
    }}
}}
"""
DUAL_STACK_MAPPINGS = [
    mapping(8080),
    mapping(8080, 80, "sctp", hostIP="0.0.0.0"),
    mapping(53, 5353, "udp", hostIP="192.0.2.1"),
    mapping(53, 5354, "udp", hostIP="2001:db8::1"),
]
MANY_MAPPINGS = [*(mapping(port) for port in MANY), mapping(8000, 81, hostIP="192.0.2.1")]


def table(node: Node) -> str:
    return node.nft("-s -y list table inet hostport").expandtabs(4)


@pytest.mark.parametrize(
    ("families", "mappings", "keys", "expected"),
    [
        ((4, 6), DUAL_STACK_MAPPINGS, {}, DUAL_STACK),
        (
            (4,),
            MANY_MAPPINGS,
            {"masqAll": True, "conditionsV4": ["ip", "saddr", "!=", "203.0.113.0/24"]},
            MAP_FORM,
        ),
    ],
    ids=["dual stack", "map form"],
)
def test_the_complete_ruleset_stays_one_copy_when_add_is_repeated(
    node: Node, families: tuple[int, ...], mappings: list[dict[str, Any]], keys: dict[str, Any], expected: str
) -> None:
    pod = node.pod(*families)
    for _ in range(2):
        assert node.cni("ADD", pod, config(pod, *mappings, **keys), **WEB).code == 0
        assert table(node) == expected


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
    before = [node.nft(f"-a list {what}") for what in foreign]
    pod = node.pod()
    node.add(pod, mapping(8080), mapping(9090))
    node.add(pod, mapping(8080))
    assert node.cni("CHECK", pod, config(pod, mapping(8080))).code == 0
    assert node.cni("STATUS", None, BARE).code == 0
    assert node.cni("GC", None, {**BARE, "cni.dev/valid-attachments": None}).code == 0
    node.delete(pod)
    assert [node.nft(f"-a list {what}") for what in foreign] == before


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
    assert sorted(node.ruleset().splitlines()) == sorted(before.splitlines())  # a chain added again comes last


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
    before = node.nft("-a list ruleset")
    assert node.cni("ADD", other, call).code == code
    assert node.nft("-a list ruleset") == before
