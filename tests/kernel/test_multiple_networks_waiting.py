from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab import CLIENT4, NODE4, Node, Outcome, config, mapping, wait
from libcni_cache import Cache
from restoration import restore

if TYPE_CHECKING:
    from collections.abc import Iterator

PORTS = [mapping(8080), mapping(8053, 53, "udp"), mapping(9443, 443, hostIP=NODE4)]
MANY = [mapping(20000 + number, 80) for number in range(20)]


class Container:
    """A container on networks A, B and C, each with an interface and an address of its own, that publishes ports."""

    def __init__(self, node: Node, *ports: dict[str, Any]) -> None:
        self.node, self.ports = node, list(ports)
        self.pod = node.pod(4)
        self.addresses = {"a": self.pod.addresses[0]}
        for number, name in enumerate("bc", start=1):
            self._join(name, f"10.{88 + number}.0")
        self.pod.serve("tcp", 80, "web")
        for address in self.addresses.values():  # else it would answer with its first one
            self.pod.serve("udp", 53, "web", address.partition("/")[0])

    def _join(self, name: str, subnet: str) -> None:
        bridge = f"cni-{name}"
        self.node.bridge(bridge, f"{subnet}.1/24")
        address = f"{subnet}.{self.pod.ip4.rpartition('.')[2]}"
        self.node.ip(f"link add {self.pod.host_end}{name} type veth peer name eth-{name} netns {self.pod.name}")
        self.node.ip(f"link set {self.pod.host_end}{name} master {bridge}", f"link set {self.pod.host_end}{name} up")
        self.pod.ip(f"addr add {address}/24 dev eth-{name}", f"link set eth-{name} up")
        self.addresses[name] = f"{address}/24"

    def config(self, name: str, ports: list[dict[str, Any]] | None = None, **keys: Any) -> dict[str, Any]:
        given = {"name": name, "prevResult": {"ips": [{"address": self.addresses[name]}]}, **keys}
        return config(self.pod, *(self.ports if ports is None else ports), **given)

    def call(self, command: str, name: str, ports: list[dict[str, Any]] | None = None, **keys: Any) -> Outcome:
        ifname = "eth0" if name == "a" else f"eth-{name}"
        return self.node.cni(command, self.pod, self.config(name, ports, **keys), IFNAME=ifname)

    def add(self, name: str, ports: list[dict[str, Any]] | None = None) -> Outcome:
        outcome = self.call("ADD", name, ports)
        assert not outcome.status, outcome
        return outcome

    def delete(self, name: str) -> None:
        outcome = self.call("DEL", name)
        assert not outcome.status, outcome

    def passes(self, *names: str) -> bool:
        outcomes = [self.call("CHECK", name) for name in names]
        return [outcome.stdout for outcome in outcomes] == [""] * len(names)

    def answers(self) -> bool:
        return (
            self.node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
            and self.node.client.ask("udp", NODE4, 8053) == f"web {CLIENT4}"
        )

    def leads_to(self, name: str) -> str:
        return f"dnat ip to {self.addresses[name].partition('/')[0]}:80"


@pytest.fixture
def container(node: Node) -> Container:
    node.client.ip("route add default via " + NODE4)
    return Container(node, *PORTS)


def remainder(node: Node) -> set[str]:
    """Return what the table still says of attachments."""
    listed = node.ruleset().splitlines()
    return {line.strip() for line in listed if "goto dnat-" in line or "goto masq-" in line or "chain dnat" in line}


def test_the_second_network_waits_and_gets_the_ports_when_the_first_goes(container: Container) -> None:
    container.add("a")
    output = container.add("b").stderr
    assert output.count("stays with another attachment of") == 3
    assert container.passes("a", "b")
    assert container.answers()
    container.delete("a")
    assert container.passes("b")
    assert container.answers()
    container.delete("b")
    assert remainder(container.node) == set()
    assert container.node.client.is_silent("tcp", NODE4, 8080)


def test_of_three_networks_the_ports_go_in_the_order_in_which_they_came(container: Container) -> None:
    for name in "bca":
        container.add(name)
    for absent, rest in (("b", "ca"), ("c", "a")):
        container.delete(absent)
        assert container.passes(*rest)
        assert container.answers()
        assert container.call("CHECK", absent).code == 103
    container.delete("a")
    assert remainder(container.node) == set()


def test_who_waits_can_go_first(container: Container) -> None:
    for name in "abc":
        container.add(name)
    container.delete("b")
    assert container.passes("a", "c")
    container.delete("a")
    assert container.passes("c")
    assert container.answers()
    container.delete("c")
    assert remainder(container.node) == set()


def test_gc_hands_ports_on(container: Container) -> None:
    container.add("a")
    container.add("b")
    collected = container.call("GC", "a", **{"cni.dev/valid-attachments": []})
    assert not collected.status, collected
    assert container.passes("b")
    assert container.answers()


def test_gc_of_the_second_network_leaves_the_first_one_with_its_ports(container: Container) -> None:
    container.add("a")
    container.add("b")
    collected = container.call("GC", "b", **{"cni.dev/valid-attachments": []})
    assert not collected.status, collected
    assert container.passes("a")
    container.delete("a")
    assert remainder(container.node) == set()


def test_a_repeated_add_keeps_ports_and_who_waits_for_them(container: Container) -> None:
    container.add("a")
    container.add("b")
    for name in "abab":
        container.add(name)
        assert container.passes("a", "b")
        assert container.answers()
    container.delete("a")
    assert container.passes("b")
    assert container.answers()


