from __future__ import annotations

import pytest
from explanation import explain, serving_pod
from lab import CLIENT4, LAUNCHER, NODE4, Node, Pod, key_of, mapping

UP = ("link set other up", "link set far up")
FROM_CLIENT = f"a TCP connection from {CLIENT4} to {NODE4} (in on uplink)"


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with a server, without host ports."""
    return serving_pod(node)


def test_forwarding_is_off(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    node.set_sysctl("net/ipv4/ip_forward", 0)
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [
        "net.ipv4.ip_forward is 0",
        f"{FROM_CLIENT} is lost on its way through the kernel, and no rule of nftables dropped it",
    ]
    assert explanation.last["meaning"] == "The node does not forward it."
    assert explain(node, "8080", "--from", "127.0.0.1").status == 0
    node.set_sysctl("net/ipv4/ip_forward", 1)
    node.set_sysctl("net/ipv4/conf/uplink/forwarding", 0)
    assert explain(node, "8080").problems[0] == "net.ipv4.conf.uplink.forwarding is 0"
    assert node.client.is_silent("tcp", NODE4, 8080)


def test_there_is_no_route_to_the_pod(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    node.ip("addr del 10.88.0.1/24 dev cni0")
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.last["meaning"] == "There is no route to the pod's address 10.88.0.2: Network is unreachable."
    assert explanation.status == 1


def test_route_localnet_was_turned_off(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    node.set_sysctl("net/ipv4/conf/cni0/route_localnet", 0)
    explanation = explain(node, "8080", "--from", "127.0.0.1")
    assert explanation.status == 1
    assert explanation.last["meaning"] == (
        "net.ipv4.conf.cni0.route_localnet is 0: nothing leaves there from 127.0.0.1."
    )


def test_reverse_path_filtering_is_strict_and_the_route_back_leads_elsewhere(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    node.ip("link add other type veth peer name far", "addr add 198.51.100.1/24 dev other", *UP)
    node.set_sysctl("net/ipv4/conf/uplink/rp_filter", 1)
    explanation = explain(node, "8080", "--from", "198.51.100.7")
    note = explanation.statement("the answers to 198.51.100.7 leave by other: its connections have to come in there")
    assert note["meaning"] == "rp_filter is 1 (strict) on uplink: what comes in there from 198.51.100.7 is dropped."
    assert "(in on other) leaves for 10.88.0.2:80 by cni0" in explanation.last["text"]
    assert not explain(node, "8080", "--from", CLIENT4).notes
    node.ip("route add 192.0.2.2/32 dev uplink table 7", "rule add to 192.0.2.2 iif lo lookup 7")
    node.ip("route add 192.0.2.2/32 dev other")
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.last["text"].startswith(f"{FROM_CLIENT} is lost on its way through the kernel")
    assert explanation.last["meaning"].startswith("rp_filter is 1 (strict) on uplink:")
    assert node.client.is_silent("tcp", NODE4, 8080)


def test_a_mapping_of_one_address_besides_one_of_any(node: Node, pod: Pod) -> None:
    other = node.pod(4)
    other.serve("tcp", 80, "other")
    node.add(pod, mapping(8080))
    node.add(other, mapping(8080, hostIP=NODE4))
    explanation = explain(node, "8080")
    assert explanation.status == 0
    assert explanation.statements[0]["details"] == [
        f"but {NODE4}:8080/tcp leads to {other.ip4}:80, container {other.id}"
    ]
    paths = [
        statement["text"].rpartition(" to ")[2]
        for statement in explanation.statements
        if "TCP connection" in statement["text"]
    ]
    assert paths == [
        f"10.88.0.1 (in on uplink) leaves for {pod.ip4}:80 by cni0",
        f"{NODE4} (in on uplink) leaves for {other.ip4}:80 by cni0",
    ]


def test_all_addresses_have_mappings_of_their_own(node: Node, pod: Pod) -> None:
    other = node.pod(4)
    other.serve("tcp", 80, "other")
    node.add(pod, mapping(8080))
    node.add(other, mapping(8080, hostIP=NODE4), mapping(8080, hostIP="10.88.0.1"))
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.status == 0
    assert explanation.notes == [f"{FROM_CLIENT} goes to {other.ip4}:80, container {other.id}"]


def test_a_mapping_of_an_address_that_the_node_does_not_have(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080, hostIP="192.0.2.99"))
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == ["192.0.2.99 is not an address of this node"]
    assert explanation.last["remedy"] == "give the node the address, or the mapping another hostIP than 192.0.2.99"


def test_a_mapping_of_the_loopback_address_is_asked_for_from_the_node(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080, hostIP="127.0.0.1"))
    assert explain(node, "8080").status == 0
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems[0].endswith("is lost on its way through the kernel, and no rule of nftables dropped it")
    assert explanation.last["meaning"].startswith("127.0.0.1 is for the node itself")


def test_a_client_does_not_meet_the_conditions(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080), conditionsV4=["ip", "saddr", "!=", CLIENT4])
    excluded = explain(node, "8080", "--from", CLIENT4)
    assert excluded.problems == [
        f"{FROM_CLIENT} stays on the node: it does not meet the conditions of the mapping (conditionsV4, conditionsV6)"
    ]
    assert excluded.rules[-1] == (f"dnat: ip saddr != {CLIENT4} tcp dport 8080 dnat ip to 10.88.0.2:80  <- not met")
    assert explain(node, "8080", "--from", "192.0.2.3").status == 0
    assert explain(node, "8080").status == 0


def test_the_rules_of_the_mapping_were_flushed(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    node.nft(f"flush chain inet hostport dnat-{key_of(pod)}")
    explanation = explain(node, "8080")
    assert explanation.problems[0] == f"0.0.0.0:8080/tcp is held by container {pod.id}, but no rule translates it"
    assert explanation.problems[1].endswith("stays on the node: the rules of this plugin do not translate it")
    assert explanation.last["remedy"] == "hostport restore"


@pytest.mark.parametrize("chain", ["dispatch", "prerouting"])
def test_the_rules_that_lead_to_the_mapping_were_flushed(node: Node, pod: Pod, chain: str) -> None:
    node.add(pod, mapping(8080))
    node.nft(f"flush chain inet hostport {chain}")
    node.serve("tcp", 8080, "hidden")
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems == [f"{FROM_CLIENT} stays on the node: the rules of this plugin do not translate it"]
    assert explanation.last["meaning"].endswith("on this node gets it.")
    assert not explanation.notes


def test_a_node_whose_only_route_is_a_default_route(node: Node, pod: Pod) -> None:
    node.ip("addr del 192.0.2.1/24 dev uplink", "addr add 192.0.2.1/32 dev uplink")
    node.ip("route add default dev uplink")
    node.add(pod, mapping(8080))
    explanation = explain(node, "8080")
    assert explanation.status == 0
    assert explanation.last["text"] == (
        f"a TCP connection from a client such as 203.0.113.1 to {NODE4} (in on uplink) leaves for 10.88.0.2:80 by cni0"
    )


@pytest.mark.parametrize("loopback", [False, True], ids=["none", "one on lo"])
def test_a_node_without_an_interface_to_the_outside(node: Node, pod: Pod, *, loopback: bool) -> None:
    node.ip("link del uplink")
    if loopback:
        node.ip("addr add 203.0.113.5/32 dev lo")
    node.add(pod, mapping(8080))
    address = "203.0.113.5" if loopback else "10.88.0.1"
    explanation = explain(node, "8080")
    assert explanation.status == 0
    assert explanation.last["text"] == (
        f"a TCP connection from the node itself ({address}) to {address} leaves for 10.88.0.2:80 by cni0"
    )


def test_a_client_to_whom_there_is_no_way_back(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    explanation = explain(node, "8080", "--from", "198.51.100.7")
    assert explanation.problems == ["no way back to 198.51.100.7: Network is unreachable"]


def test_a_node_without_an_address_of_the_family(node: Node) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    node.ip("-6 addr flush scope global dev uplink", "-6 addr flush scope global dev cni0")
    assert explain(node, "8080").problems == ["the node has no address of this IP version to connect to"]


def test_where_there_is_no_tun_device_the_path_is_not_traced(node: Node, pod: Pod) -> None:
    node.add(pod, mapping(8080))
    script = 'mount --bind /dev/null /dev/net/tun && exec "$@"'
    process = node.run("unshare", "--mount", "sh", "-c", script, "sh", *LAUNCHER, "explain", "8080", check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.splitlines()[-2:] == [
        (
            "note     the path of a connection could not be traced: /dev/net/tun cannot be used:"
            " Inappropriate ioctl for device"
        ),
        "         What the rules of others do to it is not known.",
    ]
    assert "hostport-probe" not in node.nft("list tables")
