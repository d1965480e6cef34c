from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
from lab import CLIENT4, CLIENT6, LAUNCHER, NODE4, NODE6, QUIET, Namespace, Node, Pod, mapping
from resident import eventually

from cni_hostport import netlink
from cni_hostport.operate.explain import probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.operate.explain.packet import Packet
    from cni_hostport.operate.explain.trace import Trace

ETH_P_ALL = 3
ADDRESSES = {4: (CLIENT4, NODE4), 6: (CLIENT6, NODE6)}
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
INTERFACES = pytest.mark.parametrize("interface", ["uplink", ""], ids=["from outside", "from the node"])
DROP = "table inet firewall {{ chain forward {{ type filter hook forward priority 0; {}; }}; }}"
HANGING = """
from ipaddress import ip_address
from cni_hostport.operate.explain import probe, trace
trace.QUIET_SECONDS = 60
probe.send(probe.first_packet("tcp", ip_address("192.0.2.2"), ip_address("192.0.2.1"), 8080), "uplink")
"""


def packet(protocol: str = "tcp", version: int = 4, interface: str = "uplink", port: int = 8080) -> Packet:
    client, node = map(ip_address, ADDRESSES[version])
    return probe.first_packet(protocol, client if interface else node, node, port)


def send(node: Node, sent: Packet, interface: str = "uplink") -> Trace:
    with node.inside():
        try:
            return probe.send(sent, interface)
        finally:
            netlink.close_all()


def chains(trace: Trace) -> list[str]:
    return [hop.chain.partition("-")[0] for hop in trace.hops if hop.handle]


def ready(node: Node) -> Pod:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    pod.serve("udp", 80, "dns")
    node.add(pod, mapping(8080), mapping(8080, 80, "udp"))
    return pod


def sniffer(namespace: Namespace) -> socket.socket:
    with namespace.inside():
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))


def heard(sniffing: socket.socket) -> list[bytes]:
    sniffing.settimeout(QUIET)
    frames = []
    while True:
        try:
            frames.append(sniffing.recv(4096))
        except TimeoutError:
            return frames


def is_about(frame: bytes, sent: Packet) -> bool:
    return any((sent.mark + more).to_bytes(5)[-4:] in frame for more in (0, 1))


def assert_nothing_is_left(node: Node) -> None:
    assert re.findall(r"table inet (\S+)", node.nft("list tables")) == ["hostport"]
    links = json.loads(node.run("ip", "-j", "link").stdout)
    assert {link["ifname"].rstrip("0123456789") for link in links} == {"lo", "uplink", "cni", "veth"}
    for family in ("ipv4", "ipv6"):
        assert "8080" not in node.run("conntrack", "-L", "-f", family).stdout


@contextmanager
def connections(node: Node) -> Iterator[list[str]]:
    answers: list[str] = []
    stop = threading.Event()

    def connect() -> None:
        while not stop.is_set():
            answers.append(node.client.ask("tcp", NODE4, 8080))

    connecting = threading.Thread(target=connect)
    connecting.start()
    try:
        yield answers
    finally:
        stop.set()
        connecting.join()


@VERSIONS
@PROTOCOLS
def test_the_packet_is_one_that_a_server_answers(node: Node, version: int, protocol: str) -> None:
    node.serve(protocol, 8080, "server")
    sent = packet(protocol, version)
    mac = bytes.fromhex(
        json.loads(node.run("ip", "-j", "link", "show", "uplink").stdout)[0]["address"].replace(":", "")
    )
    node.client.ask("udp" if protocol == "udp" else "tcp", ADDRESSES[version][1], 8080)
    with sniffer(node.client) as sniffing:
        sniffing.bind(("uplink", ETH_P_ALL))
        sniffing.send(sent.frame(mac))
        answer = (sent.mark + 1).to_bytes(5)[-4:] if protocol == "tcp" else b"server"
        assert eventually(lambda: any(answer in frame for frame in heard(sniffing) if frame[6:12] == mac))


@VERSIONS
@PROTOCOLS
@INTERFACES
def test_it_goes_the_way_of_a_connection_and_reaches_nobody(
    node: Node, version: int, protocol: str, interface: str
) -> None:
    pod = ready(node)
    sent = packet(protocol, version, interface)
    with sniffer(pod) as in_pod, sniffer(node.client) as outside:
        trace = send(node, sent, interface)
        assert not [frame for sniffing in (in_pod, outside) for frame in heard(sniffing) if is_about(frame, sent)]
    target = (ip_address(pod.ip4 if version == 4 else pod.ip6), 80)
    assert (trace.end, trace.destination, trace.interface) == ("postrouting", target, "cni0")
    assert chains(trace)[-2:] == ["dnat", "postrouting"]
    assert_nothing_is_left(node)