def test_a_repeated_add_with_fewer_ports_hands_the_others_on(container: Container) -> None:
    container.add("a")
    container.add("b")
    container.add("a", PORTS[1:])
    assert container.passes("b")
    assert not container.call("CHECK", "a", PORTS[1:]).status
    assert container.answers()
    container.add("a")
    assert container.passes("a", "b")


def test_an_address_that_moves_to_another_container_hands_the_ports_on(node: Node, container: Container) -> None:
    container.add("a")
    container.add("b")
    heir = node.pod(4)
    added = node.add(heir, mapping(7070), name="a", prevResult={"ips": [{"address": container.addresses["a"]}]})
    assert "takes over" in added.stderr
    assert container.passes("b")
    assert node.footprint(heir, "a")["hostports"] == 1


def test_a_container_that_gets_the_address_does_not_get_a_port_that_somebody_waits_for(
    node: Node, container: Container
) -> None:
    container.add("a")
    container.add("b")
    before, heir = node.ruleset(), node.pod(4)
    other = config(heir, mapping(8080), name="a", prevResult={"ips": [{"address": container.addresses["a"]}]})
    refused = node.cni("ADD", heir, other)
    assert refused.code == 100
    assert container.pod.id[:12] in refused.msg
    assert "eth-b" in refused.msg
    assert node.ruleset() == before


def test_a_dead_container_is_taken_over_with_all_its_networks(node: Node, container: Container) -> None:
    for name in "abc":
        container.add(name)
    heir = node.pod(4)
    heir.serve("tcp", 80, "heir")
    container.pod.remove()
    added = node.add(heir, mapping(8080))
    assert added.stderr.count("is gone; container") == 3
    assert node.client.ask("tcp", NODE4, 8080) == f"heir {CLIENT4}"
    assert node.ruleset().count("chain dnat-") == 1
    for name in "abc":
        container.delete(name)
    assert node.client.ask("tcp", NODE4, 8080) == f"heir {CLIENT4}"


def test_with_many_ports_they_wait_and_go_alike(node: Node) -> None:
    container = Container(node, *PORTS, *MANY)
    container.add("a")
    container.add("b")
    assert container.passes("a", "b")
    container.delete("a")
    assert container.passes("b")
    assert container.answers()
    container.add("a")
    container.delete("a")
    container.delete("b")
    assert remainder(node) == set()


def test_both_networks_in_both_orders_at_once(node: Node, container: Container) -> None:
    for _ in range(6):
        with _calls(container, "ADD", "ab"):
            pass
        assert container.passes("a", "b")
        assert container.answers()
        with _calls(container, "DEL", "a"), _calls(container, "ADD", "c"):
            pass
        assert container.passes("b", "c")
        assert container.answers()
        with _calls(container, "DEL", "bc"):
            pass
        assert remainder(node) == set()


@contextmanager
def _calls(container: Container, command: str, names: str) -> Iterator[None]:
    started = [
        container.node.start(
            command, container.pod, container.config(name), IFNAME="eth0" if name == "a" else f"eth-{name}"
        )
        for name in names
    ]
    yield
    outcomes = [wait(item) for item in started]
    assert [outcome.status for outcome in outcomes] == [0] * len(names), outcomes


def test_no_connection_is_refused_while_ports_are_handed_on(node: Node, container: Container) -> None:
    container.add("a")
    container.add("b")
    for item in "abab":
        assert container.leads_to(item) in node.ruleset()
        ifname = "eth0" if item == "a" else f"eth-{item}"
        deletion = node.start("DEL", container.pod, container.config(item), IFNAME=ifname)
        while deletion.poll() is None:
            assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
        assert wait(deletion).status == 0
        container.add(item)


def test_restore_brings_back_both_and_who_waits(node: Node, container: Container, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cni")
    for name, ifname in (("a", "eth0"), ("b", "eth-b")):
        container.add(name)
        given = {"ips": [{"address": container.addresses[name]}]}
        cache.add(container.pod, *PORTS, network=name, ifname=ifname, result=given)
    assert "2 present" in restore(node, cache)
    for damage in ("flush ruleset", "flush map inet hostport waiting_hostports"):
        node.nft(damage)
        assert restore(node, cache).count("stays with another attachment") <= len(PORTS)
        assert container.passes("a", "b")
        assert container.answers()
    container.delete("a")
    assert container.passes("b")
    assert container.answers()
    assert "1 gone, 1 present" in restore(node, cache)


def test_an_address_that_moves_to_another_network_of_the_container_takes_the_ports_with_it(
    node: Node, container: Container
) -> None:
    container.add("a")
    container.addresses["b"] = container.addresses["a"]
    added = container.add("b")
    assert "takes over" in added.stderr
    assert container.passes("b")
    assert container.answers()
    assert node.ruleset().count("chain dnat-") == 1


def test_a_path_that_is_another_namespace_by_now_is_no_network_of_the_same_container(
    node: Node, container: Container
) -> None:
    container.add("a")
    path = container.pod.path
    container.pod.remove()
    again = node.pod(4)
    again.serve("tcp", 80, "again")
    Path(path).touch()
    subprocess.run(["mount", "--bind", again.path, path], check=True)
    try:
        other = config(again, *PORTS, name="b", prevResult={"ips": [{"address": again.addresses[0]}]})
        added = node.cni("ADD", container.pod, other, IFNAME="eth-b")
        assert not added.status, added
        assert "takes over" in added.stderr
        assert node.client.ask("tcp", NODE4, 8080) == f"again {CLIENT4}"
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
        Path(path).unlink()
