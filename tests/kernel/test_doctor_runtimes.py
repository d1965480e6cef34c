from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from doctor_node import Practice
from lab import CLIENT4, LAUNCHER, NODE4, config, mapping
from libcni_cache import Cache

from cni_hostport.attachment import Attachment

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Node


@pytest.fixture
def practice(node: Node, tmp_path: Path) -> Practice:
    return Practice(node, tmp_path)


def test_the_ports_of_a_dead_holder_are_told_with_the_command_that_removes_them(practice: Practice) -> None:
    practice.running(mapping(9090))
    dead = practice.running(mapping(8080), mapping(8443, 443))
    dead.remove()
    found = practice.finding()
    assert found.status == "note"
    assert dead.id in found.text
    assert dead.path in found.meaning
    assert f"0.0.0.0:8080/tcp -> {dead.ip4}:80" in found.details
    command = found.remedy.partition(": ")[2].replace("/opt/cni/bin/hostport", " ".join(LAUNCHER))
    practice.node.run("sh", "-c", command)
    assert not practice.node.holds(dead)
    assert practice.finds() == []


def test_the_command_that_removes_runs_the_executable_that_said_it(
    practice: Practice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable, command = tmp_path / "bin dir" / "hostport", tmp_path / "hostport"
    executable.parent.mkdir()
    executable.touch()
    command.symlink_to(executable)
    monkeypatch.setattr("sys.argv", [str(command), "doctor"])
    practice.running(mapping(9090))
    practice.running(mapping(8080)).remove()
    assert practice.finding().remedy.endswith(f" CNI_PATH='{executable.parent}' '{executable}'")


def test_the_ports_of_a_dead_holder_whose_network_has_a_long_name_are_told_without_a_command(
    practice: Practice,
) -> None:
    practice.running(mapping(9090))
    pod = practice.node.pod()
    practice.node.add(pod, mapping(8080), name="n" * 200)
    pod.remove()
    assert "GC" in practice.finding().remedy


def test_a_process_that_sees_nobody_alive_does_not_call_them_dead(practice: Practice) -> None:
    for port in (8080, 9090):
        practice.running(mapping(port)).remove()
    found = practice.finding()
    assert found.status == "note"
    assert "does not see the runtime's mounts" in found.meaning
    assert len(found.details) == 2


@pytest.mark.parametrize(
    ("damage", "lacking"),
    [
        ("flush ruleset", "8080/tcp, 8081/tcp on 192.0.2.1, the entry of 10.88.0.2, the entry of fd00:88::2"),
        ("flush map inet hostport hostports", "8080/tcp"),
        ("flush map inet hostport pods_ip6", "the entry of fd00:88::2"),
        (
            "flush chain inet hostport {chain}",
            "the rule of 0.0.0.0:8080/tcp, the rule of [::]:8080/tcp, the rule of 192.0.2.1:8081/tcp",
        ),
    ],
    ids=["ruleset", "ports", "pods", "chain"],
)
def test_host_ports_that_a_running_container_lacks_are_a_problem_and_the_remedy_works(
    practice: Practice, damage: str, lacking: str
) -> None:
    pod = practice.running(mapping(8080), mapping(8081, hostIP=NODE4))
    chain = next(line.split()[1] for line in practice.node.ruleset().splitlines() if "chain dnat-" in line)
    practice.node.nft(damage.format(chain=chain))
    (found,) = (find for find in practice.finds() if "is not what 1" in find.text)
    assert found.status == "problem"
    assert found.details == (f"pod shop/{pod.host_end} (eth0, network pods): {lacking}",)
    practice.node.run(*LAUNCHER, *found.remedy.split()[1:], f"--cache-dir={practice.cache.directory}")
    assert practice.finds() == []
    assert practice.node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


@pytest.mark.parametrize(
    "damage",
    ["flush chain inet hostport masq-KEY", "insert rule inet hostport dnat-KEY tcp dport 8080 dnat ip to 10.9.9.9:80"],
)
def test_rules_of_a_running_container_that_were_changed_are_a_problem(practice: Practice, damage: str) -> None:
    pod = practice.running(mapping(8080))
    practice.node.nft(damage.replace("KEY", Attachment("pods", pod.id, "eth0").key))
    found = practice.finding()
    assert found.details == (f"pod shop/{pod.host_end} (eth0, network pods): its rules are not those of its ADD",)


def test_a_container_that_was_just_deleted_lacks_nothing(practice: Practice) -> None:
    pod = practice.running(mapping(8080))
    practice.node.delete(pod)
    assert practice.finds() == []


def test_a_container_that_is_gone_lacks_nothing(practice: Practice) -> None:
    practice.running(mapping(8080)).remove()
    practice.node.nft("flush ruleset")
    assert not [find for find in practice.finds() if "is not what" in find.text]


def test_a_pod_whose_addresses_are_in_a_network_stack_of_its_own_lacks_nothing_until_it_does(
    practice: Practice,
) -> None:
    pod = practice.running(mapping(8080))
    pod.ip("addr flush dev eth0")
    assert practice.finds() == []
    practice.node.nft("flush ruleset")
    assert [find for find in practice.finds() if find.text == "the ruleset is not what 1 running container asked for"]


def test_a_pod_that_has_another_address_than_it_was_given_is_not_compared(practice: Practice) -> None:
    pod = practice.running(mapping(8080))
    pod.ip("addr add 10.88.0.99/24 dev eth0", f"addr del {pod.addresses[0]} dev eth0")
    practice.node.nft("flush ruleset")
    assert not [find for find in practice.finds() if "is not what" in find.text]


def test_host_ports_that_no_cache_explains_are_worth_a_note(practice: Practice) -> None:
    pod = practice.running(mapping(8080))
    practice.cache.remove(pod)
    found = practice.finding()
    assert found.status == "note"
    assert f"{pod.id} (eth0, network pods) has host ports, and is in no cache" in found.text
    elsewhere = Cache(practice.conf / "cache")
    elsewhere.add(pod, mapping(8080))
    assert practice.finds(caches=[practice.cache.directory, elsewhere.directory]) == []


def test_an_entry_that_cannot_be_read_is_worth_a_note(practice: Practice) -> None:
    pod = practice.running()
    practice.cache.path(pod).write_text("{")
    found = practice.finding()
    assert (found.status, str(practice.cache.path(pod)) in found.text) == ("note", True)


def test_an_entry_whose_mappings_are_refused_is_worth_a_note(practice: Practice) -> None:
    pod = practice.node.pod()
    practice.cache.add(pod, mapping(8080, protocol="icmp"))
    found = practice.finding()
    assert (found.status, "'icmp' is not tcp, udp or sctp" in found.text) == ("note", True)


def test_a_node_without_a_cache_is_told_that_nothing_was_compared(practice: Practice) -> None:
    absent = practice.conf / "absent"
    found = practice.finding(caches=[absent])
    assert (found.status, str(absent) in found.text) == ("note", True)


def test_a_port_that_a_second_network_of_the_same_container_shares_is_not_missed(practice: Practice) -> None:
    pod = practice.running(mapping(8080))
    pod.ip("link add eth1 type veth peer name other")
    second = {"ips": [{"address": "10.77.0.2/24"}]}
    call = config(pod, mapping(8080), name="second", prevResult=second)
    assert practice.node.cni("ADD", pod, call, IFNAME="eth1").status == 0
    practice.cache.add(pod, mapping(8080), network="second", ifname="eth1", result=second)
    assert practice.finds() == []
