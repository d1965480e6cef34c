"""A node's root directory, with nothing in it, and bundles by hand: as small as they can be."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Self

from cni_hostport.operate.arguments import sentence
from cni_hostport.operate.node import bundle as bundles
from cni_hostport.operate.node import installation
from cni_hostport.operate.node.bundle import DIGEST, MARKER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHROOT = shutil.which("chroot") or "/usr/sbin/chroot"
BIN_DIR, LIB_DIR = Path("/opt/cni/bin"), Path("/opt/hostport")
# a program with the capabilities that the manifests give the one that installs
LIMITED = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+sys_chroot,+dac_override"]
# answers to VERSION, where the marker of its installation is; with an argument, tells its version and waits
SOURCE = r"""
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    if (argc > 1) {
        puts(VERSION);
        fflush(stdout);
        for (;;) pause();
    }
    puts("{\"cniVersion\": \"1.1.0\", \"supportedVersions\": [\"1.1.0\"], \"is\": \"" VERSION "\"}");
    return 0;
}
"""


@cache
def executable(version: str) -> bytes:
    """Return a static executable that answers to VERSION."""
    path = Path(mkdtemp()) / "executable"
    options = [f'-DVERSION="{version}"', "-Os", "-static", "-s", "-x", "c", "-", "-o", str(path)]
    subprocess.run(["cc", *options], input=SOURCE, text=True, check=True)
    content = path.read_bytes()
    path.unlink()
    path.parent.rmdir()
    return content


def make_bundle(path: Path, version: str) -> Path:
    """Make a bundle that has each kind of thing."""
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "hostport").write_bytes(executable(version))
    (path / "bin" / "hostport").chmod(0o755)
    (path / "bin" / "python3").symlink_to("../lib/python")
    (path / "lib" / "empty").mkdir(parents=True)
    (path / "lib" / "empty").chmod(0o555)
    (path / "lib" / "python").write_text("not one")
    (path / "lib" / "python").chmod(0o755)
    (path / "lib" / "module.py").write_text(f"version = '{version}'\n")
    os.utime(path / "lib" / "module.py", (1000, 1000))
    (path / MARKER).touch()
    (path / DIGEST).write_text(f"{hashlib.sha256(version.encode()).hexdigest()[:12]}\n")
    return path


@dataclass
class Ran:
    """How a command ended: its exit status, negative for a signal; and what it printed."""

    status: int
    text: str


def forked(work: Callable[[Callable[[str], None]], None]) -> Ran:
    """Run in a fork of this process what takes a function for lines; an ``OSError`` is printed as commands do."""
    output = os.memfd_create("output")
    child = os.fork()
    if not child:
        status = 70
        try:
            try:
                work(lambda line: void(os.write(output, f"{line}\n".encode())))
                status = 0
            except OSError as error:
                os.write(output, f"Error: {sentence(error)}\n".encode())
                status = 1
        except BaseException:  # noqa: BLE001 - nothing of it may reach the test
            os.dup2(output, 2)
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    text = os.pread(output, os.fstat(output).st_size, 0).decode()
    os.close(output)
    return Ran(os.waitstatus_to_exitcode(waited), text)


def void(_: object) -> None:
    """Return nothing, whatever comes in."""


class Fault:
    """An audit hook that strikes at one of its events: nearly all system calls that Python makes for files are such."""

    EVENTS = ("open", "os.", "shutil.", "subprocess.", "fcntl.", "tempfile.")

    def __init__(self, strike: Callable[[], None], at: int) -> None:
        self.strike, self.at, self.number = strike, at, 0

    def __call__(self, event: str, _: object) -> None:
        if event.startswith(self.EVENTS):
            self.number += 1
            if self.number == self.at:
                self.strike()


@dataclass
class NodeRoot:
    """The root directory of a node."""

    path: Path

    @classmethod
    @contextmanager
    def mounted(cls, path: Path) -> Iterator[Self]:
        """Make one in memory: disks take their time to write all that they were given."""
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", path], check=True)
        try:
            yield cls(path)
        finally:
            subprocess.run(["umount", "--lazy", path], check=True)

    def install(self, bundle: Path, bin_dir: Path = BIN_DIR, lib_dir: Path = LIB_DIR) -> Ran:
        """Install a bundle as ``hostport node install`` does."""
        return forked(lambda log: installation.install(bundle, self.path, bin_dir, lib_dir, log))

    def at(self, path: Path) -> Path:
        """Return where a path of the node's is, as long as no link is on it."""
        return self.path / path.relative_to("/")

    @property
    def link(self) -> Path:
        return self.at(BIN_DIR) / "hostport"

    @property
    def installed(self) -> list[str]:
        """What is in the directory of installations."""
        return sorted(os.listdir(self.at(LIB_DIR))) if self.at(LIB_DIR).exists() else []

    @property
    def current(self) -> str:
        """The name of the installation that the executable leads to."""
        return self.link.readlink().parent.parent.name

    def answer(self) -> str:
        """Return what the executable says to VERSION, run within the root directory."""
        return self.start(stdout=subprocess.PIPE, env={"CNI_COMMAND": "VERSION"}).communicate()[0]

    def start(self, *arguments: str, path: Path = BIN_DIR / "hostport", **options: object) -> subprocess.Popen[str]:
        """Start the executable within the root directory."""
        command = [CHROOT, self.path, path, *arguments]
        return subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload,no-any-return]

    def switched_before(self, seconds: float) -> None:
        """Let it be so long since the executable was changed."""
        then = self.link.lstat().st_mtime - seconds
        os.utime(self.link, (then, then), follow_symlinks=False)


def name_of(bundle: Path) -> str:
    """Return the name of an installation of a bundle."""
    with bundles.opened(bundle) as opened:
        return opened.name
