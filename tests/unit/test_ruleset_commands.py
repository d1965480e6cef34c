# ruff: noqa: E501 - nft commands, written out whole
from __future__ import annotations

from ipaddress import ip_interface
from typing import TYPE_CHECKING, Any

import pytest
from lab import mapping

from cni_hostport.attachment import Attachment
from cni_hostport.config import NetworkConfig
from cni_hostport.ruleset import plan
from cni_hostport.ruleset.commands import attach_commands

if TYPE_CHECKING:
    from collections.abc import Mapping

ANY4 = "0.0.0.0"
BOTH = ("10.1.0.2/24", "fd00::2/64")


def attach(*mappings: Mapping[str, Any], pod: tuple[str, ...] = BOTH[:1], name: str = "", **keys: Any) -> str:
    attachment = Attachment("pods", "c1", "eth0", "/run/netns/c1", name)
    config = NetworkConfig.parse({"prevResult": {}, "runtimeConfig": {"portMappings": list(mappings)}, **keys})
    planned = plan.Request(config, [ip_interface(address) for address in pod]).plan()
    return "\n".join(attach_commands(attachment, planned)).replace(attachment.key, "N-A")


def test_one_mapping_of_an_ipv4_pod() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv4 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(8080)) == expected.strip()


def test_a_dual_stack_pod_with_every_protocol_is_labelled_with_its_name() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80 comment "default/web"
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto udp th dport 53 dnat ip to 10.1.0.2:5353 comment "default/web"
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto sctp th dport 9 dnat ip to 10.1.0.2:90 comment "default/web"
add rule inet hostport dnat-N-A meta nfproto ipv6 meta l4proto tcp th dport 8080 dnat ip6 to [fd00::2]:80 comment "default/web"
add rule inet hostport dnat-N-A meta nfproto ipv6 meta l4proto udp th dport 53 dnat ip6 to [fd00::2]:5353 comment "default/web"
add rule inet hostport dnat-N-A meta nfproto ipv6 meta l4proto sctp th dport 9 dnat ip6 to [fd00::2]:90 comment "default/web"
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
add rule inet hostport masq-N-A ip6 saddr fd00::/64 masquerade
create element inet hostport pods_ip6 { fd00::2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv4 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv6 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv4 . udp . 53 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv6 . udp . 53 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv4 . sctp . 9 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv6 . sctp . 9 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert (
        attach(mapping(8080), mapping(53, 5353, "udp"), mapping(9, 90, "sctp"), pod=BOTH, name="default/web")
        == expected.strip()
    )


def test_a_host_address_of_each_family_stands_in_its_own_map() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 ip daddr 192.0.2.1 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport dnat-N-A meta nfproto ipv6 ip6 daddr 2001:db8::1 meta l4proto tcp th dport 8080 dnat ip6 to [fd00::2]:80
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
add rule inet hostport masq-N-A ip6 saddr fd00::/64 masquerade
create element inet hostport pods_ip6 { fd00::2 comment "pods" : goto masq-N-A }
create element inet hostport hostports_ip4 { 192.0.2.1 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
create element inet hostport hostports_ip6 { 2001:db8::1 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(8080, hostIP="192.0.2.1"), mapping(8080, hostIP="2001:db8::1"), pod=BOTH) == expected.strip()


def test_every_ipv4_address_is_a_wildcard_of_ipv4_only() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv4 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(8080, hostIP=ANY4), pod=BOTH) == expected.strip()


def test_every_ipv6_address_is_a_wildcard_of_ipv6_only() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv6 meta l4proto tcp th dport 8080 dnat ip6 to [fd00::2]:80
add rule inet hostport masq-N-A ip6 saddr fd00::/64 masquerade
create element inet hostport pods_ip6 { fd00::2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv6 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(8080, hostIP="::"), pod=BOTH) == expected.strip()


def test_a_loopback_host_address_is_one_like_others() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 ip daddr 127.0.0.1 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
create element inet hostport hostports_ip4 { 127.0.0.1 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(8080, hostIP="127.0.0.1")) == expected.strip()


def test_two_host_ports_lead_to_one_container_port() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 8081 dnat ip to 10.1.0.2:80
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv4 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv4 . tcp . 8081 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(8080), mapping(8081)) == expected.strip()


def test_one_port_in_tcp_and_udp_leads_to_different_targets() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 53 dnat ip to 10.1.0.2:1053
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto udp th dport 53 dnat ip to 10.1.0.2:2053
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv4 . tcp . 53 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv4 . udp . 53 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(53, 1053), mapping(53, 2053, "udp")) == expected.strip()


