from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from doctor_node import Practice
from lab import LAUNCHER, NODE4, mapping
from libcni_cache import CAPABLE

from cni_hostport.kernel.nft import Nft
from cni_hostport.operate.doctor import checks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lab import Node


@pytest.fixture
def practice(node: Node, tmp_path: Path) -> Practice:
    return Practice(node, tmp_path)


def test_a_sound_node_is_told_what_was_checked(practice: Practice) -> None:
    practice.running(mapping(8080), mapping(8081, hostIP=NODE4))
    before = practice.node.nft("-sa list ruleset")
    output = practice.says()
    assert {item.status for item in output} == {"ok"}
    # without CRI-O and without ranges of dynamic host ports, nothing is said about these
    assert len(output) == len(checks.CHECKS) - 2
    assert os.uname().release in output[0].text
    assert practice.node.nft("-sa list ruleset") == before


def test_a_sound_node_without_pods_is_left_without_a_ruleset(practice: Practice) -> None:
    assert practice.finds() == []
    assert practice.node.nft("list ruleset") == ""


DOCTOR = (
    "from pathlib import Path; from cni_hostport.operate.doctor import checks\n"
    "for one in checks.examine([Path('{conf}')], [Path('{cache}')]): print(one.status, one.text, one.remedy)"
)


def confined(practice: Practice, *command: str) -> str:
    """Return what the doctor says in another process, started by other commands."""
    program = DOCTOR.format(conf=practice.conf, cache=practice.cache.directory)
    return practice.node.run(*command, LAUNCHER[0], "-c", program).stdout


def test_without_the_right_to_change_the_network_every_check_that_needs_it_says_so(practice: Practice) -> None:
    output = confined(practice, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    assert "problem nftables cannot be used on this node" in output
    assert "Run this as root" in output
    assert (
        "note the base rules could not be checked" in output or "note the forward policy could not be checked" in output
    )
    assert "ok the network configurations call hostport as they should" in output


@pytest.mark.parametrize("version", ["0.9.8", "1.0.1"])
def test_an_old_libnftables_is_named_with_the_version_that_is_needed_and_given_no_rules(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    def listing(_: Nft, what: str) -> list[dict[str, object]]:
        return [{"metainfo": {"version": version}}] if what == "chains" else []

    def run(_: Nft, commands: Sequence[str]) -> None:
        pytest.fail(f"{commands[0]} would have been run")

    monkeypatch.setattr(Nft, "listing", listing)
    monkeypatch.setattr(Nft, "run", run)
    output = practice.says()[0]
    assert (output.status, output.text) == (
        "problem",
        f"libnftables {version} is too old: host ports need 1.0.2 or later",
    )
    assert "Debian 12" in output.remedy


@pytest.mark.parametrize("version", ["1.0.2", "1.0.9-dev", "1.1", "10.0"])
def test_a_libnftables_that_is_not_too_old_is_asked(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    listing = Nft.listing

    def other(nft: Nft, what: str) -> list[dict[str, object]]:
        listed = listing(nft, what)
        return [{"metainfo": {"version": version}} if "metainfo" in item else item for item in listed]

    monkeypatch.setattr(Nft, "listing", other)
    assert version in practice.says()[0].text
    assert practice.says()[0].status == "ok"


def test_without_libnftables_the_package_is_named(practice: Practice) -> None:
    hide = 'for library in $(find / -xdev -name "libnftables.so*"); do mount --bind /dev/null "$library"; done'
    output = confined(practice, "unshare", "--mount", "sh", "-c", f'{hide}; exec "$@"', "sh")
    assert "problem nftables cannot be used on this node" in output
    assert "Install the package libnftables1" in output
    assert "ok the network configurations call hostport as they should" in output


def test_a_table_of_another_kind_in_the_way_is_shown(practice: Practice) -> None:
    practice.node.nft_file("add table inet hostport; add set inet hostport hostports { type ipv4_addr; }")
    first = practice.finds()[0]
    assert first.status == "problem"
    assert "hostports" in first.details[0]


@pytest.mark.parametrize(("setting", "version"), [("net/ipv4/ip_forward", 4), ("net/ipv6/conf/all/forwarding", 6)])
def test_forwarding_that_is_off_is_a_problem_once_there_are_mappings(
    practice: Practice, setting: str, version: int
) -> None:
    practice.node.set_sysctl(setting, 0)
    assert practice.finding().status == "note"
    practice.running(mapping(8080))
    found = practice.finding()
    assert (found.status, found.text) == ("problem", f"{setting.replace('/', '.')} is 0")
    assert f"the 1 mappings of IPv{version} lead nowhere" in found.meaning
    practice.node.run("sysctl", "-w", found.remedy.split()[2].rstrip(","))
    assert practice.finds() == []


def test_an_interface_that_does_not_forward_is_worth_a_note(practice: Practice) -> None:
    practice.node.set_sysctl("net/ipv4/conf/uplink/forwarding", 0)
    assert practice.finding().text == "net.ipv4.conf.IF.forwarding is 0 for uplink"


def second_uplink(practice: Practice) -> None:
    practice.node.bridge("second", "198.51.100.1/24")
    practice.node.set_sysctl("net/ipv4/conf/all/rp_filter", 1)


def test_strict_reverse_path_filtering_is_harmless_with_one_uplink(practice: Practice) -> None:
    practice.node.set_sysctl("net/ipv4/conf/all/rp_filter", 1)
    assert practice.finds() == []


def test_strict_reverse_path_filtering_on_two_uplinks_is_worth_a_note(practice: Practice) -> None:
    second_uplink(practice)
    found = practice.finding()
    assert (found.status, found.text) == ("note", "rp_filter is strict (1) on second and uplink")
    practice.node.set_sysctl("net/ipv4/conf/second/rp_filter", 2)
    assert practice.finds() == []


def test_the_bridge_of_pods_is_no_uplink(practice: Practice) -> None:
    practice.node.bridge("pods0", "10.77.0.1/24")
    practice.node.set_sysctl("net/ipv4/conf/all/rp_filter", 1)
    assert len(practice.finds()) == 1
    practice.configure("10-pods.conflist", {"type": "bridge", "bridge": "pods0"}, CAPABLE)
    assert practice.finding().text.endswith("on cni0 and uplink")
    practice.configure("10-pods.conflist", {"type": "ptp"}, CAPABLE)
    practice.running(mapping(8080), addresses=["10.77.0.2/24"], gateways=["10.77.0.1"], bridge="pods0")
    assert practice.finding().text.endswith("on cni0 and uplink")


def test_base_rules_that_were_flushed_are_a_problem(practice: Practice) -> None:
    practice.running(mapping(8080))
    practice.node.nft("flush chain inet hostport dispatch")
    found = practice.finding()
    assert found.status == "problem"
    assert any("dispatch" in detail for detail in found.details)
    practice.node.run(*LAUNCHER, "restore", f"--cache-dir={practice.cache.directory}")
    assert practice.finds() == []
