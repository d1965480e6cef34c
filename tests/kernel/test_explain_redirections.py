from __future__ import annotations

import shutil

import pytest
from explanation import explain, serving_pod
from lab import CLIENT4, NODE4, Node, Pod, mapping, require

FROM_CLIENT = f"a TCP connection from {CLIENT4} to {NODE4} (in on uplink)"
THEIRS = "What others of this node translate is theirs: it is more specific than a host port, which gets the rest."
KUBE_PROXY = """table ip kube-proxy {{
    chain endpoint-AAAA2222-shop/api/tcp/http__{0}/80 {{ meta l4proto tcp dnat to {0}:80; }}
    chain service-BBBB3333-shop/api/tcp/http {{ goto endpoint-AAAA2222-shop/api/tcp/http__{0}/80; }}
    map service-nodeports {{
        type inet_proto . inet_service : verdict;
        elements = {{ tcp . 8080 : goto service-BBBB3333-shop/api/tcp/http }};
    }}
    chain services {{ fib daddr type local meta l4proto . th dport vmap @service-nodeports; }}
    chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
}}"""
NAT = "table inet others {{ chain prerouting {{ type nat hook prerouting priority dstnat; {0}; }}; }}"


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with a server and host port 8080."""
    return serving_pod(node, mapping(8080))


@pytest.fixture
def other(node: Node) -> Pod:
    """A pod with a server to which others' rules lead."""
    made = node.pod(4)
    made.serve("tcp", 80, "other")
    return made


def iptables(node: Node, *rules: str) -> None:
    require(shutil.which("iptables-nft"), "needs the program iptables-nft")
    for rule in rules:
        node.run("iptables-nft", "-t", "nat", *rule.split())


@pytest.mark.usefixtures("pod")
def test_a_service_of_kube_proxy_takes_the_port(node: Node, other: Pod) -> None:
    node.nft_file(KUBE_PROXY.format(other.ip4))
    assert node.client.ask("tcp", NODE4, 8080) == f"other {CLIENT4}"
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [
        (
            f"{FROM_CLIENT} leaves for {other.ip4} port 80 instead: kube-proxy, for Service shop/api:http, takes it"
            f" first, by a rule in ip kube-proxy endpoint-AAAA2222-shop/api/tcp/http__{other.ip4}/80"
        )
    ]
    assert explanation.last["meaning"] == THEIRS
    assert explanation.last["remedy"] == "give the mapping another host port, or a hostIP that the rule does not take"
    assert explanation.statement("what others translate at prerouting is theirs")["details"] == [
        "ip kube-proxy nat-prerouting (nat at prerouting, priority -100)"
    ]
    assert not explanation.notes


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize(("comment", "service"), [("shop/api:http", "shop/api:http"), ("shop/api", "shop/api")])
def test_a_service_of_kube_proxy_in_iptables_mode_takes_the_port(
    node: Node, other: Pod, comment: str, service: str
) -> None:
    chains = ["KUBE-NODEPORTS", "KUBE-EXT-AAAA", "KUBE-SVC-AAAA", "KUBE-SEP-BBBB"]
    iptables(
        node,
        *(f"-N {chain}" for chain in chains),
        "-A PREROUTING -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
        f"-A KUBE-NODEPORTS -p tcp -m comment --comment {comment} -m tcp --dport 8080 -j KUBE-EXT-AAAA",
        "-A KUBE-EXT-AAAA -j KUBE-SVC-AAAA",
        f"-A KUBE-SVC-AAAA -m comment --comment {comment} -j KUBE-SEP-BBBB",
        f"-A KUBE-SEP-BBBB -p tcp -m comment --comment {comment} -m tcp -j DNAT --to-destination {other.ip4}:80",
    )
    assert node.client.ask("tcp", NODE4, 8080) == f"other {CLIENT4}"
    [problem] = explain(node, "8080", "--from", CLIENT4).problems
    assert f"kube-proxy, for Service {service}, takes it first, by a rule in ip nat KUBE-SEP-BBBB" in problem


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize(
    ("chain", "whose"),
    [
        ("DOCKER", "docker"),
        ("NETAVARK-DN-1D8721804F16F", "podman (netavark)"),
        ("CNI-DN-aef2d4f4ee8d3e9c6a1f8", "portmap"),
        ("KUBE-SEP-BBBB", "kube-proxy"),
        ("KUBE-HP-ABCDEFGH23456723", "CRI-O"),
    ],
)
def test_a_published_port_takes_it(node: Node, other: Pod, chain: str, whose: str) -> None:
    iptables(
        node,
        f"-N {chain}",
        f"-A PREROUTING -m addrtype --dst-type LOCAL -j {chain}",
        f"-A {chain} -p tcp --dport 8080 -j DNAT --to-destination {other.ip4}:80",
    )
    [problem] = explain(node, "8080", "--from", CLIENT4).problems
    assert problem.endswith(f" instead: {whose} takes it first, by a rule in ip nat {chain}")


