# ruff: noqa: E501 - nft's output, written out whole
from __future__ import annotations

from typing import Any

import pytest
from lab import Node, alike, config, mapping

WEB = {"CONTAINERID": "web", "NETNS": "/ns/web", "ARGS": "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"}
MANY = range(8000, 8017)

SETS = """\
    map waiting_hostports {
        typeof ip6 daddr . meta nfproto . meta l4proto . th dport : verdict
    }

    map waiting_hostports_ip4 {
        typeof ip6 daddr . ip daddr . meta l4proto . th dport : verdict
    }

    map waiting_hostports_ip6 {
        typeof ip6 daddr . ip6 daddr . meta l4proto . th dport : verdict
    }

    map localnet_needs {
        typeof ip6 daddr : verdict
        elements = { 664b:16ff:de93:ac1d:f00e:7030:770b:4e6 : goto localnet-3 }
    }

    set ipvs_ip4 {
        typeof ip daddr
    }

    set ipvs_ip6 {
        typeof ip6 daddr
    }

    set localnet {
        typeof iif
        elements = { "cni0" comment "opened" }
    }

    set local_ip4 {
        typeof ip daddr
        size 65535
        flags dynamic,timeout
        timeout 1m
    }

    set local_ip6 {
        typeof ip6 daddr
        size 65535
        flags dynamic,timeout
        timeout 1m
    }

    set deleted {
        typeof ip6 daddr
        timeout 10m
    }
"""

BASE = """\
    chain dispatch {
        ip6 daddr ::1 return
        ip6 daddr fe80::/10 return
        ip daddr != 127.0.0.0/8 update @local_ip4 { ip daddr }
        update @local_ip6 { ip6 daddr }
        ip daddr . meta l4proto . th dport vmap @hostports_ip4
        ip6 daddr . meta l4proto . th dport vmap @hostports_ip6
        ip daddr @ipvs_ip4 return
        ip6 daddr @ipvs_ip6 return
        meta nfproto . meta l4proto . th dport vmap @hostports
    }

    chain prerouting {
        type nat hook prerouting priority -99; policy accept;
        iifname != "lo" ip daddr 127.0.0.0/8 return
        fib daddr type local goto dispatch
    }

    chain output {
        type nat hook output priority -99; policy accept;
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
        iif @localnet ip daddr 127.0.0.0/8 drop
        iif @localnet ip saddr 127.0.0.0/8 drop
    }

    chain localnet-3 {
    }
"""

DUAL_STACK = f"""\
table inet hostport {{
    comment "CNI hostport plugin"
    map hostports {{
        typeof meta nfproto . meta l4proto . th dport : verdict
        counter
        elements = {{ ipv4 . tcp . 8080 counter comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6,
                 ipv6 . tcp . 8080 counter comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6,
                 ipv4 . sctp . 8080 counter comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map hostports_ip4 {{
        typeof ip daddr . meta l4proto . th dport : verdict
        counter
        elements = {{ 192.0.2.1 . udp . 53 counter comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map hostports_ip6 {{
        typeof ip6 daddr . meta l4proto . th dport : verdict
        counter
        elements = {{ 2001:db8::1 . udp . 53 counter comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map dynamic_ports {{
        typeof meta nfproto . meta l4proto . th dport : verdict
    }}

    map pods_ip4 {{
        typeof ip daddr : verdict
        elements = {{ 10.88.0.2 comment "pods" : goto masq-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map pods_ip6 {{
        typeof ip6 daddr : verdict
        elements = {{ fd00:88::2 comment "pods" : goto masq-664b16ffde93ac1d-f00e7030770b04e6 }}
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
    f'ipv4 . tcp . {port} counter comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6'
    for port in MANY
)
_TARGETS = ",\n                 ".join(f"tcp . {port} : 10.88.0.2 . 80" for port in MANY)
MAP_FORM = f"""\
table inet hostport {{
    comment "CNI hostport plugin"
    map hostports {{
        typeof meta nfproto . meta l4proto . th dport : verdict
        counter
        elements = {{ {_ELEMENTS} }}
    }}

    map hostports_ip4 {{
        typeof ip daddr . meta l4proto . th dport : verdict
        counter
        elements = {{ 192.0.2.1 . tcp . 8000 counter comment "web eth0 /ns/web" : goto dnat-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map hostports_ip6 {{
        typeof ip6 daddr . meta l4proto . th dport : verdict
        counter
    }}

    map dynamic_ports {{
        typeof meta nfproto . meta l4proto . th dport : verdict
    }}

    map pods_ip4 {{
        typeof ip daddr : verdict
        elements = {{ 10.88.0.2 comment "pods" : goto masq-664b16ffde93ac1d-f00e7030770b04e6 }}
    }}

    map pods_ip6 {{
        typeof ip6 daddr : verdict
    }}

{SETS}
    map given_ip4-664b16ffde93ac1d-f00e7030770b04e6 {{
        typeof ip daddr . meta l4proto . th dport : ip daddr . th dport
        elements = {{ 192.0.2.1 . tcp . 8000 : 10.88.0.2 . 81 }}
    }}

    map any_ip4-664b16ffde93ac1d-f00e7030770b04e6 {{
        typeof meta l4proto . th dport : ip daddr . th dport
        elements = {{ {_TARGETS} }}
    }}

{BASE}
    chain dnat-664b16ffde93ac1d-f00e7030770b04e6 {{
        ip saddr != 203.0.113.0/24 dnat ip to ip daddr . meta l4proto . th dport map \
@given_ip4-664b16ffde93ac1d-f00e7030770b04e6 comment "shop/web"
        ip saddr != 203.0.113.0/24 dnat ip to meta l4proto . th dport map \
@any_ip4-664b16ffde93ac1d-f00e7030770b04e6 comment "shop/web"
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
    return alike(node.nft("-s -y list table inet hostport")).expandtabs(4)


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
        assert table(node) == alike(expected)
