from __future__ import annotations

import re
import resource
from collections import Counter
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
from dynamic_ports import PORTS, asking
from hostport_list import add, hosts, listed, shown, targets
from lab import LAUNCHER, NODE4, NODE6, Node, config, key_of, mapping

from cni_hostport.attachment import Attachment
from cni_hostport.ruleset import base, plan
from cni_hostport.ruleset.commands import attach_commands

if TYPE_CHECKING:
    from collections.abc import Sequence

WEB = "shop/web-7d4b9c-x2x1z"
HAND_MADE = """
table inet hostport {
    map marks {
        type ipv4_addr : mark
        elements = { 192.0.2.7 : 7 }
    }
    map names_ip6 {
        type ifname : verdict
        elements = { "eth0" : accept }
    }
    chain dnat-mine {
        meta nfproto ipv4 dnat ip to 192.0.2.7
        ip daddr 192.0.2.1 tcp dport 84 dnat ip to numgen inc mod 2 map { 0 : 192.0.2.7, 1 : 192.0.2.8 }
        meta nfproto ipv4 tcp dport { 1, 84 } dnat ip to 192.0.2.7:80
        meta nfproto ipv4 tcp dport 84 dnat ip to 192.0.2.7-192.0.2.9:80-90
        tcp dport 84 redirect to :80
        counter comment "mine"
    }
    chain other { accept; }
}
add element inet hostport hostports { ipv4 . tcp . 81 : drop }
add element inet hostport hostports { ipv4 . tcp . 82 : jump other }
add element inet hostport hostports { 7 . tcp . 83 : goto dnat-mine }
add element inet hostport hostports { ipv4 . tcp . 84 comment "by hand" : goto dnat-mine }
add element inet hostport hostports { ipv4 . 200 . 85 : goto dnat-mine }
add element inet hostport pods_ip4 { 192.0.2.7 comment "mine" : goto other }
"""


def test_a_node_without_a_table_has_no_host_ports(node: Node) -> None:
    ran = node.run(*LAUNCHER, "list")
    assert (ran.stdout, ran.stderr) == ("", "No host ports.\n")
    assert listed(node) == []
    assert node.nft("list ruleset") == ""


def test_a_mapping_has_all_its_parts_in_json(node: Node) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    add(node, pod, WEB, mapping(8080))
    node.client.ask("tcp", NODE6, 8080)
    both = {
        "protocol": "tcp", "host_port": 8080, "pod_port": 80, "request": "", "pod": WEB, "pod_id": "",
        "container_id": pod.id, "ifname": "eth0", "network": "pods", "netns": pod.path, "holder": "alive",
        "key": key_of(pod),
    }  # fmt: skip
    assert listed(node) == [
        both | {"host_ip": "0.0.0.0", "pod_ip": pod.ip4, "connections": 0},
        both | {"host_ip": "::", "pod_ip": pod.ip6, "connections": 1},
    ]
    assert [*listed(node)[0]] == [
        "protocol", "host_ip", "host_port", "pod_ip", "pod_port", "request", "pod", "pod_id", "container_id", "ifname",
        "network", "netns", "holder", "connections", "key",
    ]  # fmt: skip


def test_a_mapping_is_one_line_of_the_table(node: Node) -> None:
    pod = node.pod(4)
    add(node, pod, WEB, mapping(8080))
    headings, values = node.run(*LAUNCHER, "list").stdout.splitlines()
    assert re.split("  +", headings) == [
        "HOST", "POD ADDRESS", "POD", "CONTAINER", "INTERFACE", "NETWORK", "DYNAMIC", "CONNECTIONS", "HOLDER"
    ]  # fmt: skip
    assert values.split() == ["0.0.0.0:8080/tcp", f"{pod.ip4}:80", WEB, pod.id[:12], "eth0", "pods", "-", "0", "alive"]


def test_a_dynamic_port_is_listed_with_what_the_pod_asked_for(node: Node) -> None:
    pod, other = node.pod(), node.pod(4)
    asked = config(pod, **asking(f"80, 9000-9001/udp, {NODE4}:443, [{NODE6}]:443", mapping(8080)))
    uid = f"{pod.name}-uid"
    args = f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID={uid}"
    assert node.cni("ADD", pod, asked, ARGS=args).code == 0
    node.add(other, **asking("80"))
    assert Counter(row[6] for row in shown(node)[1:]) == {
        "-": 2, "80/tcp": 3, "9000/udp": 2, "9001/udp": 2, f"{NODE4}:443/tcp": 1, f"[{NODE6}]:443/tcp": 1,
    }  # fmt: skip
    mappings = listed(node)
    assert {(item["pod_port"], item["protocol"], item["request"], item["pod_id"]) for item in mappings} == {
        (80, "tcp", "", ""), (80, "tcp", "80/tcp", uid), (80, "tcp", "80/tcp", other.id),
        (9000, "udp", "9000/udp", uid), (9001, "udp", "9001/udp", uid),
        (443, "tcp", f"{NODE4}:443/tcp", uid), (443, "tcp", f"[{NODE6}]:443/tcp", uid),
    }  # fmt: skip
    assert all((item["host_port"] in PORTS) == bool(item["request"]) for item in mappings)


