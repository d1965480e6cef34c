from __future__ import annotations

import pytest
from explanation import explain, serving_pod
from lab import CLIENT4, NODE4, Node, Pod, mapping

TAKE_ALL = "protocol ip u32 match u32 0 0 action mirred egress redirect dev cni0"
FROM_CLIENT = f"a TCP connection from {CLIENT4} to {NODE4} (in on uplink)"
TABLE = "table inet firewall {{ chain {name} {{ type {kind} hook {hook} priority {priority}; {rest}; }}; }}"


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with a server, without host ports."""
    return serving_pod(node)


def firewall(node: Node, rest: str, hook: str = "forward", priority: int = 0, kind: str = "filter") -> None:
    node.nft_file(TABLE.format(name=hook, kind=kind, hook=hook, priority=priority, rest=rest))


@pytest.mark.parametrize(
    ("rest", "text", "line"),
    [
        ("policy drop", "is dropped by inet firewall forward: no rule there accepts it, and the chain's policy is drop",
         "inet firewall forward: policy drop"),
        ("tcp dport 80 drop", "is dropped by a rule in inet firewall forward",
         "inet firewall forward: tcp dport 80 drop"),
        ("tcp dport 80 reject", "is rejected by a rule in inet firewall forward",
         "inet firewall forward: tcp dport 80 reject"),
    ],
)  # fmt: skip
def test_a_rule_of_others_stops_it(node: Node, pod: Pod, rest: str, text: str, line: str) -> None:
    node.add(pod, mapping(8080))
    firewall(node, rest)
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [f"{FROM_CLIENT} {text}"]
    assert explanation.rules[-1] == line
    assert node.client.is_silent("tcp", NODE4, 8080)
    program, _, command = explanation.last["remedy"].partition(" (")[0].partition(" ")
    assert program == "nft"
    node.nft(command)
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert explain(node, "8080", "--from", CLIENT4).problems == []


def test_the_hops_of_a_chain_of_others_read_as_the_path(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    node.nft_file("""table inet firewall {
        chain admitted { tcp dport 443 accept; ct state new counter; tcp dport 80 return; drop; }
        chain end { ip saddr 192.0.2.0/24 drop; }
        chain forward { type filter hook forward priority 0; jump admitted; iifname "lo" accept; goto end; }
    }""")
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.rules[-5:] == [
        "inet firewall forward: jump admitted",
        "inet firewall admitted: ct state new counter",
        "inet firewall admitted: tcp dport 80 return",
        "inet firewall forward: goto end",
        "inet firewall end: ip saddr 192.0.2.0/24 drop",
    ]
    assert explanation.problems == [f"{FROM_CLIENT} is dropped by a rule in inet firewall end"]


@pytest.mark.parametrize("family", ["inet", "netdev"])
def test_an_ingress_chain_of_others_drops_it(node: Node, pod: Pod, family: str) -> None:
    node.add(pod, mapping(8080))
    hook = 'type filter hook ingress device "uplink" priority 0;'
    node.nft_file(f"table {family} early {{ chain in {{ {hook} tcp dport 8080 drop; }}; }}")
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [f"{FROM_CLIENT} is dropped by a rule in {family} early in"]
    assert explanation.statement("chains of others")["details"] == [
        f"{family} early in (filter at ingress, priority 0)"
    ]


def test_traffic_control_takes_it_before_nftables_sees_it(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    node.run("tc", "qdisc", "add", "dev", "uplink", "clsact")
    node.run("tc", "filter", "add", "dev", "uplink", "ingress", *TAKE_ALL.split())
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [f"{FROM_CLIENT} does not come to nftables' prerouting hook"]
    assert explanation.last["meaning"] == "Something takes it before on uplink: most likely an XDP or tc program."


def test_rules_of_others_are_shown_as_nft_prints_them(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    ports = ", ".join(str(port) for port in range(80, 200, 2))
    node.nft_file(f"""table inet kube-proxy {{
        chain service-A-ns1/svc1/tcp/p80 {{ tcp dport {{ {ports} }} counter comment "a # handle 7"; }}
        chain forward {{ type filter hook forward priority 0; jump service-A-ns1/svc1/tcp/p80; }}
    }}""")
    rules = explain(node, "8080", "--from", CLIENT4).rules
    assert rules[4:6] == [
        "inet kube-proxy forward: jump service-A-ns1/svc1/tcp/p80",
        f'inet kube-proxy service-A-ns1/svc1/tcp/p80: tcp dport {{ {ports} }} counter comment "a # handle 7"',
    ]
