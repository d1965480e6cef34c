from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address

import pytest
from lab import BRIDGE4, NODE4, Namespace, Node, config, mapping

FROM = pytest.mark.parametrize("position", ["outside", "bridge"])
FOREIGN = 'table inet foreign {\n\tchain kept {\n\t\tcomment "not hostport\'s"\n\t\taccept\n\t}\n}\n'


def attacker(node: Node, position: str) -> Namespace:
    """Add a neighbour that sends 127.0.0.0/8 to a node, on whose bridge the kernel would let that through."""
    neighbour, gateway = (node.client, NODE4) if position == "outside" else (node.pod(4), BRIDGE4)
    neighbour.ip("addr del 127.0.0.1/8 dev lo", f"route add 127.0.0.0/8 via {gateway}")
    neighbour.set_sysctl("net/ipv4/conf/all/route_localnet", 1)
    for interface in ("all", "uplink", "cni0"):
        node.set_sysctl(f"net/ipv4/conf/{interface}/rp_filter", 0)
    return neighbour


def without_guard(node: Node) -> None:
    """Show that the attack is one: let the test repeat it on a node that is open to it."""
    node.nft("flush chain inet hostport loopback")
    node.nft("flush chain inet hostport prerouting")
    node.nft("add rule inet hostport prerouting fib daddr type local goto dispatch")
    node.set_sysctl("net/ipv4/conf/all/route_localnet", 1)


@FROM
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_neighbour_cannot_reach_a_service_on_the_nodes_localhost(node: Node, position: str, protocol: str) -> None:
    neighbour = attacker(node, position)
    node.serve(protocol, 9000, "private", "127.0.0.1")
    node.add(node.pod(), mapping(8080))
    assert neighbour.is_silent(protocol, "127.0.0.1", 9000)
    without_guard(node)
    assert neighbour.ask(protocol, "127.0.0.1", 9000).startswith("private ")


@FROM
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_published_on_localhost_is_the_nodes_alone(node: Node, position: str, protocol: str) -> None:
    neighbour, pod = attacker(node, position), node.pod()
    pod.serve(protocol, 80, "private")
    if position == "outside":
        node.set_sysctl("net/ipv4/conf/all/route_localnet", 1)  # as kube-proxy does
    node.add(pod, mapping(8080, 80, protocol, hostIP="127.0.0.1"))
    assert node.ask(protocol, "127.0.0.1", 8080).startswith("private ")
    for address in (NODE4, BRIDGE4, "127.0.0.1"):
        assert neighbour.is_silent(protocol, address, 8080)
    without_guard(node)
    assert neighbour.ask(protocol, "127.0.0.1", 8080).startswith("private ")


@FROM
def test_a_neighbour_cannot_pretend_to_be_the_nodes_localhost(node: Node, position: str) -> None:
    neighbour = attacker(node, position)
    node.add(node.pod(), mapping(8080))
    address = NODE4 if position == "outside" else BRIDGE4
    with node.socket("udp", address) as service:
        service.bind((address, 9000))
        service.settimeout(3)
        # the packet after it shows that the first one would have come by now
        send_from("127.0.0.2", neighbour, address, 9000)
        neighbour_address = send_honestly(neighbour, address, 9000)
        assert service.recvfrom(64)[1][0] == neighbour_address
        without_guard(node)
        send_from("127.0.0.2", neighbour, address, 9000)
        assert service.recvfrom(64)[1][0] == "127.0.0.2"


def send_honestly(namespace: Namespace, address: str, port: int) -> str:
    with namespace.socket("udp", address) as sending:
        sending.connect((address, port))
        sending.send(b"?")
        return str(sending.getsockname()[0])


def send_from(source: str, namespace: Namespace, address: str, port: int) -> None:
    addresses = IPv4Address(source).packed + IPv4Address(address).packed
    # the kernel fills in length, identification and header checksum; a UDP checksum of 0 is none
    header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    with namespace.inside():
        sending = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with sending:
        sending.sendto(header + struct.pack("!HHHH", 4000, port, 9, 0) + b"?", (address, 0))


@pytest.mark.parametrize(
    ("code", "keys"),
    [
        (7, {"runtimeConfig": {"portMappings": [mapping(8080, hostIP='1.2.3.4" ; flush ruleset')]}}),
        (7, {"runtimeConfig": {"portMappings": [mapping(8080, hostIP="fe80::1%; flush ruleset")]}}),
        (7, {"runtimeConfig": {"portMappings": [mapping(8080, protocol="tcp; flush ruleset")]}}),
        (7, {"runtimeConfig": {"portMappings": [mapping(8080) | {"hostPort": "8080; flush ruleset"}]}}),
        (7, {"runtimeConfig": {"portMappings": [mapping(8080) | {"containerPort": "80; flush ruleset"}]}}),
        (7, {"conditionsV4": ["counter; delete table inet foreign; add rule inet hostport output"]}),
        (7, {"conditionsV4": ["counter\ndelete table inet foreign\nadd rule inet hostport output"]}),
        (7, {"conditionsV6": ["accept", "#"]}),
        (7, {"conditionsV4": ['iifname "a']}),
        (7, {"conditionsV4": ["ip saddr $x"]}),
        (101, {"conditionsV4": ["}", "flush", "ruleset", "{"]}),
        (101, {"conditionsV4": ["accept"]}),
        (7, {"name": "pods; flush ruleset"}),
    ],
)
def test_hostile_configurations_are_refused_and_change_nothing(node: Node, code: int, keys: dict[str, object]) -> None:
    node.nft_file(FOREIGN)
    before = node.nft("list ruleset")
    pod = node.pod()
    assert node.cni("ADD", pod, config(pod, mapping(8080)) | keys).code == code
    assert node.nft("list ruleset") == before


@pytest.mark.parametrize(
    "variables",
    [
        {"ARGS": 'IgnoreUnknown=1;K8S_POD_NAMESPACE="; flush ruleset;K8S_POD_NAME=x"} ; flush ruleset'},
        {"ARGS": 'K8S_POD_NAME=a\\" flush ruleset\n flush ruleset'},
        {"ARGS": "K8S_POD_NAME=" + '"' * 5000},
        {"ARGS": "K8S_POD_NAME=p\u00f6d\u2028\u200b"},
        {"IFNAME": '"};flush\\#$'},
        {"IFNAME": "\u00e9\u00e9\u00e9"},
        {"NETNS": '/nowhere/" } ; flush ruleset #\n'},
        {"NETNS": "/run/netns/" + "n" * 200},
        {"CONTAINERID": "c" * 5000},
    ],
)
def test_hostile_names_become_harmless_text(node: Node, variables: dict[str, str]) -> None:
    node.nft_file(FOREIGN)
    before = node.nft("list ruleset")
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    wanted = config(pod, mapping(8080))
    for interface in wanted["prevResult"]["interfaces"]:
        if "sandbox" in interface:
            interface["name"] = variables.get("IFNAME", "eth0")
    for command in ("ADD", "CHECK"):
        outcome = node.cni(command, pod, wanted, **variables)
        assert not outcome.status, outcome
    assert node.client.ask("tcp", NODE4, 8080).startswith("web ")
    assert node.nft("list table inet foreign") == before
    assert not node.cni("DEL", pod, wanted, **variables).status
    assert "8080" not in node.ruleset()
    assert node.client.is_silent("tcp", NODE4, 8080)