def test_one_host_port_on_two_host_addresses_and_the_wildcard_tries_the_wildcard_last() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 ip daddr 192.0.2.1 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport dnat-N-A meta nfproto ipv4 ip daddr 127.0.0.1 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:81
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:82
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv4 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
create element inet hostport hostports_ip4 { 192.0.2.1 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, 127.0.0.1 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert (
        attach(mapping(8080, 82), mapping(8080, 80, hostIP="192.0.2.1"), mapping(8080, 81, hostIP="127.0.0.1"))
        == expected.strip()
    )


def test_without_snat_nothing_is_masqueraded() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport dnat-N-A meta nfproto ipv6 meta l4proto tcp th dport 8080 dnat ip6 to [fd00::2]:80
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
create element inet hostport pods_ip6 { fd00::2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv4 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv6 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(8080), pod=BOTH, snat=False) == expected.strip()


def test_masqall_masquerades_every_connection() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport dnat-N-A meta nfproto ipv6 meta l4proto tcp th dport 8080 dnat ip6 to [fd00::2]:80
add rule inet hostport masq-N-A meta nfproto ipv4 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
add rule inet hostport masq-N-A meta nfproto ipv6 masquerade
create element inet hostport pods_ip6 { fd00::2 comment "pods" : goto masq-N-A }
create element inet hostport hostports { ipv4 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv6 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert attach(mapping(8080), pod=BOTH, masqAll=True) == expected.strip()


def test_conditions_come_first_in_every_rule_of_their_family() -> None:
    expected = """
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add rule inet hostport dnat-N-A meta nfproto ipv4 ip saddr 198.51.100.0/24 ip daddr 192.0.2.1 meta l4proto tcp th dport 8080 dnat ip to 10.1.0.2:80
add rule inet hostport dnat-N-A meta nfproto ipv4 ip saddr 198.51.100.0/24 meta l4proto tcp th dport 8081 dnat ip to 10.1.0.2:80
add rule inet hostport dnat-N-A meta nfproto ipv6 iifname "eth0" meta l4proto tcp th dport 8081 dnat ip6 to [fd00::2]:80
add rule inet hostport masq-N-A ip saddr 127.0.0.0/8 masquerade
add rule inet hostport masq-N-A ip saddr 10.1.0.0/24 masquerade
create element inet hostport pods_ip4 { 10.1.0.2 comment "pods" : goto masq-N-A }
add rule inet hostport masq-N-A ip6 saddr fd00::/64 masquerade
create element inet hostport pods_ip6 { fd00::2 comment "pods" : goto masq-N-A }
create element inet hostport hostports_ip4 { 192.0.2.1 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
create element inet hostport hostports { ipv4 . tcp . 8081 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A, ipv6 . tcp . 8081 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }
"""
    assert (
        attach(
            mapping(8080, hostIP="192.0.2.1"),
            mapping(8081),
            pod=BOTH,
            conditionsV4=["ip", "saddr", "198.51.100.0/24"],
            conditionsV6=["iifname", '"eth0"'],
        )
        == expected.strip()
    )


def test_more_than_16_mappings_of_a_family_are_one_rule_with_a_map_for_each_kind() -> None:
    many = [mapping(port, 80) for port in range(8001, 8017)]
    targets = ", ".join(f"tcp . {port} : 10.1.0.2 . 80" for port in range(8001, 8017))
    owners = ", ".join(
        f'ipv4 . tcp . {port} comment "c1 eth0 /run/netns/c1" : goto dnat-N-A' for port in range(8001, 8017)
    )
    expected = f"""
create chain inet hostport dnat-N-A
create chain inet hostport masq-N-A
add map inet hostport given_ip4-N-A {{ typeof ip daddr . meta l4proto . th dport : ip daddr . th dport; }}
delete map inet hostport given_ip4-N-A
add map inet hostport given_ip4-N-A {{ typeof ip daddr . meta l4proto . th dport : ip daddr . th dport; }}
create element inet hostport given_ip4-N-A {{ 192.0.2.1 . udp . 53 : 10.1.0.2 . 5353 }}
add map inet hostport any_ip4-N-A {{ typeof meta l4proto . th dport : ip daddr . th dport; }}
delete map inet hostport any_ip4-N-A
add map inet hostport any_ip4-N-A {{ typeof meta l4proto . th dport : ip daddr . th dport; }}
create element inet hostport any_ip4-N-A {{ {targets} }}
add rule inet hostport dnat-N-A meta nfproto ipv4 iif "lo" dnat ip to ip daddr . meta l4proto . th dport map @given_ip4-N-A comment "web"
add rule inet hostport dnat-N-A meta nfproto ipv4 iif "lo" dnat ip to meta l4proto . th dport map @any_ip4-N-A comment "web"
create element inet hostport pods_ip4 {{ 10.1.0.2 comment "pods" : goto masq-N-A }}
create element inet hostport hostports {{ {owners} }}
create element inet hostport hostports_ip4 {{ 192.0.2.1 . udp . 53 comment "c1 eth0 /run/netns/c1" : goto dnat-N-A }}
"""
    given = mapping(53, 5353, "udp", hostIP="192.0.2.1")
    assert attach(*many, given, name="web", snat=False, conditionsV4=["iif", '"lo"']) == expected.strip()


@pytest.mark.parametrize(
    ("host_ip", "expected", "elements"),
    [
        (
            "",
            "dnat ip6 to meta l4proto . th dport map @any_ip6-N-A",
            "any_ip6-N-A { tcp . 1 : fd00::2 . 80, tcp . 2 : fd00::2 . 80, ",
        ),
        (
            "2001:db8::1",
            "dnat ip6 to ip6 daddr . meta l4proto . th dport map @given_ip6-N-A",
            "given_ip6-N-A { 2001:db8::1 . tcp . 1 : fd00::2 . 80, ",
        ),
    ],
)
def test_many_mappings_of_one_kind_are_one_rule(host_ip: str, expected: str, elements: str) -> None:
    commands = attach(*(mapping(port, hostIP=host_ip) for port in range(1, 18)), pod=BOTH[1:])
    (rule,) = (line for line in commands.splitlines() if line.startswith("add rule inet hostport dnat-N-A"))
    assert rule == f"add rule inet hostport dnat-N-A meta nfproto ipv6 {expected}"
    assert f"create element inet hostport {elements}" in commands


@pytest.mark.parametrize(("mappings", "rules"), [(16, 32), (17, 2)])
def test_each_family_may_have_16_rules(mappings: int, rules: int) -> None:
    commands = attach(*(mapping(port) for port in range(1, mappings + 1)), pod=BOTH)
    assert commands.count("add rule inet hostport dnat-N-A") == rules
