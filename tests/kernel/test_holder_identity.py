from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lab import CLIENT4, LAUNCHER, NODE4, Node, Pod, config, mapping

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def path_of(pod: Pod, path: str) -> Iterator[None]:
    """Have the pod's namespace at a second path, as that of a process ID is."""
    Path(path).touch()
    subprocess.run(["mount", "--bind", pod.path, path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
        os.unlink(path)


def test_a_path_that_is_another_namespace_by_now_is_a_dead_holder(node: Node) -> None:
    dead, other, heir = node.pod(4), node.pod(4), node.pod(4)
    heir.serve("tcp", 80, "heir")
    path = f"/run/netns/{node.name}-again"
    with path_of(dead, path):
        added = node.cni("ADD", dead, config(dead, mapping(8080)), NETNS=path)
        assert not added.status, added
        assert node.cni("ADD", heir, config(heir, mapping(8080))).code == 100
    dead.remove()
    with path_of(other, path):
        assert " gone" in node.run(*LAUNCHER, "list").stdout
        taken = node.add(heir, mapping(8080))
        assert f"whose namespace {path} is gone" in taken.stderr
    assert node.client.ask("tcp", NODE4, 8080) == f"heir {CLIENT4}"


def test_a_path_that_is_a_process_of_the_node_by_now_is_a_dead_holder(node: Node) -> None:
    dead, heir = node.pod(4), node.pod(4)
    path = f"/run/netns/{node.name}-again"
    with path_of(dead, path):
        assert not node.cni("ADD", dead, config(dead, mapping(8080)), NETNS=path).status
    dead.remove()
    Path(path).touch()
    subprocess.run(["mount", "--bind", node.path, path], check=True)
    try:
        assert "takes over" in node.add(heir, mapping(8080)).stderr
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
        os.unlink(path)


def test_a_holder_whose_identity_was_not_noted_is_judged_by_its_path(node: Node) -> None:
    holder, other = node.pod(4), node.pod(4)
    node.add(holder, mapping(8080))
    identity = f"{os.stat(holder.path).st_dev}:{os.stat(holder.path).st_ino}"
    listed = node.nft("list table inet hostport")
    assert f" {identity} {holder.path}" in listed
    node.nft("delete table inet hostport")
    node.nft_file(listed.replace(f" {identity} ", " "))
    assert node.cni("ADD", other, config(other, mapping(8080))).code == 100
    holder.remove()
    assert "takes over" in node.add(other, mapping(8080)).stderr
