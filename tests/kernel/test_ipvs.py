from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from lab import CLIENT4, NODE4, NODE6, Node, Pod, config, mapping
from resident import Resident, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVICE4, SERVICE6, LATER4, LATER6 = "10.96.0.1", "fd00:96::1", "10.96.0.2", "fd00:96::2"
FIRST, LATER = (SERVICE4, SERVICE6), (LATER4, LATER6)
NODES = {SERVICE4: NODE4, SERVICE6: NODE6, LATER4: NODE4, LATER6: NODE6}


@pytest.fixture
def node(node: Node) -> Node:
    """A node with the interface that kube-proxy makes for IPVS, and servers in the place of two Services."""
    node.ip("link add kube-ipvs0 type bridge")
    for address in FIRST + LATER:
        node.client.ip(f"route add {address} via {NODES[address]}")
    assign(node, *FIRST)
    for address in FIRST:
        node.serve("tcp", 443, "service", address)
    return node


@pytest.fixture
def resident(node: Node, tmp_path: Path) -> Iterator[Resident]:
    """The resident process of the node."""
    with node.inside(), Resident(tmp_path / "socket") as made:
        yield made


def assign(node: Node, *addresses: str, verb: str = "add", interface: str = "kube-ipvs0") -> None:
    """Do what kube-proxy does when Services come, or go."""
    lines = (f"addr {verb} {address} dev {interface}" for address in addresses)
    # nodad: a server can listen at once
    commands = "\n".join(f"{line} nodad" if ":" in line and verb == "add" else line for line in lines)
    subprocess.run(["ip", "-n", node.name, "-batch", "-"], input=commands, text=True, check=True)


def many(count: int) -> list[str]:
    return [f"10.{97 + number // 65536}.{number // 256 % 256}.{number % 256}" for number in range(count)]


def known(node: Node) -> set[str]:
    """Return the addresses that the ruleset holds to be Services'."""
    listed = (node.nft(f"list set inet hostport ipvs_ip{version}") for version in (4, 6))
    elements = (text.partition("elements = {")[2].partition("}")[0] for text in listed)
    return {address.strip() for text in elements for address in text.split(",")} - {""}


def web(node: Node, *mappings: dict[str, object]) -> Pod:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, *mappings)
    return pod


def who_answers(node: Node, address: str, port: int = 443) -> set[str]:
    """Return who answers outside, in a pod and on the node itself."""
    neighbour = node.pod()
    asked = {asking: asking.ask("tcp", address, port).split()[0] for asking in (node.client, neighbour, node)}
    return set(asked.values())


@pytest.mark.parametrize("address", FIRST)
def test_a_services_address_is_not_taken_by_a_host_port_of_every_address(node: Node, address: str) -> None:
    pod = web(node, mapping(443))
    assert who_answers(node, address) == {"service"}
    assert pod.ask("tcp", address, 443).startswith("service ")
    assert who_answers(node, NODES[address]) == {"web"}
    assert node.ask("tcp", "127.0.0.1", 443).startswith("web ")
    assert node.cni("CHECK", pod, config(pod, mapping(443))).status == 0


@pytest.mark.parametrize("any_address", ["0.0.0.0", "::"])
def test_an_unspecified_host_address_is_not_more_than_none(node: Node, any_address: str) -> None:
    address = SERVICE6 if ":" in any_address else SERVICE4
    web(node, mapping(443, hostIP=any_address))
    assert who_answers(node, address) == {"service"}
    assert who_answers(node, NODES[address]) == {"web"}


@pytest.mark.parametrize("address", FIRST)
def test_a_host_port_on_a_services_own_address_is_explicit(node: Node, address: str) -> None:
    web(node, mapping(443, hostIP=address))
    assert who_answers(node, address) == {"web"}


def test_addresses_that_come_and_go_are_known_to_the_next_add(node: Node) -> None:
    web(node, mapping(443))
    assert known(node) == set(FIRST)
    assign(node, *LATER)
    assign(node, *FIRST, verb="del")
    assert known(node) == set(FIRST)
    web(node, mapping(8080))
    assert known(node) == set(LATER)
    node.ip("link del kube-ipvs0")
    web(node, mapping(8081))
    assert known(node) == set()


