from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
from lab import CLIENT4, CLIENT6, NODE4, NODE6, QUIET, Namespace, Node, Pod, mapping

from cni_hostport import netlink
from cni_hostport.operate.explain import probe
from cni_hostport.operate.explain import tracked_connection as tracked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.operate.explain.packet import Packet
    from cni_hostport.operate.explain.probe import Way

ETH_P_ALL = 3
ENDS = {4: (CLIENT4, NODE4), 6: (CLIENT6, NODE6)}
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
DROP = "table inet firewall {{ chain forward {{ type filter hook forward priority 0; {}; }}; }}"
HANGING = """
from ipaddress import ip_address
from cni_hostport.operate.explain import probe, tracked_connection
import time
packet = probe.make("tcp", ip_address("192.0.2.2"), ip_address("192.0.2.1"), 8080)
with tracked_connection.connection(packet, probe.send(packet, "uplink")):
    print("known", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with host port 8080, tcp and udp, and masquerading for its neighbours."""
    made = node.pod()
    node.add(made, mapping(8080), mapping(8080, 80, "udp"))
    return made


@contextmanager
def inside(node: Node) -> Iterator[None]:
    with node.inside():
        try:
            yield
        finally:
            netlink.KEPT.clear()


def first(protocol: str, version: int) -> Packet:
    client, own = map(ip_address, ENDS[version])
    return probe.make(protocol, client, own, 8080)


def answered(sent: Packet, way: Way, interface: str) -> tuple[Packet, Way]:
    assert way.destination
    assert way.source
    answer = probe.answer(sent, way.destination, way.source)
    with tracked.connection(sent, way):
        return answer, probe.send(answer, interface)


def entries(node: Node, version: int) -> list[str]:
    lines = node.run("conntrack", "-L", "-f", f"ipv{version}").stdout.splitlines()
    return [line for line in lines if "dport=8080" in line]


def sniffer(namespace: Namespace) -> socket.socket:
    with namespace.inside():
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))


def heard(sniffing: socket.socket, *sent: Packet) -> list[bytes]:
    sniffing.settimeout(QUIET)
    frames = []
    while True:
        try:
            frames.append(sniffing.recv(4096))
        except TimeoutError:
            break
    numbers = [(packet.mark + more).to_bytes(5)[-4:] for packet in sent for more in (0, 1)]
    return [frame for frame in frames if any(number in frame for number in numbers)]


@pytest.mark.usefixtures("pod")
@VERSIONS
@PROTOCOLS
def test_connection_tracking_knows_the_connection_for_that_while(node: Node, version: int, protocol: str) -> None:
    sent = first(protocol, version)
    with inside(node):
        way = probe.send(sent, "uplink")
        assert entries(node, version) == []
        with tracked.connection(sent, way):
            [entry] = entries(node, version)
        assert entries(node, version) == []
    client, own = ENDS[version]
    target = "10.88.0.2" if version == 4 else "fd00:88::2"
    tuples = re.findall(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)", entry)
    assert tuples == [(client, own, str(sent.source_port), "8080"), (target, client, "80", str(sent.source_port))]


@VERSIONS
@PROTOCOLS
def test_the_answer_goes_the_way_back_and_reaches_nobody(node: Node, pod: Pod, version: int, protocol: str) -> None:
    sent = first(protocol, version)
    with sniffer(pod) as in_pod, sniffer(node.client) as outside, inside(node):
        answer, way = answered(sent, probe.send(sent, "uplink"), "cni0")
        assert [of for sniffing in (in_pod, outside) for of in heard(sniffing, sent, answer)] == []
    client, own = map(ip_address, ENDS[version])
    assert (way.end, way.interface) == ("postrouting", "uplink")
    assert (way.source, way.destination) == ((own, 8080), (client, sent.source_port))


