"""The part of a node that is not its network: processes and mounts of its own, which end together.

A runtime and a kubelet write to places that no option names: libcni's cache, runc's state, network namespaces, pod
logs, sysctls. Here they find file systems in memory there, and a kernel whose tunables are files.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from lab import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lab import Node

CGROUPS = Path("/sys/fs/cgroup")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# The first process reads its own ID in the machine's count, before it mounts its own /proc. When standard input ends,
# with this process at the latest, it ends, and the kernel ends all others with it.
BEGIN = """
set -e
read -r pid rest </proc/self/stat
"""
MEMORY = """
mount -t proc proc /proc
for place in /run /var/lib /var/log; do mount -t tmpfs tmpfs $place; done
"""
END = """
mkdir /run/tunables
for tunable in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    copy=/run/tunables/${tunable##*/}
    cat /proc/sys/$tunable >$copy
    mount --bind $copy /proc/sys/$tunable
done
echo "$pid"
cat
exit
"""
# the ID of a program in the node's count, for a signal to reach it and not only the nsenter around it
STARTED = 'echo $$ >"/run/$0.pid"; exec "$@"'


def wait_for(condition: Callable[[], object], log: Path, seconds: float = 180) -> None:
    """Wait until a condition holds; if it does not come to that, fail with the end of a log."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(log.read_text()[-4000:])
        time.sleep(0.05)


class Processes:
    """Processes beside a network namespace, with mounts and IDs of their own; everything of them ends with ``remove``.

    ``mounts`` is the script that makes their file systems, and gets ``arguments``.
    """

    def __init__(self, node: Namespace, mounts: str = MEMORY, *arguments: str | Path) -> None:
        self.cgroup = f"/{node.name}"
        self._path = node.path
        self._programs: list[subprocess.Popen[bytes]] = []
        namespaces = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork"]
        self._init = subprocess.Popen(
            ["nsenter", f"--net={node.path}", *namespaces, "sh", "-c", BEGIN + mounts + END, "sh", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self._init.stdout is None or self._init.stdin is None:
            raise AssertionError
        self.pid = int(self._init.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _inside(self, *command: str | Path) -> list[str | Path]:
        # not ip netns exec, which mounts a new /sys without the control groups
        namespaces = ["--mount", "--pid", "--uts", "--ipc", f"--net={self._path}"]
        return ["nsenter", f"--target={self.pid}", *namespaces, *command]

    def run(
        self, *command: str | Path, check: bool = True, stdin: IO[bytes] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command among them."""
        return subprocess.run(self._inside(*command), check=check, capture_output=True, text=True, stdin=stdin)

    def start(self, name: str, *command: str | Path, log: Path, environment: Mapping[str, str]) -> Program:
        """Start a program that stays."""
        with log.open("a") as output:
            process = subprocess.Popen(
                self._inside("sh", "-c", STARTED, name, *command),
                env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        self._programs.append(process)
        return Program(self, name, process)

    def remove(self) -> None:
        """End all processes, and with them all mounts."""
        self._init.communicate(timeout=30)
        for program in self._programs:
            program.wait(timeout=30)
        for group in (*CGROUPS.glob(self.cgroup[1:]), *CGROUPS.glob(f"*{self.cgroup}")):
            for directory in sorted(group.glob("**/"), reverse=True):
                _remove_group(directory)


class Host(Processes):
    """What is on a node besides its network."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.node = node

    def sandbox(self, netns: str) -> Inside:
        """Open a network namespace of the host by the path under which the runtime mounted it."""
        return Inside(f"/proc/{self.pid}/root/run/netns/{Path(netns).name}")  # /var/run is a link to the machine's /run


def _remove_group(directory: Path) -> None:
    for _ in range(100):
        try:
            return directory.rmdir()
        except OSError:  # its last process is not quite gone
            time.sleep(0.05)
    return directory.rmdir()


class Program:
    """A process of the host."""

    def __init__(self, host: Processes, name: str, process: subprocess.Popen[bytes]) -> None:
        self._host = host
        self._name = name
        self._process = process

    def kill(self) -> None:
        """Kill it as the kernel does when memory is short; its children live on."""
        self._host.run("sh", "-c", f"kill -KILL $(cat /run/{self._name}.pid)")
        self._process.wait(timeout=30)


class Inside(Namespace):
    """A network namespace that somebody else made and will remove."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = Path(path).name
        self._closing = contextlib.ExitStack()

    def remove(self) -> None:
        """Stop its servers."""
        self._closing.close()