@pytest.mark.parametrize("address", LATER)
def test_an_address_that_comes_after_the_last_add_is_known_to_the_resident_process(
    node: Node, resident: Resident, address: str
) -> None:
    assert resident.process.poll() is None
    web(node, mapping(443))
    assign(node, address)
    node.serve("tcp", 443, "later", address)
    assert eventually(lambda: address in known(node))
    assert who_answers(node, address) == {"later"}
    assert who_answers(node, NODES[address]) == {"web"}


@pytest.mark.usefixtures("resident")
def test_an_address_that_is_no_longer_a_services_is_the_nodes_again(node: Node) -> None:
    web(node, mapping(443))
    assign(node, *LATER)
    assert eventually(lambda: known(node) == {*FIRST, *LATER})
    assign(node, *LATER, verb="del")
    assert eventually(lambda: known(node) == set(FIRST))
    assign(node, *LATER, interface="cni0")
    for address in LATER:
        assert who_answers(node, address) == {"web"}
    node.ip("link del kube-ipvs0")
    assert eventually(lambda: known(node) == set())


def test_the_resident_process_learns_at_its_start_what_it_has_missed(node: Node, tmp_path: Path) -> None:
    web(node, mapping(443))
    assign(node, *LATER)
    with node.inside(), Resident(tmp_path / "socket"):
        assert eventually(lambda: known(node) == {*FIRST, *LATER})


@pytest.mark.usefixtures("resident")
def test_no_table_is_made_where_there_is_none(node: Node, tmp_path: Path) -> None:
    assign(node, *LATER)
    with node.inside(), Resident(tmp_path / "another"):
        assign(node, *many(100))
    assert node.nft("list ruleset") == ""


def test_an_older_table_without_the_sets_is_left_as_it_is(node: Node, tmp_path: Path) -> None:
    node.nft_file("table inet hostport { map hostports { type nf_proto . inet_proto . inet_service : verdict; }; }")
    before = node.nft("list ruleset")
    with node.inside(), Resident(tmp_path / "socket") as resident:
        assign(node, *LATER)
        assert resident.process.poll() is None
    assert node.nft("list ruleset") == before


def test_thousands_of_addresses_at_once_are_all_known_even_if_the_kernel_cannot_tell_each(
    node: Node, resident: Resident
) -> None:
    web(node, mapping(443))
    assign(node, *many(3000))
    assert eventually(lambda: known(node) == {*FIRST, *many(3000)})
    resident.signal(signal.SIGSTOP)
    try:
        assign(node, *many(3000), verb="del")
        assign(node, *LATER)
    finally:
        resident.signal(signal.SIGCONT)
    assert eventually(lambda: known(node) == {*FIRST, *LATER})
    assert resident.process.poll() is None


def test_adds_and_changes_of_addresses_at_once_end_with_the_right_addresses(node: Node, resident: Resident) -> None:
    assert resident.process.poll() is None
    for number in range(5):
        assign(node, *many(200))
        web(node, mapping(8000 + number))
        assign(node, *many(200), verb="del")
        web(node, mapping(9000 + number))
    assign(node, *LATER)
    assert eventually(lambda: known(node) == {*FIRST, *LATER})


def test_a_resident_process_that_is_killed_at_any_moment_leaves_the_host_ports_as_they_were(
    node: Node, resident: Resident
) -> None:
    pod = web(node, mapping(443))
    for number in range(5):
        assign(node, *many(500), verb="del" if number % 2 else "add")
        for process in resident.family:
            subprocess.run(["kill", "-KILL", str(process)], check=False)
        resident.process.wait()
        assert who_answers(node, NODE4) == {"web"}
        assert who_answers(node, SERVICE4) == {"service"}
        assert node.cni("CHECK", pod, config(pod, mapping(443))).status == 0
        resident.start()
    assert eventually(lambda: known(node) == {*FIRST, *many(500)})


def test_pods_that_come_and_go_are_no_reason_to_look_at_services(node: Node, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    note = f"from cni_hostport.kernel import ipvs\nipvs.sync = lambda: open('{notes}', 'a').write('x')"
    with node.inside(), Resident(tmp_path / "socket", note):
        for _ in range(3):
            node.pod().remove()
        assert eventually(lambda: notes.exists() and notes.read_text())
        assert notes.read_text() == "x"
        assign(node, *LATER)
        assert eventually(lambda: notes.read_text() > "x")


def test_connections_that_pass_by_are_left_alone(node: Node) -> None:
    node.serve("tcp", 80, "service-80", SERVICE4)
    web(node, mapping(80))
    assert node.client.ask("tcp", SERVICE4, 80) == f"service-80 {CLIENT4}"
