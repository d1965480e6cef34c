from __future__ import annotations

import json
import re
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from explanation import Explanation, explain, silent_pod
from lab import BRIDGE4, CLIENT4, CLIENT6, LAUNCHER, NODE4, NODE6, Namespace, Node, Pod, mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTSIDE = [
    "prerouting: fib daddr type local goto dispatch",
    "dispatch: ip daddr != 127.0.0.0/8 update @local_ip4 { ip daddr }",
    "dispatch: meta nfproto . meta l4proto . th dport vmap @hostports",
    'dnat: meta nfproto ipv4 tcp dport 8080 dnat ip to 10.88.0.2:80 comment "shop/web"',
    "postrouting: ct status dnat ct original ip daddr @local_ip4 ip daddr vmap @pods_ip4",
]
ITSELF = [
    "output: fib daddr type local goto dispatch",
    *OUTSIDE[2:4],
    "postrouting: ct status dnat ct original ip daddr 127.0.0.0/8 ip daddr vmap @pods_ip4",
    "masq: ip saddr 127.0.0.0/8 masquerade",
]


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with host port 8080, and nothing that listens."""
    return silent_pod(node)


@pytest.fixture
def listening() -> Iterator[ExitStack]:
    with ExitStack() as sockets:
        yield sockets


def listen(namespace: Namespace, port: int, address: str, *, only_v6: bool = False) -> socket.socket:
    made = namespace.socket("tcp", address)
    if only_v6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind((address, port))
    made.listen()
    return made


def without_processes(explanation: Explanation) -> list[str]:
    return [
        f"{statement['status']}: {re.sub('.* .process [0-9]+.', 'SERVER', statement['text'])}"
        for statement in explanation.statements
    ]


def test_everything_is_fine_for_clients_outside(node: Node, pod: Pod) -> None:
    pod.serve("tcp", 80, "web")
    explanation = explain(node, "8080")
    assert explanation.status == 0
    assert without_processes(explanation) == [
        "ok: 0.0.0.0:8080/tcp leads to 10.88.0.2:80, pod shop/web",
        f"ok: the holder is alive: container {pod.id[:12]} (eth0) on network pods, {pod.path}",
        "ok: eth0 of pod shop/web is up and has 10.88.0.2",
        "ok: SERVER listens there on 80/tcp",
        "ok: the node forwards IPv4: net.ipv4.ip_forward is 1",
        "ok: no chain of others comes before this plugin's at prerouting",
        (
            f"ok: a TCP connection from a client such as {CLIENT4} to {NODE4} (in on uplink)"
            " leaves for 10.88.0.2:80 by cni0"
        ),
        f"ok: the pod's answer (in on cni0) leaves for {CLIENT4} by uplink",
    ]
    assert explanation.rules == OUTSIDE


@pytest.mark.parametrize(("source", "rules"), [("127.0.0.1", ITSELF), (BRIDGE4, None), (NODE4, None)])
def test_everything_is_fine_for_the_node_itself(node: Node, pod: Pod, source: str, rules: list[str] | None) -> None:
    pod.serve("tcp", 80, "web")
    explanation = explain(node, "8080", "--from", source)
    assert explanation.last["text"] == (
        f"a TCP connection from the node itself ({source}) to {source} leaves for 10.88.0.2:80 by cni0"
    )
    assert explanation.status == 0
    assert explanation.rules[:3] == ITSELF[:1] + (OUTSIDE[1:3] if source != "127.0.0.1" else OUTSIDE[2:4])
    assert not rules or explanation.rules == rules


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_both_families_are_explained_and_one_of_them_for_a_client(node: Node, protocol: str) -> None:
    pod = node.pod()
    pod.serve(protocol, 80, "server")
    node.add(pod, mapping(8080, 80, protocol))
    port = f"8080/{protocol}"
    assert [
        statement["text"].partition(" ")[0]
        for statement in explain(node, port).statements
        if "leads to" in statement["text"]
    ] == [
        f"0.0.0.0:{port}",
        f"[::]:{port}",
    ]
    for source, target in ((CLIENT4, "10.88.0.2"), (CLIENT6, "[fd00:88::2]"), (NODE6, "[fd00:88::2]")):
        explanation = explain(node, port, "--from", source)
        assert explanation.status == 0
        assert f"leaves for {target}:80 by cni0" in explanation.last["text"]
        assert len([statement for statement in explanation.statements if "leads to" in statement["text"]]) == 1
    assert explain(node, port, "--from", pod.ip4).rules[-1] == "masq: ip saddr 10.88.0.0/24 masquerade"


def test_a_connection_to_the_ipv6_loopback_address_cannot_be_forwarded(node: Node) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    explanation = explain(node, "8080", "--from", "::1")
    assert explanation.problems == [
        (
            "a TCP connection from the node itself (::1) to ::1 stays on the node:"
            " the kernel cannot translate the IPv6 loopback address"
        )
    ]
    assert explanation.last["meaning"] == "Nothing on this node listens on 8080/tcp."


def test_there_is_no_probe_for_sctp(node: Node) -> None:
    pod = node.pod(4)
    node.add(pod, mapping(8080, 80, "sctp"))
    explanation = explain(node, "8080/sctp")
    assert explanation.status == 0
    assert explanation.notes == [
        "whether anything listens on 10.88.0.2:80/sctp cannot be seen",
        "the path of a connection is not traced: there is no probe for SCTP",
    ]


def test_nothing_listens(node: Node, pod: Pod) -> None:
    explanation = explain(node, "8080")
    assert explanation.problems == [f"nothing listens on {pod.ip4}:80/tcp in the pod"]
    assert "leaves for 10.88.0.2:80" in explanation.last["text"]


def test_it_listens_on_the_loopback_address_of_the_pod_only(node: Node, pod: Pod, listening: ExitStack) -> None:
    listening.enter_context(listen(pod, 80, "127.0.0.1"))
    explanation = explain(node, "8080")
    [problem] = [statement for statement in explanation.statements if statement["status"] == "problem"]
    assert problem["text"] == f"nothing listens on {pod.ip4}:80/tcp in the pod"
    assert problem["meaning"].endswith(" at 127.0.0.1, where connections from outside of the pod do not come.")
    assert problem["remedy"] == "let it listen on 0.0.0.0 or ::"


@pytest.mark.parametrize("only_v6", [False, True])
def test_a_socket_of_ipv6_takes_ipv4_as_well_unless_it_says_no(
    node: Node, pod: Pod, listening: ExitStack, *, only_v6: bool
) -> None:
    listening.enter_context(listen(pod, 80, "::", only_v6=only_v6))
    assert explain(node, "8080").problems == ([f"nothing listens on {pod.ip4}:80/tcp in the pod"] if only_v6 else [])


def test_the_interface_of_the_pod_is_down_or_has_another_address_or_is_gone(node: Node, pod: Pod) -> None:
    pod.serve("tcp", 80, "web")
    pod.ip("link set eth0 down")
    assert explain(node, "8080").problems == ["eth0 of pod shop/web is down"]
    pod.ip("link set eth0 up", "addr del 10.88.0.2/24 dev eth0", "addr add 10.88.0.9/24 dev eth0")
    assert explain(node, "8080").problems == ["eth0 of pod shop/web does not have the address 10.88.0.2"]
    pod.ip("link del eth0")
    assert explain(node, "8080").problems == ["eth0 of pod shop/web is missing"]


def test_the_holder_is_gone(node: Node, pod: Pod) -> None:
    pod.remove()
    explanation = explain(node, "8080")
    assert explanation.problems == [
        f"the holder is gone: container {pod.id[:12]} (eth0) on network pods, {pod.path}",
    ]


def test_the_pod_has_no_route_back(node: Node, pod: Pod) -> None:
    pod.serve("tcp", 80, "web")
    pod.ip("route del default")
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [f"pod shop/web has no route back to {CLIENT4}: Network is unreachable"]
    assert node.client.is_silent("tcp", NODE4, 8080)
    assert explain(node, "8080", "--from", "127.0.0.1").status == 0  # it sees the node's address, which is on its link


def test_a_process_of_the_node_is_hidden(node: Node, pod: Pod, listening: ExitStack) -> None:
    pod.serve("tcp", 80, "web")
    listening.enter_context(listen(node, 8080, "0.0.0.0"))
    explanation = explain(node, "8080")
    assert explanation.status == 0
    [text] = explanation.notes
    assert text.endswith("listens on 0.0.0.0:8080/tcp, where pod shop/web has a host port")
    assert explanation.statement("listens on 0.0.0.0")["meaning"].startswith("New connections over IPv4 go to the pod.")


def test_a_process_of_the_node_is_hidden_for_connections_that_meet_the_conditions(
    node: Node, pod: Pod, listening: ExitStack
) -> None:
    node.delete(pod)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080), conditionsV4=["ip", "saddr", "!=", "192.0.2.3"])
    listening.enter_context(listen(node, 8080, NODE4))
    explanation = explain(node, "8080", "--from", CLIENT4)
    [text] = explanation.notes
    assert text.endswith(f"listens on {NODE4}:8080/tcp, where container {pod.id} has a host port")
    assert "that meet the conditions of its network" in explanation.statement("where container")["meaning"]
    assert explain(node, "8080", "--from", "192.0.2.3").last["meaning"].endswith("on this node gets it.")


def test_for_people_it_is_plain_lines_and_json_is_a_list(node: Node, pod: Pod) -> None:
    printed = node.run(*LAUNCHER, "explain", "8080", check=False)
    assert printed.returncode == 1
    assert printed.stdout.splitlines()[0] == f"ok       0.0.0.0:8080/tcp leads to {pod.ip4}:80, pod shop/web"
    assert f"problem  nothing listens on {pod.ip4}:80/tcp in the pod" in printed.stdout.splitlines()
    statement = json.loads(node.run(*LAUNCHER, "explain", "8080", "--json", check=False).stdout)[0]
    assert statement == {"status": "ok", "text": f"0.0.0.0:8080/tcp leads to {pod.ip4}:80, pod shop/web"}
