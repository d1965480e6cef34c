"""The agent's child processes: the resident process, and ``hostport restore`` where that has something to do."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.log import Log

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
PAUSES = (1.0, 5.0, 30.0)  # seconds before a start after the first, second and any later end
STEADY = 60.0  # seconds; one that ran for longer has a fresh count of ends
LAST_CALLS = 10.0  # seconds for the calls that the resident process has taken
POLL = 0.05  # seconds


def adopt_orphans() -> None:
    """Become the parent of those whose parent ends: the children of the resident process, which run calls."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _children() -> set[int]:
    """Return the process IDs of this process's children, adopted ones included."""
    process = os.getpid()
    return {int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()}


class Resident:
    """The resident process, started again when it ends."""

    def __init__(self, executable: Path, log: Log) -> None:
        """Start nothing yet."""
        self._command = [str(executable), "serve"]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._ends, self._started, self._next = 0, 0.0, 0.0

    def keep(self) -> float:
        """Start it if it does not run and the pause is over; return in how many seconds to look again."""
        now = time.monotonic()
        if self._process and self._process.poll() is not None:
            if now > self._started + STEADY:
                self._ends = 0
            pause = PAUSES[min(self._ends, len(PAUSES) - 1)]
            self._log(
                f"the resident process ended with status {self._process.returncode}; calls run without it."
                f" It is started again in {pause:g} s"
            )
            self._ends, self._next, self._process = self._ends + 1, now + pause, None
        if not self._process and now >= self._next:
            self._process, self._started = subprocess.Popen(self._command), now  # noqa: S603 - this plugin itself
        return max(self._next - now, 1.0)

    def stop(self) -> None:
        """End it, and wait until the calls that it has taken are done, but not for ever."""
        if self._process and self._process.poll() is None:
            others = _children()
            self._process.terminate()
            self._process.wait()
            deadline = time.monotonic() + LAST_CALLS
            while (calls := _children() - others) and time.monotonic() < deadline:
                for process in calls:
                    os.waitpid(process, os.WNOHANG)
                time.sleep(POLL)


class Restorer:
    """Runs ``hostport restore``, one at a time; what is wanted meanwhile is done afterwards."""

    def __init__(self, executable: Path, arguments: Sequence[str]) -> None:
        """Run nothing yet; ``arguments`` are those of the command."""
        self._command = [str(executable), "restore", *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._is_wanted = False

    def want(self) -> None:
        """Ask for a restoration of what is there from now on."""
        self._is_wanted = True

    def work(self) -> None:
        """Start it if it is wanted and does not run."""
        if self._is_wanted and (self._process is None or self._process.poll() is not None):
            self._is_wanted = False
            self._process = subprocess.Popen(self._command)  # noqa: S603 - this plugin itself

    def stop(self) -> None:
        """End it: what it has not restored is left to the next one."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
