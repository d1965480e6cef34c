"""The agent: the process that a DaemonSet has on each node, and without which every call works as well.

It keeps this plugin's network configuration in step with the primary plugin's, runs the resident process, has host
ports brought back when somebody deleted the table, and answers Prometheus and the kubelet. It is the node's own
installation, in the node's mount namespace: so the resident process is the one that the executable looks for, and
sees what it sees.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from cni_hostport import __version__
from cni_hostport.kernel.table_events import TableEvents
from cni_hostport.libcni.conflist import PLUGIN
from cni_hostport.operate import metrics
from cni_hostport.operate.node import endpoint, installation, installations
from cni_hostport.operate.node.children import Resident, Restorer, adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cni_hostport.log import Log
    from cni_hostport.operate.node.configuration_keeper import Keeper

TIDY_AFTER, TIDY_INTERVAL = 90.0, 3600.0  # seconds; the first is more than the version before may still be needed for
ENDING = (signal.SIGTERM, signal.SIGINT)
STALLED = 60.0  # seconds after which a loop that turns each second is taken for dead
STATUS_TIMEOUT = 20.0  # seconds
STATUS_INPUT = json.dumps({"cniVersion": "1.1.0", "name": "status", "type": PLUGIN}).encode()


class Agent:
    """The agent of one node."""

    def __init__(self, bin_dir: Path, lib_dir: Path, keeper: Keeper, caches: Sequence[Path], log: Log) -> None:
        """Prepare it: the directories are those of the executable, and of installations. Raises ``OSError``."""
        self._executable = executable = installations.executable(bin_dir)
        self._lib_dir = lib_dir
        self._keeper = keeper
        self._log = log
        self._resident = Resident(executable, log)
        self._restorer = Restorer(executable, [argument for path in caches for argument in ("--cache-dir", str(path))])
        self._events = TableEvents()
        self._turned = time.monotonic()
        self._tidy_at = self._turned + TIDY_AFTER
        self._is_ending = False

    def listen(self, address: str, port: int) -> None:
        """Answer scrapes and probes from now on; raises ``OSError`` naming the address where that cannot be."""
        endpoint.start(
            address, port, metrics.make_registry(), {"/healthz": self._why_unhealthy, "/readyz": self._why_unready}
        )
        self._log(f"listening on {address} port {port}")

    def run(self) -> None:
        """Work until SIGTERM or SIGINT; raises ``OSError`` where nobody can work."""
        adopt_orphans()
        self._log(f"version {__version__} is the agent of this node")
        self._restorer.want()
        with selectors.DefaultSelector() as selector:
            wakes, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(wake)
            for number in ENDING:
                signal.signal(number, self._end)
            for watched in (wakes, self._events, self._keeper):
                with suppress(ValueError):  # what has no descriptor is looked at now and then
                    selector.register(watched, selectors.EVENT_READ)
            while not self._is_ending:
                self._turn()
                selector.select(timeout=min(self._resident.keep(), self._keeper.due()))
        self._restorer.stop()
        self._resident.stop()
        self._log("ended; host ports stay, and calls run without it")

    def _turn(self) -> None:
        self._turned = time.monotonic()
        if self._events.is_deleted():
            self._log("the table inet hostport was deleted: host ports are brought back")
            self._restorer.want()
        if self._keeper.wait(0):
            self._keeper.update()
        self._restorer.work()
        if self._turned > self._tidy_at:
            self._tidy_at = self._turned + TIDY_INTERVAL
            self._tidy()

    def _tidy(self) -> None:
        """Remove versions that are out of use since the last installation."""
        try:
            installation.tidy(self._executable.parent, self._lib_dir, self._log)
        except OSError as error:
            self._log(f"{error.filename or self._lib_dir}: versions out of use stay: {error.strerror}")

    def _end(self, *_: object) -> None:
        self._is_ending = True

    def _why_unhealthy(self) -> str:
        silent = time.monotonic() - self._turned
        return f"the agent has done nothing for {silent:.0f} s" if silent > STALLED else ""

    def _why_unready(self) -> str:
        """Say why this node's next pod may not get its host ports."""
        own = os.path.join(os.path.realpath(sys.prefix), "bin", PLUGIN)
        found = os.path.realpath(self._executable)
        if found != own:
            return f"{self._executable} leads to {found}, and not to this version, {own}"
        state = self._keeper.state
        return self._why_unavailable() if state.is_ready else state.sentence

    def _why_unavailable(self) -> str:
        """Ask the executable, as a runtime does."""
        environment = {"CNI_COMMAND": "STATUS", "CNI_PATH": os.path.dirname(self._executable)}
        try:
            outcome = subprocess.run(  # noqa: S603 - this plugin itself
                [self._executable], input=STATUS_INPUT, env=environment, capture_output=True,
                timeout=STATUS_TIMEOUT, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{self._executable} cannot be asked for its status: {error}"
        return outcome.stdout.decode(errors="replace") if outcome.returncode else ""
