from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from explanation import explain
from lab import BRIDGE4, CLIENT4, CLIENT6, NODE4, NODE6, Namespace, Node, Pod, ip, mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

FAR, SECOND = "198.51.100.2", "198.51.100.1"
FILTER = "table inet firewall {{ chain {0} {{ type filter hook {0} priority {1}; {2}; }}; }}"
MARKING = """table inet uplinks { chain prerouting { type filter hook prerouting priority mangle;
    iifname "second" ct mark set 1
    ct direction reply meta mark set ct mark
}; }"""


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with a server and host port 8080, tcp and udp."""
    made = node.pod()
    made.serve("tcp", 80, "web")
    made.serve("udp", 80, "dns")
    node.add(made, mapping(8080), mapping(8080, 80, "udp"))
    return made


@pytest.fixture
def far(node: Node) -> Iterator[Namespace]:
    """A router behind which is everybody else, on a second uplink of the node, which has a routing table for that."""
    with Namespace("far") as made:
        ip(f"-n {node.name} link add second type veth peer name second netns {made.name}")
        made.ip(f"addr add {FAR}/24 dev second", "link set second up", "addr add 203.0.113.1/32 dev lo")
        node.ip(f"addr add {SECOND}/24 dev second", "link set second up")
        made.ip(f"route add 192.0.2.0/24 via {SECOND}")
        node.ip(f"route add default via {CLIENT4}", f"route add default via {FAR} table 100")
        node.ip(f"rule add from {SECOND} lookup 100")
        yield made


@pytest.mark.usefixtures("pod")
def test_the_answer_comes_back_to_a_client_outside(node: Node) -> None:
    for port in ("8080", "8080/udp"):
        for source, answer in ((CLIENT4, CLIENT4), (CLIENT6, CLIENT6)):
            explanation = explain(node, port, "--from", source)
            assert (explanation.status, explanation.answer) == (0, f"(in on cni0) leaves for {answer} by uplink")


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("source", ["127.0.0.1", BRIDGE4, NODE4, NODE6])
def test_the_answer_comes_back_to_the_node_itself(node: Node, source: str) -> None:
    for port in ("8080", "8080/udp"):
        explanation = explain(node, port, "--from", source)
        assert (explanation.status, explanation.answer) == (0, "(in on cni0) comes back to the node itself")


@pytest.mark.usefixtures("pod")
def test_the_rules_that_the_answer_meets_are_shown(node: Node) -> None:
    node.nft_file(FILTER.format("forward", 0, "iifname cni0 tcp sport 80 ct state established counter"))
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.statement("the pod's answer")["details"] == [
        'inet firewall forward: iifname "cni0" tcp sport 80 ct state established counter'
    ]


@pytest.mark.parametrize("hairpin", [False, True])
def test_a_bridge_does_not_send_the_answer_back_to_the_pod_itself(node: Node, pod: Pod, *, hairpin: bool) -> None:
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", 1)
    if hairpin:
        node.run("bridge", "link", "set", "dev", pod.host_end, "hairpin", "on")
    assert pod.is_silent("tcp", NODE4, 8080) is not hairpin
    explanation = explain(node, "8080", "--from", pod.ip4)
    assert explanation.status == (not hairpin)
    assert explanation.answer.endswith("leaves for 10.88.0.2 by cni0") is hairpin
    if not hairpin:
        assert '("hairpinMode": true for the bridge plugin)' in explanation.statement("the pod's answer")["meaning"]


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("ct direction reply drop", "is dropped by a rule in"),
        ("iifname cni0 ct state established reject", "is rejected by a rule in"),
        ("iifname uplink accept; policy drop", "is dropped by"),
    ],
)
def test_a_forward_chain_drops_answers(node: Node, rule: str, says: str) -> None:
    node.nft_file(FILTER.format("forward", 0, rule))
    assert node.client.is_silent("tcp", NODE4, 8080)
    explanation = explain(node, "8080", "--from", CLIENT4)
    [problem] = explanation.problems
    assert problem.startswith(f"the pod's answer (in on cni0) {says} inet firewall forward")
    program, _, command = explanation.statement("the pod's answer")["remedy"].partition(" (")[0].partition(" ")
    assert program == "nft"
    node.nft(command)
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert explain(node, "8080", "--from", CLIENT4).status == 0


@pytest.mark.usefixtures("pod")
def test_the_input_chain_drops_answers_to_the_node_itself(node: Node) -> None:
    node.nft_file(FILTER.format("input", 0, "iifname cni0 drop"))
    [problem] = explain(node, "8080", "--from", "127.0.0.1").problems
    assert problem == "the pod's answer (in on cni0) is dropped by a rule in inet firewall input"
    assert explain(node, "8080", "--from", CLIENT4).status == 0


@pytest.mark.usefixtures("pod")
def test_what_connection_tracking_does_not_know_is_dropped(node: Node) -> None:
    node.nft_file("""table inet firewall {
        chain zones { type filter hook prerouting priority raw; iifname "cni0" ct zone set 7; }
        chain forward { type filter hook forward priority 0; ct state invalid drop; }
    }""")
    assert node.client.is_silent("tcp", NODE4, 8080)
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == ["the pod's answer (in on cni0) is dropped by a rule in inet firewall forward"]
    meaning = "Connection tracking does not know the connection that it belongs to."
    assert explanation.statement("the pod's answer")["meaning"] == meaning


@pytest.mark.usefixtures("pod")
def test_rules_that_drop_what_is_invalid_are_no_harm_to_answers(node: Node) -> None:
    node.nft_file("""table inet firewall {
        chain early { type filter hook prerouting priority mangle; ct state invalid drop; }
        chain forward { type filter hook forward priority 0; policy drop;
            ct state invalid drop; ct state established,related accept; ct status dnat accept; }
    }""")
    for port in ("8080", "8080/udp"):
        assert explain(node, port).status == 0


@pytest.mark.usefixtures("pod")
def test_a_zone_of_its_own_for_all_that_comes_in_is_no_harm(node: Node) -> None:
    node.nft_file(FILTER.format("prerouting", -300, "ct zone set 7"))
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert explain(node, "8080", "--from", CLIENT4).status == 0


@pytest.mark.usefixtures("pod")
def test_answers_are_taken_from_connection_tracking(node: Node) -> None:
    node.nft_file(FILTER.format("prerouting", -300, "iifname cni0 notrack"))
    assert node.client.is_silent("tcp", NODE4, 8080)
    assert explain(node, "8080", "--from", CLIENT4).problems == [
        (
            f"the pod's answer (in on cni0) leaves for {CLIENT4} by uplink as it is, as from 10.88.0.2:80:"
            " a rule in inet firewall prerouting takes it from connection tracking (notrack)"
        )
    ]


@pytest.mark.usefixtures("pod")
def test_a_rule_redirects_what_pods_send(node: Node) -> None:
    node.nft_file("""table inet mesh { chain marking { type filter hook prerouting priority mangle;
        iifname "cni0" meta l4proto tcp meta mark set 9; }; }""")
    node.ip("rule add fwmark 9 lookup 9", "route add local default dev lo table 9")
    [problem] = explain(node, "8080", "--from", CLIENT4).problems
    assert problem == f"the pod's answer (in on cni0) stays on the node instead of going to {CLIENT4}"


@pytest.mark.usefixtures("pod")
def test_the_interface_towards_the_pod_does_not_forward(node: Node) -> None:
    node.set_sysctl("net/ipv4/conf/cni0/forwarding", 0)
    assert node.client.is_silent("tcp", NODE4, 8080)
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert (
        explanation.answer == "(in on cni0) is lost on its way through the kernel, and no rule of nftables dropped it"
    )
    meaning = "net.ipv4.conf.cni0.forwarding is 0: the node forwards nothing that comes in there."
    assert explanation.statement("the pod's answer")["meaning"] == meaning


@pytest.mark.parametrize("strict", [0, 1])
def test_reverse_path_filtering_is_strict_on_the_interface_on_which_a_pod_answers(node: Node, strict: int) -> None:
    node.bridge("cni1", "10.99.0.1/24")
    pod = node.pod(addresses=["10.99.0.2/24"], gateways=["10.99.0.1"], bridge="cni1")
    ip(f"-n {node.name} link add also type veth peer name eth1 netns {pod.name}")
    node.ip("link set also master cni0 up")
    pod.ip("link set eth1 up", "addr add 10.88.0.9/24 dev eth1", "route replace default via 10.88.0.1 dev eth1")
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    for name in ("all", "cni0"):
        node.set_sysctl(f"net/ipv4/conf/{name}/rp_filter", strict)
    assert node.client.is_silent("tcp", NODE4, 8080) == bool(strict)
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.status == strict
    if strict:
        assert explanation.statement("the pod's answer")["meaning"] == (
            "rp_filter is 1 (strict) on cni0: what comes in there is dropped if the route to 10.99.0.2 leads elsewhere."
        )


@pytest.mark.usefixtures("pod")
def test_a_second_uplink_is_answered_by_the_first(node: Node, far: Namespace) -> None:
    assert far.is_silent("tcp", SECOND, 8080, source="203.0.113.1")
    explanation = explain(node, "8080", "--from", "203.0.113.1", "--to", SECOND)
    assert explanation.answer == "(in on cni0) leaves for 203.0.113.1 by uplink, and the connection came in on second"
    assert explanation.status == 1
    both = [text for text in explain(node, "8080").problems if "10.88.0" not in text]
    assert both == [f"the pod's answer {explanation.answer}"]
    node.nft_file(MARKING)
    node.ip("rule add fwmark 1 lookup 100")
    assert far.ask("tcp", SECOND, 8080, source="203.0.113.1") == "web 203.0.113.1"
    assert explain(node, "8080", "--from", "203.0.113.1", "--to", SECOND).status == 0
    assert explain(node, "8080").status == 0


def test_a_neighbour_is_answered_past_the_node_where_nothing_is_masqueraded(node: Node) -> None:
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", 0)
    pod, neighbour = node.pod(4), node.pod(4)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080), snat=False)
    assert neighbour.is_silent("tcp", NODE4, 8080)
    explanation = explain(node, "8080", "--from", neighbour.ip4)
    assert explanation.problems == [f"container {pod.id} answers {neighbour.ip4} directly, past this node"]
    assert explanation.statements[-1]["remedy"].startswith('"snat": true in the network configuration')
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", 1)
    assert neighbour.ask("tcp", NODE4, 8080) == f"web {neighbour.ip4}"
    explanation = explain(node, "8080", "--from", neighbour.ip4)
    text = f"container {pod.id} answers {neighbour.ip4} over cni0, where the node translates what passes"
    assert (explanation.status, explanation.notes) == (0, [text])


def test_a_pod_answers_by_a_router_that_is_not_the_node(node: Node) -> None:
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", 0)
    pod, router = node.pod(4), node.pod(4)
    pod.serve("tcp", 80, "web")
    pod.ip(f"route replace default via {router.ip4}")
    node.add(pod, mapping(8080))
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [f"container {pod.id} answers {CLIENT4} by way of {router.ip4}, past this node"]
    node.delete(pod)
    node.add(pod, mapping(8080), masqAll=True)
    assert node.client.ask("tcp", NODE4, 8080) == "web 10.88.0.1"
    assert explain(node, "8080", "--from", CLIENT4).status == 0


def test_a_pod_with_a_link_and_a_route_of_its_own(node: Node) -> None:
    pod = node.pod(4)
    node.ip(f"link set {pod.host_end} nomaster", f"route add {pod.ip4}/32 dev {pod.host_end}")
    node.ip(f"route add default via {CLIENT4}")  # proxy ARP is for what the node has a route to
    node.set_sysctl(f"net/ipv4/conf/{pod.host_end}/proxy_arp", 1)
    pod.ip("addr del 10.88.0.2/24 dev eth0", "addr add 10.88.0.2/32 dev eth0")
    pod.ip("route add 169.254.1.1 dev eth0 scope link", "route add default via 169.254.1.1")
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert (explanation.status, explanation.answer) == (0, f"(in on {pod.host_end}) leaves for {CLIENT4} by uplink")


@pytest.fixture
def macvlan(node: Node) -> Pod:
    """A pod with a macvlan interface on the node's uplink, and host port 8080."""
    pod = node.pod(addresses=["192.0.2.50/24"])
    pod.ip("link del eth0")
    node.ip("link add link uplink name mv type macvlan mode bridge", f"link set mv netns {pod.name}")
    pod.ip("link set mv name eth0", "link set eth0 up", "addr add 192.0.2.50/24 dev eth0")
    pod.serve("tcp", 80, "web")
    return pod


def test_a_macvlan_pod_is_not_reached_by_the_interface_that_it_is_on(node: Node, macvlan: Pod) -> None:
    node.add(macvlan, mapping(8080))
    assert node.client.is_silent("tcp", NODE4, 8080)
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [
        f"container {macvlan.id} has a macvlan interface on uplink, by which the node would reach it"
    ]


def test_a_macvlan_pod_answers_past_the_node(node: Node, macvlan: Pod) -> None:
    node.ip("link add link uplink name shim type macvlan mode bridge", "link set shim up")
    node.ip("addr add 192.0.2.60/32 dev shim", "route add 192.0.2.50/32 dev shim")
    node.add(macvlan, mapping(8080), snat=False)
    assert node.client.is_silent("tcp", NODE4, 8080)
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [f"container {macvlan.id} answers {CLIENT4} directly, past this node"]
    node.delete(macvlan)
    node.add(macvlan, mapping(8080), masqAll=True)
    assert node.client.ask("tcp", NODE4, 8080).startswith("web ")
    assert explain(node, "8080", "--from", CLIENT4).status == 0
