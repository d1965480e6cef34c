"""A systemd of the test's own, in a node's network namespace, that has no more to do than its units."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from resident import eventually

if TYPE_CHECKING:
    from lab import Node

PROGRAM = Path("/lib/systemd/systemd")
CGROUPS = Path("/sys/fs/cgroup")
HIERARCHIES = [path for path in (CGROUPS, *CGROUPS.iterdir()) if (path / "cgroup.procs").exists()]
# Its own are: process IDs, control groups, and the directories in which install.sh and units write. As on a machine
# that systemd has started, mounts of others come on, here and in the units.
START = """
set -eu
top=$1
shift
for hierarchy; do echo $$ >"$hierarchy/cgroup.procs"; done
mount -t proc proc /proc
mkdir "$top/netns"
mount --rbind /run/netns "$top/netns"
for directory in /run /etc/systemd /opt /usr/local/lib /usr/local/bin /var/lib/cni /var/log; do
    mkdir -p $directory
    mount -t tmpfs tmpfs $directory
done
mkdir /run/netns
mount --rbind "$top/netns" /run/netns
cp -r "$top/units" /etc/systemd/system
mount --make-rshared /
export container=other
exec /lib/systemd/systemd --system --unit=bare.target --log-target=console --log-level=warning
"""
BARE = "[Unit]\nDefaultDependencies=no\n"


class Systemd:
    """A context in which it runs; ``units`` are files by their names, of which none depends on a whole system."""

    def __init__(self, node: Node, top: Path, units: dict[str, str]) -> None:
        self.node = node
        self.log = top / "systemd.log"
        self._top = top
        self._cgroups = [path / f"hostport-test-{os.getpid()}-{node.name}" for path in HIERARCHIES]
        bare = {"bare.target": BARE, "service.d/bare.conf": BARE, "socket.d/bare.conf": BARE}
        for name, text in (bare | units).items():
            path = top / "units" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def __enter__(self) -> Self:
        for path in self._cgroups:
            path.mkdir()
        # those of systemd's own; in others it makes what units ask for
        own = [path for path in self._cgroups if path.parent.name in {"cgroup", "systemd", "unified"}]
        spaces = ["unshare", "--mount", "--propagation", "slave", "--pid", "--fork", "--ipc", "--uts", "--kill-child"]
        present = ["nsenter", f"--net={self.node.path}"]
        command: list[str | Path] = [*present, *spaces, "sh", "-c", START, "sh", self._top, *own]
        with self.log.open("wb") as log:
            self._started = subprocess.Popen(command, stdout=log, stderr=log)
        children = Path(f"/proc/{self._started.pid}/task/{self._started.pid}/children")
        if not eventually(lambda: children.read_text().strip()):
            raise AssertionError(self.log.read_text())
        self.process = int(children.read_text())
        self.inside = ["nsenter", f"--target={self.process}", "--mount", "--pid"]
        if not eventually(lambda: self.run("systemctl", "is-active", "bare.target", check=False).returncode == 0):
            raise AssertionError(self.log.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self._started.kill()
        self._started.wait()
        for top in self._cgroups:
            for path in sorted([top, *(path for path in top.rglob("*") if path.is_dir())], reverse=True):
                eventually(partial(_is_removed, path))

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command where it runs, in the node's network namespace."""
        return subprocess.run(
            ["nsenter", f"--net={self.node.path}", *self.inside, *command], check=check, capture_output=True, text=True
        )


def _is_removed(cgroup: Path) -> bool:
    """Remove a control group, and tell whether that was done: not before what ran there has ended."""
    try:
        cgroup.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
