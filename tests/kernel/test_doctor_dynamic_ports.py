from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from doctor_node import Practice
from dynamic_ports import asking, given
from hostport_list import listed
from lab import LAUNCHER, NODE4, Node, mapping
from libcni_cache import CAPABLE

from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Pod

    from cni_hostport.operate.statements import Statement

BRIDGE: dict[str, Any] = {"type": "bridge"}
LOCAL_RANGE, RESERVED = "net/ipv4/ip_local_port_range", "net/ipv4/ip_local_reserved_ports"


@pytest.fixture
def practice(node: Node, tmp_path: Path) -> Practice:
    """A node whose network gives the ports 20000 to 20009 to those who ask."""
    made = Practice(node, tmp_path)
    configure(made, "20000-20009")
    return made


def configure(practice: Practice, ranges: object, *capabilities: str) -> Path:
    declared = dict.fromkeys(capabilities or ("portMappings", keys.ANNOTATIONS), True)
    plugin = {"type": "hostport", "capabilities": declared, "dynamicPorts": ranges}
    return practice.configure("10-pods.conflist", BRIDGE, plugin)


def running(practice: Practice, request: str, *mappings: dict[str, Any]) -> Pod:
    """A pod that asks for dynamic ports, added by a runtime with a cache."""
    pod = practice.node.pod(4)
    asked = asking(request, *mappings, dynamicPorts="20000-20009")
    plugin = {**CAPABLE, "capabilities": {"portMappings": True, keys.ANNOTATIONS: True}, "dynamicPorts": "20000-20009"}
    practice.node.add(pod, **asked)
    practice.cache.add(pod, plugin=plugin, capabilityArgs=asked["runtimeConfig"])
    return pod


def taken(practice: Practice) -> Statement:
    """What is said of how full the ranges are."""
    [found] = [statement for statement in practice.says() if "are taken" in statement.text]
    return found


def test_a_range_that_overlaps_no_other_is_sound_and_how_full_it_is_is_told(practice: Practice) -> None:
    path = practice.conf / "10-pods.conflist"
    assert practice.finds() == []
    assert taken(practice).text == f"{path}: of the 10 dynamicPorts 20000-20009, these are taken: none"
    running(practice, "80, 81, 9000-9001/udp", mapping(8080))
    assert practice.finds() == []
    assert taken(practice).text == f"{path}: of the 10 dynamicPorts 20000-20009, these are taken: 2 of tcp, 2 of udp"
    configure(practice, ["20000", "20002-20004, 20008-20009"])
    assert "of the 6 dynamicPorts 20000,20002-20004,20008-20009," in taken(practice).text


def test_a_range_that_is_nearly_full_is_worth_a_note(practice: Practice) -> None:
    running(practice, "1-8")
    assert practice.finds() == []
    running(practice, "9, 9/udp")
    found = practice.finding()
    assert (found.status, found.text.partition(": ")[2]) == (
        "note", "of the 10 dynamicPorts 20000-20009, these are taken: 9 of tcp, 1 of udp",
    )  # fmt: skip


def test_ports_that_the_kernel_gives_to_programs_are_worth_a_note_and_the_remedy_works(practice: Practice) -> None:
    node = practice.node
    node.set_sysctl(LOCAL_RANGE, "32768 60999")
    node.set_sysctl(RESERVED, "8080,40000-40002,40004")
    configure(practice, "40000-40009")
    found = practice.finding()
    path = practice.conf / "10-pods.conflist"
    assert found.status == "note"
    assert found.text == (
        f"{path}: 40003,40005-40009 of dynamicPorts are in net.ipv4.ip_local_port_range (32768-60999)"
    )
    command = found.remedy.partition(", ")[0]
    assert command == "sysctl -w net.ipv4.ip_local_reserved_ports=8080,40000-40009"
    node.set_sysctl(RESERVED, command.partition("=")[2])
    assert node.get_sysctl(RESERVED) == "8080,40000-40009"
    assert practice.finds() == []
    node.set_sysctl(RESERVED, "\n")
    node.set_sysctl(LOCAL_RANGE, "40009 60999")
    assert " 40009 of dynamicPorts are in " in practice.finding().text
    node.set_sysctl(LOCAL_RANGE, "50000 60999")
    assert practice.finds() == []


def test_ports_that_can_be_those_of_services_are_worth_a_note(practice: Practice) -> None:
    configure(practice, "29000-31000")
    found = practice.finding()
    assert found.status == "note"
    assert "30000-31000 of dynamicPorts are in Kubernetes' range of NodePorts (30000-32767" in found.text
    configure(practice, "29000-29999")
    assert practice.finds() == []


