from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from lab import BRIDGE4, BRIDGE6, CLIENT4, NODE4, NODE6, Node, Pod, config, mapping
from resident import launcher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def pod(node: Node) -> Pod:
    return node.pod()


class Programs:
    """Sockets on the node."""

    def __init__(self, node: Node, closing: ExitStack) -> None:
        self.node = node
        self._closing = closing

    def listen(self, protocol: str, port: int, *addresses: str, only6: bool = True) -> None:
        for address in addresses:
            made = self._closing.enter_context(self.node.socket(protocol, address))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if ":" in address:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only6)
            made.bind((address, port))
            if protocol == "tcp":
                made.listen()


@pytest.fixture
def programs(node: Node) -> Iterator[Programs]:
    with ExitStack() as closing:
        yield Programs(node, closing)


def line(pod: Pod, port: str, addresses: str) -> str:
    return (
        f"hostport: host port {port}: a program of this node listens on it at {addresses};"
        f" its new connections go to container {pod.id} (eth0)\n"
    )


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("listening", "where", "said"),
    [
        (["0.0.0.0"], "", "0.0.0.0"),
        (["::"], "", "::"),
        (["0.0.0.0", "::"], "", "0.0.0.0, ::"),
        ([NODE4, BRIDGE4, "127.0.0.53"], "", f"127.0.0.53, {BRIDGE4}, {NODE4}"),
        ([NODE6], "", NODE6),
        (["0.0.0.0"], NODE4, "0.0.0.0"),
        ([NODE4], NODE4, NODE4),
        ([BRIDGE4, "127.0.0.1", "::", NODE6], NODE4, ""),
        (["::"], NODE6, "::"),
        ([NODE6], NODE6, NODE6),
        ([BRIDGE6, "::1", "0.0.0.0", NODE4], NODE6, ""),
        (["::1"], "", ""),
        (["0.0.0.0", NODE4], "::", ""),
        (["::", NODE6], "0.0.0.0", ""),
        (["127.0.0.1"], "127.0.0.1", "127.0.0.1"),
    ],
)
def test_a_program_whose_connections_go_to_the_pod_is_named_by_its_addresses(
    programs: Programs, protocol: str, listening: list[str], where: str, said: str
) -> None:
    node, pod = programs.node, programs.node.pod()
    programs.listen(protocol, 22, *listening)
    outcome = node.add(pod, mapping(22, 80, protocol, hostIP=where))
    addresses = outcome.stderr.partition(" listens on it at ")[2].partition(";")[0]
    on = "" if where in {"", "0.0.0.0", "::"} else f" on {where}"
    assert outcome.stderr == (line(pod, f"22/{protocol}{on}", addresses) if said else "")
    assert sorted(addresses.split(", ")) == sorted(said.split(", "))


@pytest.mark.parametrize(
    ("listening", "where", "said"),
    [
        ("::", "", "::"),
        ("::", NODE4, "::"),
        ("::", "0.0.0.0", "::"),
        ("::ffff:192.0.2.1", NODE4, NODE4),
        ("::ffff:192.0.2.1", NODE6, ""),
        (NODE6, NODE4, ""),
    ],
)
def test_a_socket_for_both_families_listens_on_ipv4_as_well(
    programs: Programs, listening: str, where: str, said: str
) -> None:
    programs.listen("tcp", 22, listening, only6=False)
    lines = programs.node.add(programs.node.pod(), mapping(22, hostIP=where)).stderr.splitlines()
    assert [f" listens on it at {said};" in text for text in lines] == ([True] if said else [])


@pytest.mark.parametrize("listening", ["0.0.0.0", NODE4, BRIDGE4])
def test_a_program_on_an_address_without_host_ports_keeps_its_connections(programs: Programs, listening: str) -> None:
    programs.listen("tcp", 22, listening)
    outcome = programs.node.add(programs.node.pod(), mapping(22), hostAddresses=["192.0.2.0/24"])
    assert ("listens on it" in outcome.stderr) == (listening != BRIDGE4)


