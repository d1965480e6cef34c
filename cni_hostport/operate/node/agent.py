"""The agent: the process that a DaemonSet has on each node, and without which every call works as well.

It keeps this plugin's network configuration in step with the primary plugin's, runs the resident process, has host
ports brought back when somebody deleted the table, makes files that pods read again where they are lost, and answers
Prometheus and the kubelet. It is the node's own installation, in the node's mount namespace: so the resident process is
the one that the executable looks for, and sees what it sees.
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
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from cni_hostport import __version__
from cni_hostport.dynamic_ports import pod_files
from cni_hostport.errors import NFTError
from cni_hostport.kernel.table_events import TableEvents
from cni_hostport.libcni.conflist import PLUGIN
from cni_hostport.lookup import Lookup
from cni_hostport.operate import metrics
from cni_hostport.operate.arguments import sentence
from cni_hostport.operate.node import children, endpoint, installation, installations
from cni_hostport.operate.node.bundle import EXECUTABLE
from cni_hostport.operate.node.configuration_keeper import Keeper

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cni_hostport.log import Log

TIDY_AFTER, TIDY_INTERVAL = 90.0, 3600.0  # seconds; the first is more than the version before may still be needed for
INTERVAL = 1.0  # seconds between looks at the children
LISTEN_INTERVAL = 10.0  # seconds between attempts
POD_FILES_INTERVAL = 5.0  # seconds between looks at what pods are told
ENDING = (signal.SIGTERM, signal.SIGINT)
STALLED = 60.0  # seconds after which a loop that turns each second is taken for dead
STATUS_TIMEOUT = 10.0  # seconds
STATUS_AGE = 5.0  # seconds for which an answer is as good as a new one
STATUS_INPUT = json.dumps({"cniVersion": "1.1.0", "name": "status", "type": PLUGIN}).encode()


@dataclass(frozen=True)
class Node:
    """Where things are on a node.

    Those are its directories of executables, installations and network configurations, libcni's caches, a file with
    options for the network configuration, and the address and port for scrapes and probes.
    """

    bin_dir: Path
    lib_dir: Path
    conf_dir: Path
    caches: Sequence[Path]
    options: Path | None
    listen: tuple[str, int] | None


class Agent:
    """The agent of one node."""

    def __init__(self, node: Node, log: Log) -> None:
        """Prepare it; raises ``OSError``."""
        self._executable = installations.executable(node.bin_dir)
        self._lib_dir = node.lib_dir
        self._log = log
        self._listen = node.listen
        self._keeper = Keeper(node.conf_dir, node.options, log, self._obstacle)
        self._resident = children.Resident(self._executable, log)
        self._restorer = children.Restorer(self._executable, node.caches, log)
        self._events = TableEvents()
        self._status, self._asked, self._asking = "", float("-inf"), Lock()
        self._told: set[str] = set()
        self._turned = time.monotonic()
        self._tidy_at, self._listen_at = self._turned + TIDY_AFTER, 0.0
        self._pod_files_at = self._turned + POD_FILES_INTERVAL  # a restoration has made them before
        self._is_ending = False

    def run(self) -> None:
        """Work until SIGTERM or SIGINT; raises ``OSError`` where nobody can work."""
        children.adopt_orphans()
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
                selector.select(timeout=min(INTERVAL, self._keeper.due()))
        self._restorer.stop()
        self._resident.stop()
        self._log("ended; host ports stay, and calls run without it")

    def _end(self, *_: object) -> None:
        self._is_ending = True

    def _turn(self) -> None:
        self._turned = time.monotonic()
        if self._events.is_deleted():
            self._log("the table inet hostport was deleted: host ports are brought back")
            self._restorer.want()
        self._keep_executable()
        if self._keeper.wait(0):
            self._keeper.update()
        self._resident.work()
        self._restorer.work()
        children.bury_orphans()
        if self._listen and self._turned > self._listen_at:
            self._begin_to_listen(*self._listen)
        if self._turned > self._pod_files_at:
            self._keep_pod_files()
        if self._turned > self._tidy_at:
            self._tidy()

    def _tell(self, line: str) -> None:
        """Write a line once."""
        if line not in self._told:
            self._log(line)
        self._told.add(line)

    def _begin_to_listen(self, address: str, port: int) -> None:
        checks = {"/healthz": self._why_unhealthy, "/readyz": self._why_unready}
        try:
            endpoint.start(address, port, metrics.make_registry(), checks)
        except OSError as error:
            self._tell(f"{sentence(error)}; all else goes on")
            self._listen_at = self._turned + LISTEN_INTERVAL
        else:
            self._listen = None
            self._log(f"listening on {address} port {port}")

    def _keep_executable(self) -> None:
        """Put the link back that somebody removed, and with it perhaps its directory."""
        own = self._lib_dir / os.path.basename(sys.prefix)
        if os.path.lexists(self._executable) or os.path.realpath(own) != os.path.realpath(sys.prefix):
            return
        try:
            installations.switch(self._executable.parent, own)
            self._log(f"{self._executable} was gone, and leads to {own / EXECUTABLE} again")
        except OSError as error:
            self._tell(f"{self._executable} is gone, and cannot be put back: {sentence(error)}")

    def _keep_pod_files(self) -> None:
        """Make the files again that tell pods their dynamic host ports, where they are lost or wrong."""
        self._pod_files_at = self._turned + POD_FILES_INTERVAL
        try:
            pod_files.keep_all(Lookup(), self._tell)
        except NFTError as error:
            self._tell(f"whether pods are told their dynamic host ports cannot be looked at: {error}")

    def _obstacle(self, types: Sequence[str]) -> str:
        """Say why runtimes would not get on with this plugin on this node."""
        bin_dir = self._executable.parent
        if not any((bin_dir / name).exists() for name in types):
            return f"{bin_dir} has none of the plugins {', '.join(types)}: runtimes look for plugins elsewhere"
        return self._why_unavailable()

    def _tidy(self) -> None:
        """Remove versions that are out of use since the last installation."""
        self._tidy_at = self._turned + TIDY_INTERVAL
        try:
            installation.tidy(self._executable.parent, self._lib_dir, self._log)
        except BlockingIOError:  # an installation is under way
            self._tidy_at = self._turned + TIDY_AFTER
        except OSError as error:
            self._log(f"versions out of use stay: {sentence(error)}")

    def _why_unhealthy(self) -> str:
        silent = time.monotonic() - self._turned
        return f"the agent has done nothing for {silent:.0f} s" if silent > STALLED else ""

    def _why_unready(self) -> str:
        """Say why this node's next pod may not get its host ports."""
        own = os.path.join(os.path.realpath(sys.prefix), EXECUTABLE)
        found = os.path.realpath(self._executable)
        if found != own:
            return f"{self._executable} leads to {found}, and not to this version, {own}"
        unavailable = self._why_unavailable()
        state = self._keeper.state
        return unavailable if unavailable or state.is_ready else state.sentence

    def _why_unavailable(self) -> str:
        """Ask the executable, as a runtime does; of many who ask at once, one does."""
        with self._asking:
            if time.monotonic() > self._asked + STATUS_AGE:
                self._status = self._ask_status()
                self._asked = time.monotonic()
            return self._status

    def _ask_status(self) -> str:
        environment = {"CNI_COMMAND": "STATUS", "CNI_PATH": os.path.dirname(self._executable)}
        try:
            status, output = children.call([str(self._executable)], environment, STATUS_INPUT, STATUS_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{self._executable} cannot be asked for its status: {error}"
        if not status:
            return ""
        return output.decode(errors="replace").strip() or f"{self._executable} ended with status {status}"
