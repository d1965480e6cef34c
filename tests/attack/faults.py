"""System calls that fail: which can, with what, and how strace makes one of a program fail."""

from __future__ import annotations

import re
import signal
import subprocess
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from attack.answer import Answer
from attack.effort import chance

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lab import Namespace

BEGINNING = "the call begins"  # asked for by an executable when it is itself, after the start of Python
NATIVE_BEGINNING = "socket(AF_UNIX, SOCK_SEQPACKET"  # the first call of a native executable that can fail
PATIENCE = 100  # seconds
# what a machine does that is short of memory, descriptors or permissions, or has a broken disk; brk(2) has no errors of
# this kind, and libc does without it
ERRORS = {
    "accept4": ["EMFILE", "ENOMEM"],
    "bind": ["ENOMEM", "EACCES"],
    "chroot": ["EACCES", "EPERM"],
    "clone": ["EAGAIN", "ENOMEM"],
    "close": ["EIO"],
    "connect": ["EACCES", "ENOMEM", "EAGAIN"],
    "dup": ["EMFILE"],
    "dup2": ["EBUSY"],
    "epoll_create1": ["EMFILE", "ENOMEM"],
    "epoll_ctl": ["ENOMEM"],
    "execve": ["ENOMEM", "EACCES"],
    "fchdir": ["EACCES"],
    "fcntl": ["ENOMEM"],
    "fork": ["EAGAIN", "ENOMEM"],
    "ftruncate": ["EIO"],
    "getdents64": ["EIO"],
    "getsockname": ["ENOBUFS"],
    "getsockopt": ["ENOMEM"],
    "ioctl": ["EIO", "ENOMEM"],
    "lseek": ["EIO"],
    "memfd_create": ["EMFILE", "ENOMEM"],
    "mmap": ["ENOMEM"],
    "mprotect": ["ENOMEM"],
    "newfstatat": ["ENOMEM", "EACCES", "EIO"],
    "openat": ["EMFILE", "ENFILE", "ENOMEM", "EACCES", "EIO"],
    "pidfd_open": ["EMFILE", "ENOMEM"],
    "pidfd_send_signal": ["EPERM"],
    "pipe2": ["EMFILE", "ENFILE"],
    "poll": ["ENOMEM", "EINTR"],
    "pselect6": ["ENOMEM", "EINTR"],
    "read": ["EIO", "ENOMEM", "EINTR"],
    "readlink": ["EIO", "ENOMEM"],
    "recvfrom": ["ENOBUFS", "ENOMEM", "EINTR"],
    "recvmsg": ["ENOBUFS", "ENOMEM", "EINTR"],
    "sendmsg": ["ENOBUFS", "ENOMEM", "EINTR", "EACCES"],
    "sendto": ["ENOBUFS", "ENOMEM", "EINTR", "EACCES"],
    "setns": ["ENOMEM", "EPERM"],
    "setsockopt": ["ENOMEM", "EPERM"],
    "shutdown": ["ENOMEM"],
    "socket": ["EMFILE", "ENFILE", "ENOMEM", "EACCES"],
    "socketpair": ["EMFILE", "ENOMEM"],
    "statx": ["ENOMEM", "EACCES", "EIO"],
    "unshare": ["ENOSPC", "ENOMEM"],
    "vfork": ["EAGAIN", "ENOMEM"],
    "write": ["ENOSPC", "EIO", "EINTR"],
}


class Fault(NamedTuple):
    """The Nth system call of a name fails."""

    call: str
    error: str
    number: int

    def __str__(self) -> str:
        return f"{self.call}:error={self.error}:when={self.number}"


@dataclass
class Trace:
    """What strace saw, and the lines of calls that it made fail.

    System calls are counted by their names: in the first process before its own beginning, and in the process that has
    most of them in all. strace counts in each process for itself.
    """

    before: Counter[str] = field(default_factory=Counter)
    all: Counter[str] = field(default_factory=Counter)
    injected: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, *, beginning: str = BEGINNING, has_begun: bool = False) -> Trace:
        """Read strace's file; of a native executable, until it becomes the Python executable."""
        trace, processes = cls(), dict[str, Counter[str]]()
        for line in path.read_text(errors="replace").splitlines():
            process, _, text = line.partition(" ")
            counted = processes.setdefault(process, Counter())
            if beginning in text and not has_begun:
                trace.before, has_begun = counted.copy(), True
            if "(INJECTED)" in text:
                trace.injected.append(text.strip() if has_begun else "")
            if name := re.match(r" *(\w+)\(", text):
                counted[name[1]] += 1
                if beginning == NATIVE_BEGINNING and has_begun and name[1] == "execve":
                    break
        for counted in processes.values():
            trace.all |= counted
        return trace

    def faults(self, name: str, number: int) -> list[Fault]:
        """Return some faults of the operation itself: of each system call one, then of each another, and so on."""
        random = chance(name)
        rounds: list[tuple[int, float, Fault]] = []
        for call in sorted(set(self.all) & set(ERRORS)):
            places = range(self.before[call] + 1, self.all[call] + 1)
            every = [Fault(call, error, place) for place in places for error in ERRORS[call]]
            random.shuffle(every)
            rounds += [(turn, random.random(), fault) for turn, fault in enumerate(every)]
        return [fault for _, _, fault in sorted(rounds)[:number]]


def options(trace: Path, fault: Fault | None = None) -> list[str]:
    """Return the command that watches a program with strace, and makes it fail."""
    watched = ",".join(f"?{call}" for call in ["access", *([fault.call] if fault else ERRORS)])
    injection = ["-e", f"inject={fault}"] if fault else []
    return ["strace", "-f", "-o", str(trace), "-e", f"trace={watched}", *injection]


@contextmanager
def watching(processes: Sequence[int], *strace: str) -> Iterator[None]:
    """Have strace watch processes that run already."""
    selected = [word for process in processes for word in ("-p", str(process))]
    with subprocess.Popen([*strace, *selected], stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stderr is not None
        for _ in processes:
            watcher.stderr.readline()  # that this one is attached
        try:
            yield
        finally:
            watcher.send_signal(signal.SIGINT)
            watcher.communicate(timeout=20)


def traced(
    node: Namespace, executable: Sequence[str], environ: Mapping[str, str], stdin: bytes, *strace: str
) -> Answer:
    """Run an executable on a node, with strace as ``options`` say."""
    command = ["nsenter", f"--net={node.path}", *strace, "--seccomp-bpf", "-qq", *executable]
    ran = subprocess.run(command, input=stdin, env=environ, capture_output=True, check=False, timeout=PATIENCE)
    return Answer(ran.returncode, ran.stdout, ran.stderr)
