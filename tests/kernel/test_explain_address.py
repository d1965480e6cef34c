from __future__ import annotations

import pytest
from explanation import explain
from lab import CLIENT4, CLIENT6, LAUNCHER, NODE4, NODE6, Node, Pod, ip, mapping

VIP4, VIP6 = "203.0.113.10", "2001:db8:1::10"


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with a server and host port 8080."""
    made = node.pod()
    made.serve("tcp", 80, "web")
    node.add(made, mapping(8080))
    return made


@pytest.fixture
def vips(node: Node) -> None:
    """Addresses of the node on an interface that leads nowhere, as for a LoadBalancer, and a client that knows them."""
    node.ip("link add vips type bridge", f"addr add {VIP4}/32 dev vips", f"addr add {VIP6}/128 dev vips nodad")
    node.ip("link set vips up")
    node.client.ip(f"route add {VIP4}/32 via {NODE4}", f"route add {VIP6}/128 via {NODE6}")


@pytest.mark.usefixtures("pod", "vips")
@pytest.mark.parametrize("vip", [VIP4, VIP6])
@pytest.mark.parametrize("given", [True, False], ids=["for a client", "for any"])
def test_a_virtual_address_of_the_node(node: Node, vip: str, *, given: bool) -> None:
    client, target = (CLIENT4, "10.88.0.2") if vip == VIP4 else (CLIENT6, "[fd00:88::2]")
    assert node.client.ask("tcp", vip, 8080) == f"web {client}"
    explanation = explain(node, "8080", "--to", vip, *(["--from", client] if given else []))
    holder = client if given else f"a client such as {client}"
    assert (
        explanation.last["text"]
        == f"a TCP connection from {holder} to {vip} (in on uplink) leaves for {target}:80 by cni0"
    )
    assert (explanation.status, explanation.answer) == (0, f"(in on cni0) leaves for {client} by uplink")


@pytest.mark.usefixtures("pod")
def test_the_loopback_address_is_connected_to_from_the_node(node: Node) -> None:
    explanation = explain(node, "8080", "--to", "127.0.0.1")
    assert explanation.last["text"].startswith(
        "a TCP connection from the node itself (127.0.0.1) to 127.0.0.1 leaves for "
    )
    assert (explanation.status, explanation.answer) == (0, "(in on cni0) comes back to the node itself")


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("address", ["10.88.0.2", "192.0.2.99", "198.51.100.7", "2001:db8::99", "192.0.2.255"])
def test_an_address_that_is_not_the_nodes(node: Node, address: str) -> None:
    explanation = explain(node, "8080", "--to", address)
    assert explanation.problems == [f"{address} is not an address of this node"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--to", "node"], "'node' is not an IP address"),
        (["--to", NODE4, "--from", CLIENT6], "--from and --to are of different IP versions"),
    ],
)
def test_wrong_addresses_are_wrong_usage(node: Node, arguments: list[str], error: str) -> None:
    ran = node.run(*LAUNCHER, "explain", "8080", *arguments, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert error in ran.stderr


def test_the_mapping_of_that_address_is_explained_and_no_other(node: Node, pod: Pod) -> None:
    other = node.pod(4)
    other.serve("tcp", 80, "other")
    node.add(other, mapping(8080, hostIP=NODE4), mapping(9090, hostIP=NODE4))
    explanation = explain(node, "8080", "--to", "10.88.0.1", "--from", CLIENT4)
    assert [statement["text"] for statement in explanation.statements if "leads to" in statement["text"]] == [
        f"0.0.0.0:8080/tcp leads to 10.88.0.2:80, container {pod.id}"
    ]
    assert explanation.status == 0
    explanation = explain(node, "9090", "--to", "10.88.0.1")
    assert explanation.problems == ["no mapping of host port 9090/tcp for 10.88.0.1 is installed"]
    assert explanation.statements[0]["details"] == [
        f"but {NODE4}:9090/tcp leads to {other.ip4}:80, container {other.id}"
    ]


def test_what_listens_at_that_address_gets_it_where_there_is_no_mapping(node: Node) -> None:
    node.serve("tcp", 9090, "own", NODE4)
    assert len(explain(node, "9090", "--to", NODE4).notes) == 1
    assert explain(node, "9090", "--to", "10.88.0.1").notes == []


def test_an_address_on_which_the_network_does_not_answer(node: Node) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080), hostAddresses=["10.88.0.0/24"])
    assert " to 10.88.0.1 (in on uplink) leaves for " in explain(node, "8080").last["text"]
    explanation = explain(node, "8080", "--to", NODE4, "--from", CLIENT4)
    assert explanation.problems[0].endswith(
        f" stays on the node: {NODE4} is not in the hostAddresses of the mapping's network"
    )


@pytest.mark.usefixtures("pod")
def test_an_address_of_kube_ipvs0_is_a_services(node: Node) -> None:
    node.ip("link add kube-ipvs0 type bridge", "addr add 10.96.0.1/32 dev kube-ipvs0")
    node.add(node.pod(4), mapping(9090))
    assert node.client.is_silent("tcp", "10.96.0.1", 8080)
    explanation = explain(node, "8080", "--to", "10.96.0.1", "--from", CLIENT4)
    assert explanation.last["text"] == (
        f"a TCP connection from {CLIENT4} to 10.96.0.1 (in on uplink) stays on the node:"
        " it is an address of kube-ipvs0, all of which are Services'"
    )
    assert explanation.status == 0


@pytest.mark.usefixtures("pod")
def test_a_link_local_address_cannot_be_translated(node: Node) -> None:
    node.ip("addr add fe80::1/64 dev uplink nodad")
    explanation = explain(node, "8080", "--to", "fe80::1")
    assert explanation.problems == [
        (
            "a TCP connection from a client such as fe80::3 to fe80::1 (in on uplink) stays on the node:"
            " the kernel cannot translate a link-local address to a pod"
        )
    ]


def test_a_mapping_of_a_second_uplinks_address_is_asked_for_from_there(node: Node) -> None:
    ip(f"-n {node.name} link add second type veth peer name far")
    node.ip("addr add 198.51.100.1/24 dev second", "link set second up", "link set far up")
    node.ip(f"route add default via {CLIENT4}", "route add default via 198.51.100.2 table 100")
    node.ip("rule add from 198.51.100.1 lookup 100")
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080, hostIP="198.51.100.1"))
    explanation = explain(node, "8080")
    assert "(in on second) leaves for" in explanation.last["text"]
    assert explanation.answer.endswith("leaves for 203.0.113.1 by uplink, and the connection came in on second")