def test_a_port_is_not_called_dynamic_for_what_leads_to_another_attachment(node: Node) -> None:
    pod, other = node.pod(4), node.pod(4)
    node.add(pod, mapping(8080))
    node.add(other, mapping(8081))
    element = f'{{ ipv4 . tcp . 8080 comment "80/tcp u1" : goto dnat-{key_of(other)} }}'
    node.nft_file(f"add element inet hostport dynamic_ports {element}")
    assert [row[6] for row in shown(node)[1:]] == ["-", "-"]
    assert [item["pod_id"] for item in listed(node)] == ["", ""]


def test_mappings_are_in_the_order_of_ports_protocols_and_addresses(node: Node) -> None:
    item, other = node.pod(), node.pod()
    node.add(item, mapping(9000), mapping(53, 53, "udp"), mapping(53, 53), mapping(9000, 81, "sctp"))
    node.add(other, mapping(8080, hostIP=NODE6), mapping(53, 54, "udp", hostIP=NODE4), mapping(10000))
    assert hosts(node) == [
        "0.0.0.0:53/tcp", "[::]:53/tcp", "0.0.0.0:53/udp", f"{NODE4}:53/udp", "[::]:53/udp", f"[{NODE6}]:8080/tcp",
        "0.0.0.0:9000/sctp", "[::]:9000/sctp", "0.0.0.0:9000/tcp", "[::]:9000/tcp", "0.0.0.0:10000/tcp",
        "[::]:10000/tcp",
    ]  # fmt: skip


@pytest.mark.parametrize("snat", [True, False])
def test_each_address_of_a_port_shows_where_it_leads(node: Node, snat: bool) -> None:
    pod = node.pod()
    node.add(
        pod, mapping(8080), mapping(8080, 81, hostIP=NODE4), mapping(8080, 82, hostIP=NODE6), mapping(8080, 83, "udp"),
        snat=snat,
    )  # fmt: skip
    assert targets(node) == {
        "0.0.0.0:8080/tcp": f"{pod.ip4}:80",
        f"{NODE4}:8080/tcp": f"{pod.ip4}:81",
        "[::]:8080/tcp": f"[{pod.ip6}]:80",
        f"[{NODE6}]:8080/tcp": f"[{pod.ip6}]:82",
        "0.0.0.0:8080/udp": f"{pod.ip4}:83",
        "[::]:8080/udp": f"[{pod.ip6}]:83",
    }
    assert {row[5] for row in shown(node)[1:]} == {"pods"}


def test_each_of_more_mappings_than_rules_are_made_for_shows_where_it_leads(node: Node) -> None:
    pod = node.pod()
    ports = range(8000, 8020)
    mappings = [mapping(port, port - 7000, ("tcp", "udp", "sctp")[port % 3]) for port in ports]
    add(node, pod, WEB, *mappings, *(mapping(port, 99, hostIP=NODE4) for port in ports))
    found = targets(node)
    assert len(found) == 60
    for item in mappings:
        where = f"{item['hostPort']}/{item['protocol']}"
        assert found[f"0.0.0.0:{where}"] == f"{pod.ip4}:{item['containerPort']}"
        assert found[f"[::]:{where}"] == f"[{pod.ip6}]:{item['containerPort']}"
        assert found[f"{NODE4}:{item['hostPort']}/tcp"] == f"{pod.ip4}:99"
    assert {item["pod"] for item in listed(node)} == {WEB}


@pytest.mark.parametrize(
    "condition",
    [
        f"ip daddr {NODE4}",
        "ip daddr != 198.51.100.1",
        f"ip daddr {{ {NODE4} , 198.51.100.1 }}",
        "ip daddr 192.0.2.0/24",
        "tcp dport 8080",
        "th dport 8081",
        "tcp dport 8000-9000",
        "tcp dport { 8080 , 8081 }",
        "meta l4proto tcp",
        "meta l4proto { tcp , udp }",
        f"ip daddr . tcp dport {{ {NODE4} . 8080 }}",
        "ip saddr 203.0.113.0/24",
        "ct state new",
    ],
)
def test_what_conditions_compare_is_not_taken_for_the_mapping(node: Node, condition: str) -> None:
    pod = node.pod(4)
    mappings = mapping(8080), mapping(8080, 81, hostIP=NODE4), mapping(8081, 82), mapping(53, 53, "udp")
    node.add(pod, *mappings, conditionsV4=condition.split())
    assert targets(node) == {
        "0.0.0.0:53/udp": f"{pod.ip4}:53",
        "0.0.0.0:8080/tcp": f"{pod.ip4}:80",
        f"{NODE4}:8080/tcp": f"{pod.ip4}:81",
        "0.0.0.0:8081/tcp": f"{pod.ip4}:82",
    }


