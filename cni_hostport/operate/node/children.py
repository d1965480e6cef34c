"""The agent's child processes: the resident process, restorations, and calls to the plugin."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cni_hostport.log import Log

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
PAUSES = (1.0, 5.0, 30.0)  # seconds before a start after the first, second and any later end
STEADY = 60.0  # seconds; one that ran for longer has a fresh count of ends
LAST_CALLS = 10.0  # seconds for the calls that the resident process has taken
WATCH = 60  # seconds in which a restoration looks for pods that were in the middle of their end
POLL = 0.05  # seconds

# the process IDs of those that somebody here waits for, and what keeps a new one from being missed
_waited, _lock = set[int](), Lock()


def adopt_orphans() -> None:
    """Become the parent of those whose parent ends: the children of the resident process, which run calls."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bury_orphans() -> None:
    """Remove what is left of adopted processes that have ended."""
    with _lock:
        for process in _all() - _waited:
            with suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)


def call(command: Sequence[str], environment: Mapping[str, str], data: bytes, timeout: float) -> tuple[int, bytes]:
    """Run a command with this input; return its status and output. Raises ``OSError``, and ``TimeoutExpired``."""
    process = _start(command, environment, subprocess.PIPE)
    try:
        output, _ = process.communicate(data, timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        _waited.discard(process.pid)
    return process.returncode, output


def _start(
    command: Sequence[str], environment: Mapping[str, str] | None = None, streams: int | None = None
) -> subprocess.Popen[bytes]:
    with _lock:
        process = subprocess.Popen(  # noqa: S603 - this plugin itself
            command, env=environment, stdin=streams, stdout=streams, stderr=streams
        )
        _waited.add(process.pid)
    return process


def _all() -> set[int]:
    """Return the process IDs of this process's children, adopted ones included."""
    found = set[int]()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            found.update(map(int, (thread / "children").read_text().split()))
    return found


class _Child:
    """A process that is started again when it ends, after a pause."""

    name = ""

    def __init__(self, command: Sequence[str], log: Log) -> None:
        """Start nothing yet."""
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._ends, self._started, self._next, self._told = 0, 0.0, 0.0, ""

    def _begin(self, now: float) -> None:
        """Start it, if the pause is over."""
        if now < self._next:
            return
        self._started = now
        try:
            self._process = _start(self._command)
        except OSError as error:
            self._pause(now, f"cannot be started: {error}")

    def _ended(self) -> int | None:
        """Return the status of one that has ended."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        _waited.discard(self._process.pid)
        self._process = None
        return status

    def _pause(self, now: float, reason: str) -> None:
        """Wait before it is started again, and say so once."""
        self._next = now + PAUSES[min(self._ends, len(PAUSES) - 1)]
        self._ends += 1
        if reason != self._told:
            self._log(f"the {self.name} {reason}; it is started again")
        self._told = reason

    def _end(self, number: signal.Signals) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait()


class Resident(_Child):
    """The resident process."""

    name = "resident process"

    def __init__(self, executable: Path, log: Log) -> None:
        """Start nothing yet."""
        super().__init__([str(executable), "serve"], log)

    def work(self) -> None:
        """Start it if it does not run and the pause is over."""
        now = time.monotonic()
        if (status := self._ended()) is not None:
            if now > self._started + STEADY:
                self._ends, self._told = 0, ""
            self._pause(now, f"ended with status {status}, and calls run without it")
        if not self._process:
            self._begin(now)

    def stop(self) -> None:
        """End it, and wait until the calls that it has taken are done, but not for ever."""
        others = _all()
        self._end(signal.SIGTERM)
        deadline = time.monotonic() + LAST_CALLS
        while _all() - others and time.monotonic() < deadline:
            bury_orphans()
            time.sleep(POLL)


class Restorer(_Child):
    """``hostport restore``, where host ports may have been lost: again where it fails, but not for ever."""

    name = "restoration"

    def __init__(self, executable: Path, caches: Iterable[Path], log: Log) -> None:
        """Start nothing yet; ``caches`` are runtimes' directories."""
        places = (argument for path in caches for argument in ("--cache-dir", str(path)))
        super().__init__([str(executable), "restore", f"--watch={WATCH}", *places], log)
        self._is_wanted = self._is_interrupted = False

    def want(self) -> None:
        """Ask for a restoration of what is there from now on."""
        self._is_wanted, self._ends, self._next, self._told = True, 0, 0.0, ""

    def work(self) -> None:
        """Start it if it is wanted; one that runs already, and may be watching only, ends first."""
        now = time.monotonic()
        if self._ended() and not self._is_interrupted and self._ends < len(PAUSES):
            self._is_wanted = True
            self._pause(now, "did not restore all")
        if not self._is_wanted:
            return
        if self._process:
            if not self._is_interrupted:
                self._process.send_signal(signal.SIGINT)
            self._is_interrupted = True
        else:
            self._begin(now)
            self._is_wanted, self._is_interrupted = self._process is None, False

    def stop(self) -> None:
        """End it: what it has not restored is left to the next one."""
        self._end(signal.SIGINT)
