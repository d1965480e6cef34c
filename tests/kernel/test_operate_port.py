from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from dynamic_ports import PORTS, asking
from hostport_list import add, listed
from lab import CLIENT4, LAUNCHER, NODE4, Node, key_of, mapping

if TYPE_CHECKING:
    import subprocess

WEB, DNS = "shop/web-7d4b9c-x2x1z", "kube-system/dns"


def port(node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    return node.run(*LAUNCHER, "port", *arguments, check=False)


def shown(node: Node, *arguments: str) -> list[str]:
    ran = port(node, *arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


def refusal(node: Node, *arguments: str) -> str:
    ran = port(node, *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    return ran.stderr


def in_json(node: Node, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(port(node, *arguments, "--json").stdout)
    return found


@pytest.fixture
def _pod(node: Node) -> None:
    """A pod with fixed and with dynamic host ports."""
    made = node.pod()
    made.serve("tcp", 80, "web")
    fixed = mapping(8080), mapping(53, 53, "udp", hostIP=NODE4), mapping(8081, hostIP=NODE4)
    add(node, made, WEB, **asking("80, 9000-9001/udp", *fixed))


@pytest.mark.usefixtures("_pod")
def test_each_port_of_a_pod_is_shown_with_the_host_ports_that_lead_there(node: Node) -> None:
    dynamic = {item["request"]: item["host_port"] for item in listed(node)}
    assert dynamic.keys() == {"", "80/tcp", "9000/udp", "9001/udp"}
    assert shown(node, WEB) == [
        f"53/udp -> {NODE4}:53",
        "80/tcp -> 0.0.0.0:8080",
        "80/tcp -> [::]:8080",
        f"80/tcp -> {NODE4}:8081",
        f"80/tcp -> 0.0.0.0:{dynamic['80/tcp']}",
        f"80/tcp -> [::]:{dynamic['80/tcp']}",
        f"9000/udp -> 0.0.0.0:{dynamic['9000/udp']}",
        f"9000/udp -> [::]:{dynamic['9000/udp']}",
        f"9001/udp -> 0.0.0.0:{dynamic['9000/udp'] + 1}",
        f"9001/udp -> [::]:{dynamic['9000/udp'] + 1}",
    ]


@pytest.mark.usefixtures("_pod")
def test_a_port_of_a_pod_is_answered_with_what_a_client_connects_to(node: Node) -> None:
    fixed, also_fixed, of_one_address, dynamic, also_dynamic = shown(node, WEB, "80")
    assert (fixed, also_fixed, of_one_address) == ("0.0.0.0:8080", "[::]:8080", f"{NODE4}:8081")
    number = int(dynamic.removeprefix("0.0.0.0:"))
    assert also_dynamic == f"[::]:{number}"
    assert number in PORTS
    assert node.client.ask("tcp", NODE4, number) == f"web {CLIENT4}"
    assert shown(node, WEB, "80/TCP") == shown(node, WEB, "80")
    assert shown(node, WEB, "53/udp") == [f"{NODE4}:53"]
    assert in_json(node, WEB, "80/tcp") == {
        "80/tcp": [
            {"hostPort": 8080, "hostIP": "0.0.0.0"},
            {"hostPort": 8080, "hostIP": "::"},
            {"hostPort": 8081, "hostIP": NODE4},
            {"hostPort": number, "hostIP": "0.0.0.0"},
            {"hostPort": number, "hostIP": "::"},
        ]
    }
    assert [*in_json(node, WEB)] == ["53/udp", "80/tcp", "9000/udp", "9001/udp"]
    assert refusal(node, WEB, "81") == f"Error: no host port of this node leads to 81/tcp of {WEB}\n"
    assert refusal(node, WEB, "80/udp", "--json") == f"Error: no host port of this node leads to 80/udp of {WEB}\n"


def test_a_pod_is_called_by_its_name_or_by_the_id_of_its_container(node: Node) -> None:
    pods = {name: node.pod(4) for name in ("4f2a9c1e7b3055d1" * 6, "4f2b81d03e6aa95f" * 4, "web")}
    for number, (container_id, pod) in enumerate(pods.items()):
        pod.id = container_id
        add(node, pod, (WEB, DNS, "")[number], mapping(8080 + number))
    first, second, third = pods
    assert listed(node)[0]["container_id"] in first[:-1]  # the ruleset has no room for all of it
    for name in (WEB, WEB.partition("/")[2], first, first[:12], "4f2a"):
        assert shown(node, name) == ["80/tcp -> 0.0.0.0:8080"]
    for name in (DNS, "dns", second, second[:12]):
        assert shown(node, name) == ["80/tcp -> 0.0.0.0:8081"]
    assert shown(node, third) == ["80/tcp -> 0.0.0.0:8082"]
    assert refusal(node, "4f2") == f"Error: 4f2 can be any of these: pod {DNS}, pod {WEB}\n"
    for name in ("", "shop/dns", "kube-system", f"{first[:12]}f", "x"):
        assert refusal(node, name) == f"Error: no host port of this node leads to {name}\n"


def test_a_name_goes_before_an_id_and_a_whole_id_before_a_beginning(node: Node) -> None:
    for number, (container_id, name) in enumerate((("dns", ""), ("dns-2", ""), ("web", ""), ("c1", "shop/web"))):
        pod = node.pod(4)
        pod.id = container_id
        add(node, pod, name, mapping(8080 + number))
    assert shown(node, "dns") == ["80/tcp -> 0.0.0.0:8080"]
    assert shown(node, "web") == ["80/tcp -> 0.0.0.0:8083"]


def test_pods_of_one_name_in_two_namespaces_are_not_mixed_up(node: Node) -> None:
    for number, namespace in enumerate(("shop", "test")):
        add(node, node.pod(4), f"{namespace}/web", mapping(8080 + number))
    assert refusal(node, "web", "80") == "Error: web can be any of these: pod shop/web, pod test/web\n"
    assert shown(node, "test/web", "80") == ["0.0.0.0:8081"]


def test_pods_of_long_names_with_one_beginning_are_not_mixed_up(node: Node) -> None:
    pods = [node.pod(4) for _ in range(2)]
    names = [f"shop/{'w' * 200}-{number}" for number in range(2)]
    add(node, pods[0], names[0], mapping(8080))
    assert shown(node, names[0], "80") == ["0.0.0.0:8080"]
    add(node, pods[1], names[1], mapping(8081))
    either = ", ".join(sorted(f"container {pod.id}" for pod in pods))
    for name in names:
        assert refusal(node, name, "80") == f"Error: {name} can be any of these: {either}\n"
    assert shown(node, pods[1].id, "80") == ["0.0.0.0:8081"]


def test_what_a_container_before_it_still_has_is_not_the_pods(node: Node) -> None:
    before, now = node.pod(4), node.pod(4)
    add(node, before, WEB, mapping(8080))
    add(node, now, WEB, mapping(8081))
    before.remove()
    assert shown(node, WEB) == ["80/tcp -> 0.0.0.0:8081"]


def test_a_host_port_whose_rule_is_gone_leads_to_no_port(node: Node) -> None:
    pod = node.pod(4)
    add(node, pod, WEB, **asking("80"))
    node.nft(f"flush chain inet hostport dnat-{key_of(pod)}")
    assert refusal(node, WEB) == f"Error: no host port of this node leads to {WEB}\n"


def test_a_node_without_a_table_has_no_host_port_for_any_pod(node: Node) -> None:
    assert refusal(node, WEB, "80") == f"Error: no host port of this node leads to 80/tcp of {WEB}\n"
    assert node.nft("list ruleset") == ""