def test_each_mapping_counts_its_connections(node: Node) -> None:
    pod, many = node.pod(4), node.pod(4)
    ports = range(8000, 8020)
    pod.serve("tcp", 80, "web")
    pod.serve("udp", 53, "dns")
    many.serve("tcp", 80, "many")
    node.add(pod, mapping(80), mapping(53, 53, "udp"), mapping(81, hostIP=NODE4))
    node.add(many, *map(mapping, ports))
    made = {("tcp", 80): 5, ("udp", 53): 2, ("tcp", 81): 1} | {("tcp", port): port % 4 for port in ports}
    for (protocol, port), connections in made.items():
        for number in range(connections):
            node.client.ask(protocol, NODE4, port, source_port=30000 + number)
    assert {(item["protocol"], item["host_port"]): item["connections"] for item in listed(node)} == made


def test_a_holder_is_alive_or_gone_or_of_an_unknown_namespace(node: Node) -> None:
    alive, absent, unknown = node.pod(4), node.pod(4), node.pod(4)
    for port, pod in ((1, alive), (2, absent), (3, unknown)):
        node.add(pod, mapping(port))
    replaced = node.nft("list map inet hostport hostports").replace(f" {unknown.path}", "")
    node.nft_file("flush map inet hostport hostports\n" + replaced)
    absent.remove()
    assert [item["holder"] for item in listed(node)] == ["alive", "gone", "unknown"]
    assert [row[-1] for row in shown(node)[1:]] == ["alive", "gone", "unknown"]


def test_a_port_whose_rules_are_gone_leads_nowhere(node: Node) -> None:
    pod = node.pod()
    add(node, pod, WEB, mapping(80), mapping(81, hostIP=NODE4))
    node.nft(f"flush chain inet hostport dnat-{key_of(pod)}")
    assert targets(node) == {"0.0.0.0:80/tcp": "-", "[::]:80/tcp": "-", f"{NODE4}:81/tcp": "-"}
    assert {(item["pod_ip"], item["pod_port"]) for item in listed(node)} == {(None, None)}


def test_what_others_added_to_the_table_is_listed_only_if_it_leads_to_an_attachment(node: Node) -> None:
    pod = node.pod(4)
    add(node, pod, WEB, mapping(80))
    node.nft_file(HAND_MADE)
    node.nft(f'add rule inet hostport dnat-{key_of(pod)} counter comment "of somebody else"')
    assert [[*row[:5], row[-1]] for row in shown(node)[1:]] == [
        ["0.0.0.0:80/tcp", f"{pod.ip4}:80", WEB, pod.id[:12], "eth0", "alive"],
        ["0.0.0.0:84/tcp", "-", "mine", "by", "hand", "unknown"],
        ["0.0.0.0:85/200", "-", "mine", "-", "-", "unknown"],
    ]


def attach(numbers: Sequence[int]) -> str:
    commands = base.base_commands()
    for number in numbers:
        pod_ip = ip_address(f"10.1.{number // 256}.{number % 256}")
        owner = Attachment("pods", f"{number:064x}", "eth0", f"/run/netns/{number:032x}", f"shop/web-{number}")
        commands += attach_commands(owner, plan.Plan((plan.Forward("tcp", None, number, pod_ip, 80),), {pod_ip: ()}))
    return "\n".join(commands)


def test_a_port_whose_number_is_that_of_a_protocol_is_a_port(node: Node) -> None:
    node.add(node.pod(4), *map(mapping, (6, 17, 132)))
    assert hosts(node) == ["0.0.0.0:6/tcp", "0.0.0.0:17/tcp", "0.0.0.0:132/tcp"]


def processor_time() -> float:
    """Return the seconds that processes which have ended took of a processor: others do not change them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_thousand_mappings_are_listed_in_seconds(node: Node) -> None:
    node.nft_file(attach(range(1001, 2001)))
    before = processor_time()
    found = shown(node)[1:]
    assert processor_time() - before < 5
    assert [row[1] for row in found] == [f"10.1.{number // 256}.{number % 256}:80" for number in range(1001, 2001)]
    assert hosts(node, "--port", "1777") == ["0.0.0.0:1777/tcp"]