@VERSIONS
@PROTOCOLS
def test_the_answer_to_a_masqueraded_client_is_translated_back(
    node: Node, pod: Pod, version: int, protocol: str
) -> None:
    own = ip_address(ENDS[version][1])
    sent = probe.make(protocol, ip_address(pod.ip4 if version == 4 else pod.ip6), own, 8080)
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", 0)
    node.set_sysctl("net/bridge/bridge-nf-call-ip6tables", 0)
    with inside(node):
        there = probe.send(sent, "cni0")
        assert there.source
        assert there.source[0] == ip_address("10.88.0.1" if version == 4 else "fd00:88::1")
        _, way = answered(sent, there, "cni0")
    assert (way.source, way.destination) == ((own, 8080), sent.client)


@VERSIONS
@pytest.mark.parametrize(
    ("protocol", "reject"),
    [
        ("tcp", "ct direction reply reject with icmpx port-unreachable"),
        ("udp", "ct direction reply reject with icmpx port-unreachable"),
        ("tcp", "ct direction reply meta l4proto tcp reject with tcp reset"),
    ],
)
def test_nobody_hears_that_the_answer_was_rejected(
    node: Node, pod: Pod, version: int, protocol: str, reject: str
) -> None:
    node.nft_file(DROP.format(reject))
    sent = first(protocol, version)
    with sniffer(pod) as in_pod, sniffer(node.client) as outside, inside(node):
        answer, way = answered(sent, probe.send(sent, "uplink"), "cni0")
        assert [of for sniffing in (in_pod, outside) for of in heard(sniffing, sent, answer)] == []
    assert (way.end, way.hops[-1].chain, way.hops[-1].verdict) == ("forward", "forward", "drop")


@pytest.mark.usefixtures("pod")
def test_mark_and_zone_of_the_connection_are_those_that_rules_gave_it(node: Node) -> None:
    node.nft_file("""table inet marks {
        chain early { type filter hook prerouting priority -300; ct zone set 7; }
        chain later { type filter hook forward priority 0; ct direction original ct mark set 0x12345678; }
    }""")
    with inside(node):
        sent = first("tcp", 4)
        there = probe.send(sent, "uplink")
        assert there.tracked == (0x12345678, 7)
        _, back = answered(sent, there, "cni0")
    assert back.tracked == (0x12345678, 7)
    assert entries(node, 4) == []


def test_what_is_not_tracked_has_no_mark(node: Node) -> None:
    node.nft_file("table inet raw { chain early { type filter hook prerouting priority raw; notrack; }; }")
    with inside(node):
        way = probe.send(first("tcp", 4), "uplink")
    assert (way.end, way.tracked) == ("input", None)


@pytest.mark.usefixtures("pod")
def test_a_kernel_without_marks_and_zones_of_connections_is_traced_as_well(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CONNECTION", "ct absent . ct zone")
    sent = first("tcp", 4)
    with inside(node):
        there = probe.send(sent, "uplink")
        _, back = answered(sent, there, "cni0")
    assert (there.end, there.tracked, back.end, back.interface) == ("postrouting", None, "postrouting", "uplink")


@pytest.mark.usefixtures("pod")
def test_a_connection_that_there_is_already_is_not_touched(node: Node) -> None:
    sent = first("udp", 4)
    with inside(node):
        way = probe.send(sent, "uplink")
        with tracked.connection(sent, way):
            with (
                pytest.raises(OSError, match="connection tracking does not take a connection"),
                tracked.connection(sent, way),
            ):
                pass
            assert len(entries(node, 4)) == 1


@pytest.mark.usefixtures("pod")
def test_the_connection_goes_by_itself_when_this_is_killed(node: Node) -> None:
    command = ["nsenter", f"--net={node.path}", sys.executable, "-c", HANGING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hanging:
        assert hanging.stdout
        assert hanging.stdout.readline() == "known\n"
        assert len(entries(node, 4)) == 1
        hanging.send_signal(signal.SIGKILL)
    until = time.monotonic() + 60
    while entries(node, 4) and time.monotonic() < until:
        time.sleep(0.1)
    assert entries(node, 4) == []
