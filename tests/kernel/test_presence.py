from __future__ import annotations

import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from all_processes import SEES_ALL
from lab import LAUNCHER, Node, Pod, config, mapping
from resident import NEVER_COLD, Resident, launcher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PRIVATE = ["unshare", "--mount", "--propagation", "private"]


# in a namespace of process IDs in which it is the first, the executable sees all processes
@pytest.fixture(scope="module")
def resident(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    with Resident(tmp_path_factory.mktemp("resident") / "socket") as made:
        yield made


@pytest.fixture(params=["cold", "warm"])
def executable(request: pytest.FixtureRequest, tmp_path: Path) -> Sequence[str]:
    if request.param == "cold":
        return LAUNCHER
    return launcher(tmp_path, request.getfixturevalue("resident").path, NEVER_COLD)


def with_own_mounts(executable: Sequence[str], *places: tuple[Pod, str]) -> list[str]:
    """Start the executable where /run/netns is another directory, with these namespaces at these paths."""
    mounts = "".join(f"touch {path}; mount --bind /mnt/{pod.name} {path}; " for pod, path in places)
    script = f'mount --rbind /run/netns /mnt; mount -t tmpfs none /run/netns; {mounts}exec "$@"'
    return [*PRIVATE, "sh", "-ec", script, "sh", *executable]


@contextmanager
def file_at(path: str) -> Iterator[None]:
    Path(path).touch()
    try:
        yield
    finally:
        os.unlink(path)


def noted(node: Node, old: str, new: str) -> None:
    """Have the comments in the ruleset say something else."""
    listed = node.nft("list table inet hostport")
    changed = re.sub(old, new, listed)
    assert changed != listed
    node.nft("delete table inet hostport")
    node.nft_file(changed)


@pytest.mark.parametrize("place", ["another", "that of the holder"])
def test_a_runtime_with_mounts_of_its_own_takes_no_port_from_a_pod_that_lives(
    node: Node, executable: Sequence[str], place: str
) -> None:
    holder, nested = node.pod(4), node.pod(4)
    node.add(holder, mapping(8080))
    path = "/run/netns/nested" if place == "another" else holder.path
    node.launcher = with_own_mounts(executable, (nested, path))
    refused = node.cni("ADD", nested, config(nested, mapping(8080)), NETNS=path)
    assert refused.code == 100, refused
    assert node.footprint(holder)


def test_a_runtime_in_a_container_keeps_its_ports_before_that_of_the_node(
    node: Node, executable: Sequence[str]
) -> None:
    nested, other = node.pod(4), node.pod(4)
    node.launcher = with_own_mounts(executable, (nested, "/run/netns/nested"))
    assert node.cni("ADD", nested, config(nested, mapping(8080)), NETNS="/run/netns/nested").status == 0
    node.launcher = executable
    assert node.cni("ADD", other, config(other, mapping(8080))).code == 100
    assert node.footprint(nested)


@pytest.mark.parametrize("lives", [True, False])
def test_a_runtime_that_was_started_anew_with_private_mounts_knows_who_is_gone(
    node: Node, executable: Sequence[str], *, lives: bool
) -> None:
    holder, other = node.pod(4), node.pod(4)
    node.launcher = [*PRIVATE, *executable]
    node.add(holder, mapping(8080))
    if not lives:
        holder.remove()
    outcome = node.cni("ADD", other, config(other, mapping(8080)))
    assert outcome.code == (100 if lives else 0), outcome


def test_a_link_that_leads_elsewhere_for_others_tells_nothing(node: Node, tmp_path: Path) -> None:
    holder, other = node.pod(4), node.pod(4)
    link = tmp_path / "netns"
    link.symlink_to(holder.path)
    assert node.cni("ADD", holder, config(holder, mapping(8080)), NETNS=str(link)).status == 0
    node.launcher = with_own_mounts(LAUNCHER, (other, "/run/netns/other"), (other, holder.path))
    refused = node.cni("ADD", other, config(other, mapping(8080)), NETNS="/run/netns/other")
    assert refused.code == 100, refused


def test_a_link_that_leads_nowhere_here_may_lead_somewhere_for_others(node: Node, tmp_path: Path) -> None:
    holder, other = node.pod(4), node.pod(4)
    link = tmp_path / "netns"
    link.symlink_to(holder.path)
    assert node.cni("ADD", holder, config(holder, mapping(8080)), NETNS=str(link)).status == 0
    node.launcher = with_own_mounts(LAUNCHER, (other, "/run/netns/other"))
    refused = node.cni("ADD", other, config(other, mapping(8080)), NETNS="/run/netns/other")
    assert refused.code == 100, refused
    node.launcher = LAUNCHER
    holder.remove()
    node.launcher = SEES_ALL
    assert "takes over" in node.add(other, mapping(8080)).stderr


def test_a_descriptor_that_a_runtime_has_closed_tells_nothing(node: Node) -> None:
    holder, other = node.pod(4), node.pod(4)
    descriptor = os.open(holder.path, os.O_RDONLY)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    assert node.cni("ADD", holder, config(holder, mapping(8080)), NETNS=path).status == 0
    os.close(descriptor)
    assert node.cni("ADD", other, config(other, mapping(8080))).code == 100
    holder.remove()
    node.launcher = SEES_ALL
    assert "takes over" in node.add(other, mapping(8080)).stderr


def test_the_operator_sees_that_it_cannot_be_told_from_elsewhere(node: Node) -> None:
    holder = node.pod(4)
    node.add(holder, mapping(8080))
    for prefix, state in (([], "alive"), ([*PRIVATE], "alive"), (with_own_mounts([]), "unknown")):
        assert f" {state}\n" in node.run(*prefix, *LAUNCHER, "list").stdout
    holder.remove()
    assert " gone\n" in node.run(*PRIVATE, *LAUNCHER, "list").stdout


@pytest.mark.parametrize("pinned", ["mounted", "a process's", "neither"])
def test_who_sees_all_processes_knows_whether_a_namespace_exists_anywhere(
    node: Node, pinned: str, tmp_path: Path
) -> None:
    nested, other = node.pod(4), node.pod(4)
    place = tmp_path / "elsewhere"
    place.touch()
    node.launcher = with_own_mounts(LAUNCHER, (nested, "/run/netns/nested"))
    assert node.cni("ADD", nested, config(nested, mapping(8080)), NETNS="/run/netns/nested").status == 0
    inside = []
    if pinned == "mounted":
        subprocess.run(["mount", "--bind", nested.path, place], check=True)
    elif pinned == "a process's":
        inside = [
            "sh",
            "-c",
            f'nsenter --net={nested.path} sleep 60 & sleep 0.2; ip netns del {nested.name}; "$@"',
            "sh",
        ]
    try:
        if not inside:
            nested.remove()
        node.launcher = [*SEES_ALL[:4], *inside, *SEES_ALL[4:]]
        outcome = node.cni("ADD", other, config(other, mapping(8080)))
    finally:
        if pinned == "mounted":
            subprocess.run(["umount", place], check=True)
    assert outcome.code == (0 if pinned == "neither" else 100), outcome


def test_a_holder_from_before_the_directory_was_another_one_is_gone_though_its_inode_is_used_again(node: Node) -> None:
    holder, other, heir = node.pod(4), node.pod(4), node.pod(4)
    node.add(holder, mapping(8080))
    assert node.cni("ADD", heir, config(heir, mapping(8080))).code == 100
    inode = os.stat(other.path).st_ino
    noted(node, r"eth0@\d+:\d+:(\d+) (\d+):\d+ ", rf"eth0@1:1:\1 \2:{inode} ")
    holder.remove()
    assert node.cni("ADD", heir, config(heir, mapping(8080))).code == 100
    node.launcher = SEES_ALL
    assert "takes over" in node.add(heir, mapping(8080)).stderr


def test_a_holder_is_gone_though_another_namespace_has_its_path_and_its_inode(node: Node) -> None:
    holder, heir = node.pod(4), node.pod(4)
    node.add(holder, mapping(8080))
    noted(node, r"(eth0@\d+:\d+):\d+ ", r"\1:1 ")
    assert " gone\n" in node.run(*LAUNCHER, "list").stdout
    assert "takes over" in node.add(heir, mapping(8080)).stderr


@pytest.mark.parametrize("identity", [r"\1 ", ""], ids=["with identity", "without"])
def test_what_an_older_version_noted_is_judged_by_who_sees_all(node: Node, identity: str) -> None:
    holder, nested = node.pod(4), node.pod(4)
    node.add(holder, mapping(8080))
    noted(node, r"eth0@[0-9:]+ (\d+:\d+) ", f"eth0 {identity}")
    assert "eth0@" not in node.nft("list table inet hostport")
    assert " alive\n" in node.run(*LAUNCHER, "list").stdout
    node.launcher = with_own_mounts(LAUNCHER, (nested, "/run/netns/nested"))
    assert node.cni("ADD", nested, config(nested, mapping(8080)), NETNS="/run/netns/nested").code == 100
    holder.remove()
    node.launcher = SEES_ALL
    assert "takes over" in node.add(nested, mapping(8080)).stderr


def test_a_plain_file_where_the_namespace_was_is_no_holder_to_who_sees_all(node: Node) -> None:
    holder, other = node.pod(4), node.pod(4)
    node.add(holder, mapping(8080))
    holder.remove()
    with file_at(holder.path):
        assert node.cni("ADD", other, config(other, mapping(8080))).code in {0, 100}
        node.launcher = SEES_ALL
        node.add(other, mapping(8080))
    assert not node.footprint(holder)


def test_a_namespace_that_is_not_mounted_for_a_caller_is_not_gone(node: Node) -> None:
    holder, other = node.pod(4), node.pod(4)
    node.add(holder, mapping(8080))
    node.launcher = [*PRIVATE, "sh", "-ec", f'umount {holder.path}; exec "$@"', "sh", *LAUNCHER]
    assert node.cni("ADD", other, config(other, mapping(8080))).code == 100


def test_a_process_that_ended_is_a_dead_holder(node: Node) -> None:
    pod, other = node.pod(4), node.pod(4)
    command = ["nsenter", f"--net={pod.path}", "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        path = f"/proc/{process.pid}/ns/net"
        assert node.cni("ADD", pod, config(pod, mapping(8080)), NETNS=path).status == 0
        assert node.cni("ADD", other, config(other, mapping(8080))).code == 100
        process.kill()
    assert "takes over" in node.add(other, mapping(8080)).stderr
