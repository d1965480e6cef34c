"""Roots of other Debian releases than the machine's own, with the plugin installed in them as on a machine of its own.

A root is made by debootstrap, once, and kept in the cache. Whoever uses it gets a file system of its own above it, in
memory and in a mount namespace that ends with this process: whatever happens, nothing stays mounted or changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from platform import freedesktop_os_release
from typing import TYPE_CHECKING, Self

from go_tools import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

RELEASE = freedesktop_os_release().get("VERSION_CODENAME", "")
# the oldest with a Python that is new enough, what came after it, and what is to come; this machine is one of its own
SUITES = tuple(suite for suite in ("bookworm", "trixie", "sid") if suite != RELEASE)
CACHE = ROOT / ".cache" / "roots"
INCLUDED = "ca-certificates"  # what a machine has before anything can be installed on it
USED = ("nftables", "iproute2", "curl")  # by the tests, besides what install.sh installs
# how this machine reaches what it installs from, and whom it trusts there
CONFIGURATION = ("/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
# the arguments: a directory, the root below, the checkout, and whether to keep what is changed
MOUNTS = """
set -eu
root=$1/root
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$root"
if [ "$4" ]; then mount --bind "$2" "$root"
else mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$root"; fi
mkdir -p "$root/run/netns" "$root/source"
for directory in /proc /sys /dev /run/netns; do mount --rbind "$directory" "$root$directory"; done
mount --bind "$3" "$root/source"
exec chroot "$root" sh -c "echo; exec cat"
"""


class Root:
    """The root of a Debian release, as a machine to run commands on; used as a context."""

    def __init__(self, base: Path, source: Path, directory: Path, *, keep: bool = False) -> None:
        directory.mkdir(parents=True)
        arguments = ["mounts", str(directory), str(base), str(source), "1" if keep else ""]
        # it ends when the pipe is closed, which is when this process ends at the latest, and its mounts with it
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", MOUNTS, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout
        assert self._holder.stdout.readline(), f"{base} cannot be mounted"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.communicate()

    @property
    def prefix(self) -> list[str]:
        """What to put before a command for it to run there, in the caller's network namespace."""
        return ["nsenter", f"--target={self._holder.pid}", "--mount", "--root", "--wd"]

    @property
    def environment(self) -> dict[str, str]:
        """This machine's ways to package registries, for commands that are run there."""
        passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name in CERTIFICATES}
        return {"PATH": os.environ["PATH"], "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive", **PIP, **passed}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command there, in this process's network namespace, until it and all that it started have ended."""
        command = (*self.prefix, *command)
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment, timeout=600)
        assert not (check and ran.returncode), f"{command}: {ran.stdout}{ran.stderr}"
        return ran

    def install(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the checkout's ``install.sh``."""
        return self.run("/source/install.sh", *options)


def made(suite: str, source: Path, work: Path) -> Path:
    """Return the root of a release, after making it if it is not in the cache.

    It has the system packages that the plugin needs, and pip's cache, but not the plugin.
    """
    present = CACHE / suite
    if present.is_dir():
        return present
    CACHE.mkdir(parents=True, exist_ok=True)
    making = CACHE / f".{suite}-{os.getpid()}"
    try:
        command = ["debootstrap", "--variant=minbase", f"--include={INCLUDED}", suite, str(making), *_mirrors()]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not ran.returncode, f"{command}: {ran.stdout}{ran.stderr}"
        _configure(making)
        with Root(making, source, work / "making", keep=True) as root:
            root.install()
            root.install("--uninstall")
            root.run("apt-get", "install", "-y", "--no-install-recommends", *USED)
            root.run("apt-get", "clean")
        with suppress(OSError):  # another process was faster
            making.rename(present)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return present


def _mirrors() -> Iterator[str]:
    """Yield where this machine gets Debian's packages from, nothing on a machine of another kind."""
    if not shutil.which("apt-get"):
        return
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    ran = subprocess.run(
        [*asked, "Created-By: Packages", "Origin: Debian", f"Codename: {RELEASE}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    yield from ran.stdout.splitlines()[:1]


def _configure(root: Path) -> None:
    """Give a root this machine's ways to package registries, and the certificates it trusts."""
    for name in {*CONFIGURATION, *filter(None, map(os.environ.get, CERTIFICATES))}:
        if Path(name).is_file():
            target = root / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, target)
    if shutil.which("apt-config"):
        dumped = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True)
        (root / "etc/apt/apt.conf.d/90machine").write_text(dumped.stdout)
