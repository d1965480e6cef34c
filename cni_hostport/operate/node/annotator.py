"""The annotator: it writes into an annotation of each pod of its node which dynamic host ports the pod has.

What is to be written is in the ruleset; what was written is remembered, so that it is not written all the time. All is
written again every few minutes, since somebody may have changed it: the annotator may write and not read. It keeps
nothing else, so that its end and its start change nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import select
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from cni_hostport.dynamic_ports import assignment, keys
from cni_hostport.dynamic_ports.request import status
from cni_hostport.errors import NFTError
from cni_hostport.kernel.table_events import DynamicPortEvents
from cni_hostport.lookup import Lookup
from cni_hostport.operate.node.api_server import UnreachableError
from cni_hostport.operate.node.pod_names import PodNames

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address, IPv6Address
    from pathlib import Path

    from cni_hostport.dynamic_ports.assignment import Assigned
    from cni_hostport.log import Log
    from cni_hostport.operate.node.api_server import Answer, APIServer

# seconds
REPEAT = 1200.0  # between two times that all is written
READ_INTERVAL = 0.2  # between two looks at the ruleset
FIRST_PAUSE = 1.0  # after a failure; each further one is up to twice as long
LONGEST_PAUSE = {"server": 30.0, "pod": 300.0}
STALLED = 120.0  # after which this process is taken for dead, and ends
LONGEST_WAIT = 60.0
MOST_TOLD = 1000  # lines that are remembered
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, INVALID, TOO_MANY, UNAVAILABLE = 401, 403, 404, 422, 429, 503
VERSIONS = {"0.0.0.0": 4, "[::]": 6}  # by the address that a pod asks for  # noqa: S104 - nothing is bound to it
FORBIDDEN_LINE = "annotations may not be written: this takes the ClusterRole hostport-annotator and its binding"


@dataclass
class _Pause:
    """When what failed is tried again, and for which annotation."""

    text: str = ""
    until: float = 0.0
    seconds: float = 0.0

    def begin(self, longest: float, shortest: float = 0.0) -> None:
        """Wait for longer than the last time; not all nodes of a cluster for as long."""
        self.seconds = min(max(FIRST_PAUSE, 2 * self.seconds), longest)
        pause = self.seconds * random.uniform(0.5, 1)  # noqa: S311 - no secret
        self.until = time.monotonic() + max(pause, min(shortest, longest))


class Annotator:
    """The annotator of one node."""

    def __init__(
        self, server: APIServer, host_ips: Sequence[IPv4Address | IPv6Address], caches: Sequence[Path], log: Log
    ) -> None:
        """Prepare it; ``caches`` are runtimes' directories.

        The first of ``host_ips`` is told where a pod asks for no address, and the first of an IP version where it asks
        for all of that version. Raises ``NFTError``.
        """
        self._server, self._host_ips, self._log = server, host_ips, log
        self._lookup = Lookup(shared=True)
        self._names = PodNames(self._lookup, caches, log)
        self._wanted: dict[str, str] = {}  # annotations by the pods' UIDs: those of the ruleset
        self._written: dict[str, str] = {}
        self._again: set[str] = set()  # those that are to be written although they were
        self._pauses: dict[str, _Pause] = {}
        self._server_pause = _Pause()
        self._told: set[str] = set()

    def run(self) -> None:
        """Work until SIGTERM; raises ``NFTError`` and ``OSError`` where that is not possible."""
        wakes, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)  # else a wait goes on, if the signal came just before it, or to another thread
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # an exception would be lost within a finalizer
        repeat_at, read_at, is_stale = 0.0, 0.0, True
        with DynamicPortEvents() as events:
            while True:
                faulthandler.dump_traceback_later(STALLED, exit=True)
                now = time.monotonic()
                if now >= repeat_at:
                    self._repeat()
                    repeat_at, is_stale = now + REPEAT * random.uniform(0.8, 1.2), True  # noqa: S311 - no secret
                if is_stale and now >= read_at:
                    read_at, is_stale = now + READ_INTERVAL, not self._read()
                pod_id = self._next(now)
                if pod_id:
                    self._write(pod_id)
                else:
                    self._server.close()
                due = min([repeat_at, *([read_at] if is_stale else []), *self._due()]) - time.monotonic()
                if select.select([events.fileno(), wakes], [], [], min(max(due, 0.0), LONGEST_WAIT))[0]:
                    is_stale = events.have_come() or is_stale

    def _repeat(self) -> None:
        """Have all written again, and forget those who are gone."""
        self._again = {*self._wanted}
        self._written = {pod_id: text for pod_id, text in self._written.items() if pod_id in self._wanted}
        self._pauses = {pod_id: pause for pod_id, pause in self._pauses.items() if pod_id in self._wanted}
        self._names.keep(self._wanted)
        if len(self._told) > MOST_TOLD:
            self._told.clear()

    def _read(self) -> bool:
        """See what the ruleset has now, and tell whether that is all there is to see."""
        try:
            assigned = assignment.all_assigned(self._lookup)
            is_complete = self._names.find(assigned)
        except NFTError as error:
            self._tell(f"it cannot be read which pods have dynamic host ports: {error}")
            return False
        self._wanted = {pod_id: self._text(ports) for pod_id, ports in assigned.items()}
        return is_complete

    def _text(self, ports: Assigned) -> str:
        """Return the annotation for the host ports of a pod."""
        told = status(ports)
        for asked, answer in told.items():
            version = VERSIONS.get(asked.rpartition(":")[0])
            address = next((str(host_ip) for host_ip in self._host_ips if version in {None, host_ip.version}), "")
            if address:
                answer.setdefault("hostIP", address)
        return json.dumps(told)

    def _pending(self) -> dict[str, _Pause]:
        """Return the pods whose annotation is to be written, with what they wait for."""
        wanted = {pod_id: text for pod_id, text in self._wanted.items() if pod_id in self._names}
        return {
            pod_id: pause if (pause := self._pauses.get(pod_id)) and pause.text == text else _Pause(text)
            for pod_id, text in wanted.items()
            if self._written.get(pod_id) != text or pod_id in self._again
        }

    def _due(self) -> list[float]:
        """Return when there is something to write."""
        return [max(pause.until, self._server_pause.until) for pause in self._pending().values()]

    def _next(self, now: float) -> str:
        """Return the pod that is next, empty if there is none: first those that have not failed."""
        if now < self._server_pause.until:
            return ""
        pending = self._pending()
        due = (pod_id for pod_id, pause in pending.items() if pause.until <= now)
        return min(due, key=lambda pod_id: pending[pod_id].seconds, default="")

    def _write(self, pod_id: str) -> None:
        """Write the annotation of one pod, or see to it that this is tried again."""
        name, text = self._names[pod_id], self._wanted[pod_id]
        path = "/api/v1/namespaces/{}/pods/{}/status".format(*(quote(part, safe="") for part in name.split("/", 1)))
        # the pod is this one, and no later one of its name
        metadata = {"uid": pod_id, "annotations": {keys.STATUS: text}}
        try:
            answer = self._server.merge(f"{path}?fieldManager=hostport", {"metadata": metadata})
        except UnreachableError as error:
            self._server_pause.begin(LONGEST_PAUSE["server"])
            self._tell(f"the API server cannot be reached, and is tried again: {error}")
            return
        except OSError as error:
            self._fail(pod_id, f"the API server does not answer about pod {name}, and is asked again: {error}")
            return
        if answer.status in {UNAUTHORIZED, TOO_MANY, UNAVAILABLE}:
            self._server_pause.begin(LONGEST_PAUSE["server"], answer.retry_after)
            line = f"the API server answers nothing now, and is asked again: {answer.message}"
            self._fail(pod_id, line, longest="server")  # if it is about this pod alone, others come first
            return
        if self._server_pause.seconds:
            self._log("the API server answers again")
            self._told.clear()
        self._server_pause = _Pause()
        self._take(pod_id, answer)

    def _take(self, pod_id: str, answer: Answer) -> None:
        """Draw the conclusion from an answer about a pod."""
        name, text = self._names[pod_id], self._wanted[pod_id]
        if answer.status == FORBIDDEN:
            self._fail(pod_id, FORBIDDEN_LINE, f": {answer.message}")
            return
        if answer.status == INVALID and "metadata.uid" in answer.wrong_fields:
            self._tell(f"pod {name} is not the one with the UID {pod_id}, and is left alone")
        elif answer.status // 100 == 2:  # noqa: PLR2004 - success
            if self._written.get(pod_id) != text:
                self._log(f"pod {name} has {text}")
        elif answer.status != NOT_FOUND:  # such a pod is about to end on this node as well
            self._fail(pod_id, f"the annotation of pod {name} was not taken, and is sent again: {answer.message}")
            return
        self._written[pod_id] = text
        self._again.discard(pod_id)
        self._pauses.pop(pod_id, None)

    def _fail(self, pod_id: str, line: str, rest: str = "", longest: str = "pod") -> None:
        """Try again after a pause."""
        pause = self._pending()[pod_id]
        pause.begin(LONGEST_PAUSE[longest])
        self._pauses[pod_id] = pause
        self._tell(line, rest)

    def _tell(self, line: str, rest: str = "") -> None:
        """Write a line once, whatever its rest is."""
        if line not in self._told:
            self._log(f"{line}{rest}")
        self._told.add(line)
