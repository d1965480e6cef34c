from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from doctor_node import Practice
from libcni_cache import CAPABLE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lab import Node

BRIDGE: dict[str, Any] = {"type": "bridge"}


@pytest.fixture
def practice(node: Node, tmp_path: Path) -> Practice:
    return Practice(node, tmp_path)


@pytest.mark.parametrize(
    ("plugins", "text"),
    [
        ([BRIDGE, {"type": "hostport"}], "does not have the capability portMappings"),
        ([BRIDGE, {**CAPABLE, "capabilities": {"portMappings": "yes"}}], "does not have the capability portMappings"),
        ([BRIDGE, CAPABLE, {"type": "portmap"}], "has portmap beside hostport"),
        ([CAPABLE, BRIDGE], "hostport is the first plugin"),
        ([BRIDGE, {**CAPABLE, "backend": "iptables"}], "backend 'iptables' is not supported"),
        ([BRIDGE, {**CAPABLE, "conditionsV4": ["ip", "saddr", "nowhere."]}], "nftables refuses the conditions"),
    ],
    ids=["no capability", "not true", "portmap", "first", "refused", "condition"],
)
def test_a_configuration_that_cannot_work_is_a_problem(
    practice: Practice, plugins: list[dict[str, Any]], text: str
) -> None:
    path = practice.configure("10-pods.conflist", *plugins)
    found = practice.finding()
    assert found.status == "problem"
    assert found.text.startswith(str(path))
    assert text in found.text
    assert found.remedy


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "valid dictionary"),
        ("{}", "name: Field required"),
        ('{"name": "pods", "plugins": [7]}', "plugins.0: Input should be a valid dictionary"),
    ],
)
def test_a_file_that_is_no_configuration_is_a_problem_with_its_reason(
    practice: Practice, content: str, reason: str
) -> None:
    (practice.conf / "99-broken.json").write_text(content)
    found = practice.finding()
    assert found.status == "problem"
    assert f"{practice.conf}/99-broken.json is not a network configuration: " in found.text
    assert reason in found.text


def test_another_configuration_that_comes_first_is_worth_a_note(practice: Practice) -> None:
    practice.configure("05-other.conf", BRIDGE)
    practice.configure("00-other.txt", BRIDGE)
    found = practice.finding()
    assert (found.status, "05-other.conf comes before" in found.text) == ("note", True)


def test_a_node_whose_configurations_do_not_use_hostport_is_told_so(practice: Practice) -> None:
    practice.configure("10-pods.conflist", BRIDGE)
    found = practice.finding()
    assert (found.status, found.text) == ("note", f"no network configuration in {practice.conf} uses hostport")


def test_a_directory_of_configurations_that_is_not_there_is_told(practice: Practice) -> None:
    absent = practice.conf / "absent"
    found = practice.finding(conf_dirs=[absent])
    assert (found.status, found.text) == ("note", f"{absent} cannot be read: No such file or directory")


def test_a_version_that_the_plugin_does_not_know_is_a_problem(practice: Practice) -> None:
    path = practice.conf / "10-pods.conflist"
    path.write_text(path.read_text().replace('"1.0.0"', '"2.0.0"'))
    found = practice.finding()
    assert (found.status, found.text) == ("problem", f"{path}: hostport does not know cniVersion '2.0.0'")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


@pytest.mark.parametrize("make", [os.mkfifo, huge])
def test_a_file_that_nobody_reads_to_its_end_is_told(practice: Practice, make: Callable[[Path], None]) -> None:
    path = practice.conf / "20-strange.conflist"
    make(path)
    found = practice.finding()
    assert found.status == "problem"
    assert found.text.startswith(f"{path} is not a network configuration: it is ")
