from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from foreign_set import SET, crashes_nft, declare_set, delete_table
from kernel.test_upgrade import make_older
from lab import LAUNCHER, NODE4, config, key_of, mapping, require
from libcni_cache import Cache
from resident import Resident, launcher
from restoration import restore, running

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from lab import Node, Pod

BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
MAPPINGS = [mapping(8080), mapping(5353, 53, "udp"), mapping(8081, 81, hostIP=NODE4)]
CONDITION = ["ip", "saddr", "!=", "{", "10.0.0.0/8,", "172.16.0.0/12", "}"]
CRASH = "libnftables crashed (SIGSEGV)"


@pytest.fixture
def crashing(node: Node) -> Node:
    declare_set(node)
    require(crashes_nft(node), "needs libnftables up to 1.1.1")
    return node


def serving(node: Node) -> Pod:
    pod = node.pod()
    pod.serve("tcp", 80, pod.name)
    return pod


def is_reached(node: Node, pod: Pod, port: int = 8080) -> bool:
    return node.client.ask("tcp", NODE4, port) == f"{pod.name} 192.0.2.2"


def run(node: Node, *command: str) -> subprocess.CompletedProcess[str]:
    return node.run(*LAUNCHER, *command, check=False)


@pytest.mark.parametrize(
    ("mappings", "keys"),
    [
        (MAPPINGS, {}),
        ([mapping(8080 + number) for number in range(20)], {}),
        (MAPPINGS, {"conditionsV4": CONDITION}),
    ],
    ids=["few", "many", "conditions"],
)
def test_an_attachment_is_added_checked_replaced_and_deleted(
    crashing: Node, mappings: list[dict[str, Any]], keys: dict[str, Any]
) -> None:
    pod = serving(crashing)
    call = config(pod, *mappings, **keys)
    for _ in range(2):
        added = crashing.cni("ADD", pod, call)
        assert (added.status, added.json) == (0, call["prevResult"])
        assert f"{CRASH} on the sets of other tables" in added.stderr
        assert is_reached(crashing, pod)
        assert crashing.cni("CHECK", pod, call).status == 0
    crashing.delete(pod)
    assert not crashing.holds(pod)
    assert crashing.cni("CHECK", pod, call).code == 103


def test_an_attachment_whose_elements_its_rules_do_not_tell_is_deleted(crashing: Node) -> None:
    pod = serving(crashing)
    crashing.add(pod, mapping(8080))
    crashing.nft(f"flush chain inet hostport dnat-{key_of(pod)}")
    crashing.delete(pod)
    assert not crashing.holds(pod)


def test_a_port_of_a_pod_that_lives_is_refused_and_that_of_one_that_is_gone_taken_over(crashing: Node) -> None:
    first, second = serving(crashing), serving(crashing)
    crashing.add(first, mapping(8080))
    refused = crashing.cni("ADD", second, config(second, mapping(8080)))
    assert (refused.code, first.id[:12] in refused.msg) == (100, True)
    first.remove()
    crashing.add(second, mapping(8080))
    assert is_reached(crashing, second)
    assert not crashing.holds(first)


def test_a_call_that_a_resident_process_runs_is_answered_as_well(crashing: Node, tmp_path: Path) -> None:
    pod = serving(crashing)
    with Resident(tmp_path / "socket") as resident:
        crashing.launcher = launcher(tmp_path, resident.path)
        crashing.add(pod, mapping(8080))
        assert is_reached(crashing, pod)
        assert crashing.cni("CHECK", pod, config(pod, mapping(8080))).status == 0
        crashing.delete(pod)
        assert resident.process.poll() is None
    assert not crashing.holds(pod)


def test_status_says_that_host_ports_are_available(crashing: Node) -> None:
    assert crashing.cni("STATUS", None, BARE).status == 0
    assert crashing.run("nft", "list", "chains").stdout == "table inet foreign {\n}\n"


def test_gc_removes_what_is_not_valid(crashing: Node) -> None:
    kept, absent = serving(crashing), serving(crashing)
    crashing.add(kept, mapping(8080))
    crashing.add(absent, mapping(8081))
    valid = [{"containerID": kept.id, "ifname": "eth0"}]
    assert crashing.cni("GC", None, {**BARE, "cni.dev/valid-attachments": valid}).status == 0
    assert (crashing.holds(kept), crashing.holds(absent)) == (True, False)


def test_restore_brings_back_what_was_flushed(crashing: Node, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cni")
    pod = running(crashing, cache, mapping(8080))
    pod.serve("tcp", 80, pod.name)
    delete_table(crashing)
    assert "1 restored" in restore(crashing, cache)
    assert is_reached(crashing, pod)
    assert crashing.cni("CHECK", pod, config(pod, mapping(8080))).status == 0


def test_doctor_names_the_set_and_what_to_do_and_goes_on(crashing: Node, tmp_path: Path) -> None:
    crashing.add(serving(crashing), mapping(8080))
    ran = run(crashing, "doctor", "--json", f"--conf-dir={tmp_path}", f"--cache-dir={tmp_path}")
    available, crash, *others = json.loads(ran.stdout)
    assert available["status"] == "ok"
    assert (crash["status"], crash["text"]) == ("note", f"{CRASH} on {SET}")
    assert "1.1.3 or later" in crash["remedy"]
    assert "the rules below all host ports are as they should be" in [other["text"] for other in others]


def test_doctor_says_of_many_sets_in_one_note_how_many_they_are(crashing: Node, tmp_path: Path) -> None:
    for number in range(20):
        declare_set(crashing, f"foreign{number}")
    ran = run(crashing, "doctor", "--json", f"--conf-dir={tmp_path}", f"--cache-dir={tmp_path}")
    [crash] = [load for load in json.loads(ran.stdout) if CRASH in load["text"]]
    assert crash["text"].endswith(" and 20 more")
    assert len(crash["details"]) < 20


@pytest.mark.parametrize("command", [["list"], ["explain", "8080"], ["metrics"]], ids=str)
def test_commands_that_look_at_host_ports_work(crashing: Node, command: list[str]) -> None:
    pod = serving(crashing)
    crashing.add(pod, mapping(8080))
    ran = run(crashing, *command)
    assert ran.returncode == 0, ran
    assert pod.ip4 in ran.stdout or pod.id in ran.stdout


def test_what_cannot_be_listed_is_told_and_everything_else_is_done(crashing: Node, tmp_path: Path) -> None:
    for chain in ("hostports", "hostip_hostports", "masquerading"):
        crashing.run("nft", "-f", "-", input=f"add table ip cni_hostport; add chain ip cni_hostport {chain}")
    declare_set(crashing, "cni_hostport", "ip")
    ran = run(crashing, "doctor", "--json", f"--conf-dir={tmp_path}", f"--cache-dir={tmp_path}")
    output = [load["text"] for load in json.loads(ran.stdout)]
    assert f"what portmap left in nftables could not be checked: {CRASH}" in output
    assert "portmap left nothing in iptables" in output


def test_a_table_that_an_older_version_declared_is_upgraded(node: Node) -> None:
    old, new = serving(node), serving(node)
    node.add(old, mapping(8080))
    make_older(node)
    declare_set(node)
    require(crashes_nft(node), "needs libnftables up to 1.1.1")
    node.add(new, mapping(9090))
    assert is_reached(node, old)
    assert is_reached(node, new, 9090)
    assert node.cni("CHECK", old, config(old, mapping(8080))).status == 0
