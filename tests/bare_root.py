"""Roots with a bundle in them: one that has nothing else, or this machine's with other files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXECUTABLE = "/hostport/bin/hostport"
CHROOT = shutil.which("chroot") or "chroot"  # a runtime's environment has no PATH
# the arguments: an empty directory, a bundle, the root that is below, if there is one, and what is to be changed in it
MOUNTS = """
set -eu
root=$1/root
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$root"
[ -z "$3" ] || mount -t overlay overlay -o "lowerdir=$3,upperdir=$1/upper,workdir=$1/work" "$root"
mkdir -p "$root/hostport" "$root/proc" "$root/sys" "$root/run"
mount --bind "$2" "$root/hostport"
mount -o remount,bind,ro "$root/hostport"
mount --rbind /proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs tmpfs "$root/run"
mkdir "$root/run/netns"
mount --rbind /run/netns "$root/run/netns"
cp -a "$4/." "$root"
echo
exec cat
"""


class BareRoot:
    """A root with a bundle in ``/hostport``, ``/proc``, ``/sys`` and a ``/run``; used as a context."""

    def __init__(
        self, directory: Path, bundle: Path, base: str = "", files: Mapping[str, str | bytes] | None = None
    ) -> None:
        """Make it in a new directory: above a base, such as this machine's root, and with these files."""
        changes = directory / "changes"
        changes.mkdir(parents=True)
        for name, content in (files or {}).items():
            path = changes / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            path.chmod(0o755)
        self.path = directory / "mount" / "root"
        self.path.parent.mkdir()
        arguments = ["mounts", str(self.path.parent), str(bundle), base, str(changes)]
        # it ends when the pipe is closed, which is when this process ends at the latest, and its mounts with it
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", MOUNTS, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout
        assert self._holder.stdout.readline(), "the root cannot be mounted"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.communicate()

    def command(self, *command: str) -> list[str]:
        """Return a command that runs another one there, in the caller's network namespace."""
        return ["nsenter", f"--target={self._holder.pid}", "--mount", CHROOT, str(self.path), *command]

    @property
    def inside(self) -> Path:
        """The root, as others can see it."""
        return Path(f"/proc/{self._holder.pid}/root{self.path}")

    @property
    def launcher(self) -> Sequence[str]:
        """The plugin there, for a ``Node``."""
        return self.command(EXECUTABLE)