def test_a_fixed_port_within_a_range_is_worth_a_note_that_names_its_pod(practice: Practice) -> None:
    other = running(practice, "80", mapping(8080))
    free = 20003 if given(practice.node)[other.id]["80/tcp"] != 20003 else 20004
    pod = practice.running(mapping(free, hostIP=NODE4))
    found = practice.finding()
    assert found.status == "note"
    assert "pods have fixed host ports within dynamicPorts" in found.text
    assert found.details == (f"{NODE4}:{free}/tcp leads to container {pod.id}",)


@pytest.mark.parametrize("capabilities", [["portMappings"], ["portMappings", "bandwidth"]])
def test_ranges_for_which_nobody_can_ask_are_a_problem(practice: Practice, capabilities: list[str]) -> None:
    path = configure(practice, "20000-20009", *capabilities)
    found = practice.finding()
    assert (found.status, found.text) == (
        "problem", f"{path}: hostport has dynamicPorts, and no capability by which a pod can ask for one",
    )  # fmt: skip
    assert f'"{keys.ANNOTATIONS}": true' in found.remedy


@pytest.mark.parametrize(
    ("plugin", "severities"),
    [
        ({"capabilities": {"portMappings": True, keys.ANNOTATIONS: True}}, []),
        ({"capabilities": {"portMappings": True, keys.CAPABILITY: True}, "dynamicPorts": "20000"}, []),
        ({"capabilities": {keys.ANNOTATIONS: True}, "dynamicPorts": "20000"}, ["note"]),
        ({"capabilities": {keys.CAPABILITY: True}, "dynamicPorts": "20000"}, ["note"]),
        ({"capabilities": {keys.ANNOTATIONS: True}}, ["problem"]),
        ({"capabilities": {keys.ANNOTATIONS: "true"}, "dynamicPorts": "20000"}, ["problem", "problem"]),
        ({"dynamicPorts": "20000"}, ["problem", "problem"]),
    ],
    ids=["agent", "cnitool", "CRI-O", "own", "nothing comes", "not true", "none"],
)
def test_what_a_runtime_is_told_to_send_is_enough_or_not(
    practice: Practice, plugin: dict[str, Any], severities: list[str]
) -> None:
    practice.configure("10-pods.conflist", BRIDGE, {"type": "hostport", **plugin})
    assert [statement.status for statement in practice.finds()] == severities


def test_ranges_that_are_wrong_are_told_once(practice: Practice) -> None:
    configure(practice, "20009-20000")
    found = practice.finding()
    assert (found.status, "dynamicPorts '20009-20000' has '20009-20000', which is not a range" in found.text) == (
        "problem", True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "lacking"),
    [
        ("flush ruleset", "PORT/tcp, 8080/tcp, the entry of 10.88.0.2"),
        ("delete element inet hostport hostports { ipv4 . tcp . PORT }", "PORT/tcp"),
        ("flush map inet hostport dynamic_ports", "its rules are not those of its ADD"),
    ],
    ids=["ruleset", "port", "reservation"],
)
def test_a_pod_that_lost_its_dynamic_port_is_a_problem_and_the_remedy_brings_it_back(
    practice: Practice, damage: str, lacking: str
) -> None:
    running(practice, "80", mapping(8080))
    [port] = {str(item["host_port"]) for item in listed(practice.node) if item["request"]}
    practice.node.nft(damage.replace("PORT", port))
    (found,) = (find for find in practice.finds() if "is not what 1" in find.text)
    assert (found.status, found.remedy) == ("problem", "hostport restore")
    [detail] = found.details
    assert sorted(detail.partition("): ")[2].split(", ")) == sorted(lacking.replace("PORT", port).split(", "))
    practice.node.run(*LAUNCHER, "restore", f"--cache-dir={practice.cache.directory}")
    assert practice.finds() == []
    assert {str(item["host_port"]) for item in listed(practice.node) if item["request"]} == {port}


def test_a_pod_of_whose_dynamic_port_nothing_is_left_is_a_problem(practice: Practice) -> None:
    pod = running(practice, "80, 81")
    pod.run("ip", "link", "set", "eth0", "alias", "")
    practice.node.nft("flush ruleset")
    (found,) = (find for find in practice.finds() if "is not what 1" in find.text)
    ports = "the dynamic host port for 80/tcp, the dynamic host port for 81/tcp"
    assert found.details == (f"pod shop/{pod.host_end} (eth0, network pods): {ports}",)
    practice.node.delete(pod, **asking("80, 81"))
    assert not [find for find in practice.finds() if "is not what" in find.text]