@pytest.mark.usefixtures("pod")
def test_a_rule_of_others_takes_it(node: Node, other: Pod) -> None:
    node.nft_file(NAT.format(f"fib daddr type local tcp dport 8080 dnat ip to {other.ip4}:80"))
    assert explain(node, "8080", "--from", CLIENT4).problems == [
        (
            f"{FROM_CLIENT} leaves for {other.ip4} port 80 instead: a rule of others takes it first, in"
            " inet others prerouting"
        )
    ]


@pytest.mark.usefixtures("pod")
def test_a_rule_of_others_takes_it_for_a_process_of_the_node(node: Node) -> None:
    node.nft_file(NAT.format("tcp dport 8080 redirect to 9090"))
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [
        f"{FROM_CLIENT} stays on the node: a rule of others takes it first, in inet others prerouting"
    ]
    assert explanation.last["meaning"] == f"{THEIRS} Nothing on this node listens on 9090/tcp."
    node.serve("tcp", 9090, "own")
    assert explain(node, "8080", "--from", CLIENT4).last["meaning"].endswith(" on this node gets it.")


@pytest.mark.usefixtures("pod")
def test_what_a_rule_of_others_takes_is_not_said_to_be_another_mappings(node: Node, other: Pod) -> None:
    node.add(other, mapping(8080, hostIP=NODE4))
    node.nft_file(NAT.format(f"tcp dport 8080 dnat ip to {other.ip4}:80"))
    explanation = explain(node, "8080", "--from", CLIENT4, "--to", "10.88.0.1")
    assert explanation.problems[0].endswith("a rule of others takes it first, in inet others prerouting")


@pytest.mark.usefixtures("pod")
def test_what_others_take_does_not_keep_an_address_of_its_own_from_a_mapping(node: Node, other: Pod) -> None:
    node.nft_file(NAT.format(f"ip daddr 10.88.0.1 tcp dport 8080 dnat ip to {other.ip4}:80"))
    assert explain(node, "8080", "--from", CLIENT4).status == 0
    assert explain(node, "8080", "--from", CLIENT4, "--to", "10.88.0.1").status == 1


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("rule", ["tcp dport 8080 notrack", "iifname uplink notrack"])
def test_a_rule_takes_it_from_connection_tracking(node: Node, rule: str) -> None:
    node.nft_file(f"table inet fast {{ chain early {{ type filter hook prerouting priority raw; {rule}; }}; }}")
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [
        f"{FROM_CLIENT} stays on the node: a rule in inet fast early takes it from connection tracking (notrack)"
    ]
    assert explanation.last["meaning"].startswith("Nothing is translated that is not tracked. ")
    assert "restore" not in explanation.last["remedy"]
    assert explanation.last["details"][-1].startswith("inet fast early: ")
    with pytest.raises(ConnectionRefusedError):
        node.client.ask("tcp", NODE4, 8080)


@pytest.mark.usefixtures("pod")
def test_iptables_takes_it_from_connection_tracking(node: Node) -> None:
    require(shutil.which("iptables-nft"), "needs the program iptables-nft")
    node.run(
        "iptables-nft", "-t", "raw", *["-A", "PREROUTING", "-p", "tcp", "--dport", "8080", "-j", "CT", "--notrack"]
    )
    [problem] = explain(node, "8080", "--from", CLIENT4).problems
    assert problem.endswith("a rule in ip raw PREROUTING takes it from connection tracking (notrack)")
