from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import Node, config, mapping
from resident import NEVER_COLD, SLOW_CALLERS, Resident, launcher, run, with_executables

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def resident(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    # a large configuration takes its time to come to the caller
    with Resident(tmp_path_factory.mktemp("resident") / "socket", SLOW_CALLERS) as made:
        yield made


@pytest.fixture
def warm(node: Node, resident: Resident, tmp_path: Path) -> Node:
    """A node whose executable has nothing but the resident process."""
    node.launcher = launcher(tmp_path, resident.path, NEVER_COLD)
    return node


def elsewhere(node: Node, *prefix: str) -> None:
    """Have the executable started by another program, which puts it somewhere else."""
    node.launcher = [*prefix, *node.launcher]


def without_addresses(pod_path: str, *mappings: dict[str, object]) -> dict[str, object]:
    """A configuration for which the pod's addresses are looked up in its namespace."""
    return {
        "cniVersion": "1.1.0",
        "name": "pods",
        "runtimeConfig": {"portMappings": list(mappings)},
        "prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": pod_path}]},
    }


@with_executables()
def test_the_rules_are_those_of_the_callers_network_namespace(warm: Node, resident: Resident) -> None:
    pod = warm.pod(4)
    warm.add(pod, mapping(8080))
    assert "goto dnat-" in warm.nft("list map inet hostport hostports")
    assert Path(f"/proc/{resident.process.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink()


@with_executables()
def test_a_relative_namespace_path_is_one_in_the_callers_directory(warm: Node) -> None:
    pod = warm.pod(4)
    elsewhere(warm, "env", "--chdir=/run/netns")
    outcome = warm.cni("ADD", pod, without_addresses(pod.path, mapping(8080)), NETNS=pod.name)
    assert (outcome.status, outcome.stdout[:1]) == (0, "{")
    assert f"dnat ip to {pod.ip4}:80" in warm.nft("list ruleset")


@with_executables()
def test_a_caller_with_mounts_of_its_own_is_understood(warm: Node, tmp_path: Path) -> None:
    pod = warm.pod(4)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    mounts = f"mount -t tmpfs tmpfs {hidden} && touch {hidden}/ns && mount --bind {pod.path} {hidden}/ns"
    elsewhere(warm, "unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")
    call = without_addresses(pod.path, mapping(8080))
    assert warm.cni("ADD", pod, call, NETNS=f"{hidden}/ns").status == 0
    assert not (hidden / "ns").exists()
    assert f"dnat ip to {pod.ip4}:80" in warm.nft("list ruleset")


@with_executables()
def test_a_caller_in_a_root_directory_of_its_own_is_understood(warm: Node, tmp_path: Path) -> None:
    pod = warm.pod(4)
    root, netns = tmp_path / "root", tmp_path / "netns"
    root.mkdir()
    netns.touch()
    mounts = f"mount --rbind / {root} && mount --bind {pod.path} {root}{netns}"
    elsewhere(warm, "unshare", "--mount", "sh", "-c", f'{mounts} && exec chroot {root} "$@"', "sh")
    assert warm.cni("ADD", pod, without_addresses(pod.path, mapping(8080)), NETNS=str(netns)).status == 0
    assert f"dnat ip to {pod.ip4}:80" in warm.nft("list ruleset")


@with_executables()
def test_a_caller_with_process_ids_of_its_own_helps_itself(node: Node, resident: Resident, tmp_path: Path) -> None:
    node.launcher = launcher(tmp_path, resident.path)
    pod = node.pod(4)
    elsewhere(node, "unshare", "--pid", "--fork", "--mount-proc")
    node.add(pod, mapping(8080))
    own = node.cni("ADD", pod, config(pod, mapping(8080)), NETNS="/proc/self/ns/net")
    assert own.code == 8


@with_executables()
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_is_as_closed_without_the_resident_process(
    resident: Resident, tmp_path: Path, closed: str
) -> None:
    call = {"cniVersion": "1.1.0", "name": "pods", "prevResult": {"cniVersion": "1.1.0"}}
    outcomes = []
    for path in (resident.path, tmp_path / "absent"):
        command = ["sh", "-c", f'exec "$0" "$@" {closed}', *launcher(tmp_path, path)]
        variables = {"CONTAINERID": "c1", "NETNS": "/run/netns/absent", "IFNAME": "eth0", "PATH": "/"}
        ran = run(command, json.dumps(call).encode(), COMMAND="ADD", **variables)
        outcomes.append((ran.returncode, ran.stdout))
    assert outcomes[0] == outcomes[1]
    if closed == "<&-":
        assert json.loads(outcomes[0][1])["code"] == 5


@with_executables()
def test_a_large_configuration_is_handed_over_whole(warm: Node) -> None:
    pod = warm.pod(4)
    call = config(pod, mapping(8080), note="x" * 3_000_000)
    call["prevResult"]["note"] = "y" * 3_000_000
    assert warm.cni("ADD", pod, call).json == call["prevResult"]
