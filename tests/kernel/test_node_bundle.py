"""A real bundle installs itself on a node, replaces another under calls, and goes again."""

from __future__ import annotations

import json
import subprocess
import threading
from typing import TYPE_CHECKING

import bundle
import pytest
from node_root import BIN_DIR, LIB_DIR, LIMITED, NodeRoot, name_of
from resident import eventually

from cni_hostport import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Node

EARLIER, LATER = "0.0.9", "0.1.1"  # which nobody else on this machine runs meanwhile
CALL = {
    "CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_NETNS": "", "CNI_IFNAME": "eth0", "CNI_PATH": str(BIN_DIR)
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(_kernel: None) -> dict[str, Path]:
    return {version: bundle.directory(version) for version in (EARLIER, LATER)}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[NodeRoot]:
    """A node's root directory: nothing but what the kernel shows."""
    with NodeRoot.mounted(tmp_path / "root") as made:
        (made.path / "proc").mkdir()
        subprocess.run(["mount", "--bind", "/proc", made.path / "proc"], check=True)
        yield made


def run(path: Path, root: NodeRoot, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of a bundle as an init container does, in a network namespace of its own."""
    own = ["unshare", "--net", *LIMITED, str(path / "bin" / "hostport"), "node", command, f"--root={root.path}"]
    return subprocess.run(own, capture_output=True, text=True, check=False, env={})


def call(root: NodeRoot) -> str:
    """Have the executable on the node run a DEL, and return what is wrong with its answer."""
    stdin = json.dumps({"cniVersion": "1.1.0", "name": "pods", "type": "hostport"})
    process = root.start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=CALL)
    output, _ = process.communicate(stdin)
    return f"{process.returncode}: {output}" if process.returncode or output else ""


def test_a_bundle_installs_itself_replaces_another_under_calls_and_goes(
    node: Node, root: NodeRoot, bundles: dict[str, Path]
) -> None:
    names = {version: name_of(path).replace(__version__, version, 1) for version, path in bundles.items()}
    first = run(bundles[EARLIER], root, "install")
    assert first.stderr == (
        f"Copied to {LIB_DIR}/{names[EARLIER]}\n"
        f"Installed {BIN_DIR}/hostport, which leads to {LIB_DIR}/{names[EARLIER]}\n"
    )
    outcomes, end = list[str](), threading.Event()

    def calls() -> None:
        with node.inside():  # which a thread enters for itself
            while not end.is_set():
                outcomes.append(call(root))

    caller = threading.Thread(target=calls)
    caller.start()
    try:
        assert run(bundles[LATER], root, "install").returncode == 0
        assert root.current == names[LATER]
        again = run(bundles[LATER], root, "install")
        assert eventually(lambda: len(outcomes) > 3)
    finally:
        end.set()
        caller.join()
    assert "Copied" not in again.stderr
    assert not [*filter(None, outcomes)]
    assert root.installed == sorted(names.values())
    about = root.start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}).communicate()[0]
    assert about.startswith(f"CNI hostport plugin v{LATER}\n")
    root.switched_before(3600)
    assert run(bundles[LATER], root, "install").returncode == 0
    assert root.installed == [names[LATER]]
    removed = run(bundles[LATER], root, "uninstall")
    assert removed.returncode == 0, removed.stderr
    assert not root.link.is_symlink()
    assert root.installed == []