def test_what_is_said_is_so(node: Node, pod: Pod) -> None:
    node.serve("tcp", 22, "program")
    pod.serve("tcp", 80, "pod")
    assert node.client.ask("tcp", NODE4, 22) == f"program {CLIENT4}"
    assert "22/tcp" in node.add(pod, mapping(22)).stderr
    assert node.client.ask("tcp", NODE4, 22) == f"pod {CLIENT4}"


def test_every_port_with_a_program_is_said_and_no_other(node: Node, programs: Programs, pod: Pod) -> None:
    programs.listen("tcp", 22, "0.0.0.0", "::")
    programs.listen("udp", 53, "127.0.0.53")
    programs.listen("tcp", 8081, "0.0.0.0")
    programs.listen("udp", 8082, "0.0.0.0")
    mappings = mapping(22), mapping(53, 53, "udp"), mapping(8080), mapping(8081, 80, "udp"), mapping(8082, 80, "sctp")
    output = node.add(pod, *mappings).stderr.splitlines(keepends=True)
    assert [text.replace("::, 0.0.0.0", "0.0.0.0, ::") for text in output] == [
        line(pod, "22/tcp", "0.0.0.0, ::"),
        line(pod, "53/udp", "127.0.0.53"),
    ]


@pytest.mark.parametrize("ports", [1, 2, 3, 64, 65, 300])
def test_a_program_is_found_whatever_the_number_of_mappings(programs: Programs, ports: int) -> None:
    programs.listen("tcp", 8000 + ports - 1, "0.0.0.0")
    programs.listen("tcp", 8000 + ports, "0.0.0.0")
    pod = programs.node.pod(4)
    output = programs.node.add(pod, *map(mapping, range(8000, 8000 + ports))).stderr
    assert output == line(pod, f"{8000 + ports - 1}/tcp", "0.0.0.0")


def test_it_is_said_again_by_a_repeated_add(node: Node, programs: Programs, pod: Pod) -> None:
    programs.listen("tcp", 22, "0.0.0.0")
    assert node.add(pod, mapping(22)).stderr == node.add(pod, mapping(22)).stderr == line(pod, "22/tcp", "0.0.0.0")


def test_a_port_that_is_not_installed_is_not_spoken_of(node: Node, programs: Programs, pod: Pod) -> None:
    node.add(pod, mapping(22))
    programs.listen("tcp", 22, "0.0.0.0")
    second = config(pod, mapping(22), prevResult={"ips": [{"address": "10.88.0.201/24"}]})
    assert "listens" not in node.cni("ADD", pod, second, IFNAME="eth1").stderr


def test_connected_sockets_and_those_of_pods_do_not_listen(node: Node, pod: Pod) -> None:
    node.client.serve("tcp", 80, "client")
    pod.serve("tcp", 22, "pod")
    with node.socket("udp", NODE4) as udp, node.socket("tcp", NODE4) as tcp:
        udp.bind((NODE4, 22))
        udp.connect((CLIENT4, 53))
        tcp.bind((NODE4, 22))
        tcp.connect((CLIENT4, 80))
        assert node.add(pod, mapping(22), mapping(22, 80, "udp")).stderr == ""


@pytest.mark.parametrize(
    "lacking", ["NETLINK_SOCK_DIAG = 31", "SOCK_DIAG_BY_FAMILY = 99", 'STATES = {"tcp": (99, 10)}']
)
def test_a_kernel_that_does_not_tell_is_no_reason_to_fail(
    node: Node, programs: Programs, pod: Pod, tmp_path: Path, lacking: str
) -> None:
    programs.listen("tcp", 22, "0.0.0.0")
    node.launcher = launcher(
        tmp_path, tmp_path / "absent", f"from cni_hostport.kernel import listeners; listeners.{lacking}"
    )
    assert node.add(pod, mapping(22)).stderr == ""
    assert node.footprint(pod)


def test_an_add_that_cannot_look_for_programs_succeeds_and_says_so(node: Node, tmp_path: Path) -> None:
    node.launcher = launcher(tmp_path, tmp_path / "none", 'sys.modules["cni_hostport.kernel.listeners"] = None')
    outcome = node.add(node.pod(4), mapping(8080))
    assert "hostport: programs of this node that listen on these host ports were not looked for: " in outcome.stderr