@VERSIONS
@pytest.mark.parametrize(
    ("protocol", "reject"),
    [
        ("tcp", "reject with icmpx port-unreachable"),
        ("udp", "reject with icmpx port-unreachable"),
        ("tcp", "meta l4proto tcp reject with tcp reset"),
    ],
)
def test_nobody_hears_that_it_was_rejected(node: Node, version: int, protocol: str, reject: str) -> None:
    ready(node)
    node.nft_file(DROP.format(reject))
    sent = packet(protocol, version)
    with sniffer(node.client) as outside:
        trace = send(node, sent)
        assert not [frame for frame in heard(outside) if is_about(frame, sent)]
        with pytest.raises(ConnectionRefusedError):
            node.client.ask(protocol, ADDRESSES[version][1], 8080)
    assert (trace.end, trace.hops[-1].chain, trace.hops[-1].verdict) == ("forward", "forward", "drop")


@INTERFACES
def test_a_port_without_a_mapping_ends_at_the_node(node: Node, interface: str) -> None:
    node.serve("tcp", 8080, "server")
    trace = send(node, packet(interface=interface), interface)
    assert (trace.end, trace.interface) == (("input", "") if interface else ("postrouting", "lo"))
    assert trace.destination == (ip_address(NODE4), 8080)


def test_nothing_is_left_of_it_when_it_is_killed(node: Node) -> None:
    ready(node)
    node.nft_file(DROP.format("policy drop"))
    command = ["nsenter", f"--net={node.path}", sys.executable, "-c", HANGING]
    with subprocess.Popen(command) as hanging:
        shown = ["tc", "filter", "show", "dev", "hostport0", "ingress"]
        assert eventually(lambda: node.run(*shown, check=False).stdout)
        assert "hostport-probe" in node.nft("list tables")
        hanging.send_signal(signal.SIGKILL)
    node.nft("delete table inet firewall")
    assert_nothing_is_left(node)
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


def test_many_can_probe_at_once(node: Node) -> None:
    ready(node)
    command = ["nsenter", f"--net={node.path}", *LAUNCHER, "explain", "8080", "--from", CLIENT4]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert len(set(outputs)) == 1
    assert "leaves for 10.88.0.2:80" in outputs[0]
    assert [process.returncode for process in started] == [0] * 5
    assert_nothing_is_left(node)


def trace_everything(node: Node) -> None:
    hook = "type filter hook {} priority -3000; meta nftrace set 1;"
    hooks = " ".join(f"chain {name} {{ {hook.format(name)} }};" for name in ("prerouting", "output"))
    node.nft_file(f"table inet others {{ {hooks} }}")


@pytest.mark.parametrize("traced", [False, True])
def test_real_connections_go_on_and_are_not_taken_for_it_even_if_others_trace_them(node: Node, *, traced: bool) -> None:
    ready(node)
    quiet = chains(send(node, packet()))
    if traced:
        trace_everything(node)
    with connections(node) as answers:
        for number in range(5):
            assert eventually(lambda: len(answers) > 2 * number)  # noqa: B023 - in this turn
            trace = send(node, packet())
            assert [
                hop.chain.partition("-")[0] for hop in trace.hops if hop.handle and hop.table == "hostport"
            ] == quiet
            assert trace.destination == (ip_address("10.88.0.2"), 80)
        assert eventually(lambda: len(answers) > 10)
    assert set(answers) == {f"web {CLIENT4}"}


def test_it_is_not_waited_for_longer_because_others_are_traced(node: Node) -> None:
    ready(node)
    trace_everything(node)
    node.nft_file(DROP.format("policy drop"))
    stop, begun = threading.Event(), threading.Event()

    def talk() -> None:
        with node.client.socket("udp", NODE4) as talking:
            for _ in range(3000):  # for half a minute at least
                with suppress(ConnectionRefusedError):
                    talking.sendto(b".", (NODE4, 9))
                begun.set()
                if stop.wait(0.01):
                    break

    others = threading.Thread(target=talk)
    others.start()
    begun.wait()
    trace = send(node, packet())
    assert others.is_alive()  # else their end was waited for
    stop.set()
    others.join()
    assert (trace.end, trace.hops[-1].chain, trace.hops[-1].verdict) == ("forward", "forward", "drop")


def test_a_sniffer_on_the_interface_does_not_disturb_it(node: Node) -> None:
    ready(node)
    quiet = chains(send(node, packet()))
    with sniffer(node) as sniffing:
        assert chains(send(node, packet())) == quiet
        assert heard(sniffing)


def test_an_interface_that_is_gone_cannot_be_probed(node: Node) -> None:
    with pytest.raises(OSError, match="there is no interface absent0"):
        send(node, packet(), "absent0")


def test_a_client_that_the_kernel_lets_send_nothing_cannot_be_probed(node: Node) -> None:
    sent = probe.first_packet("tcp", ip_address(NODE4), ip_address("198.51.100.1"), 80)
    with pytest.raises(OSError, match="Network is unreachable"):
        send(node, sent, "")
    assert not node.nft("list tables")
