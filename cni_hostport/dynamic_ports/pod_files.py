"""The file of each pod that has dynamic host ports: made from the ruleset alone, and read by the pod.

It is ``/run/hostport/pods/UID/dynamic-ports.json``, where a pod of Kubernetes mounts the directory of its UID; another
container's has its ID. A pod's first container finds it there, since ADD writes it. No port is decided by it: that a
pod has no directory here only spares ADD a look at the ports of all pods.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from stat import S_ISREG

from cni_hostport.dynamic_ports import assignment
from cni_hostport.errors import NFTError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cni_hostport.log import Log
    from cni_hostport.lookup import Lookup

TOP = "/run/hostport"
DIRECTORY, NAME = f"{TOP}/pods", "dynamic-ports.json"
ATTEMPTS = 10  # each but the last was overtaken by somebody else's change
MODE, MASK = 0o644, 0o022  # whatever user the pod's processes are, they may read and not write


def is_new(pod_id: str) -> bool:
    """Tell whether no ADD has written a pod's file: it has no directory where one could be made."""
    try:
        os.lstat(f"{DIRECTORY}/{pod_id}")
    except FileNotFoundError:
        return os.access(DIRECTORY, os.W_OK)  # not so for who is not root, or may not write below /run
    except OSError:
        return False
    return False


def write(pod_id: str, ports: Mapping[str, int], log: Log) -> None:
    """Make a pod's file say that it has these ports; ``keep`` has to come after that."""
    with _failures_told(pod_id, log):
        _write(pod_id, _text(ports))


def keep(lookup: Lookup, pod_ids: Iterable[str], log: Log, written: Mapping[str, int] | None = None) -> None:
    """Make the files of some pods say what the ruleset says now, and remove those of pods that have no ports.

    Where that fails, it is told: a pod has its ports all the same. ``written`` are the ports that files have already.
    """
    for pod_id in pod_ids:
        with _failures_told(pod_id, log):
            _keep(lookup, pod_id, written)


@contextmanager
def _failures_told(pod_id: str, log: Log) -> Iterator[None]:
    try:
        yield
    except (NFTError, OSError) as error:
        log(f"the file in {DIRECTORY}/{pod_id} does not tell its dynamic host ports: {error}")


def keep_all(lookup: Lookup, log: Log) -> None:
    """Write the files that are missing or wrong; raises ``NFTError``."""
    written: dict[str, Mapping[str, int]] = {}
    for _ in range(ATTEMPTS):
        present = assignment.all_assigned(lookup)
        # of pods that were deleted meanwhile, the files were removed before they were written
        keep(lookup, written.keys() - present.keys(), log)
        wrong = {
            pod_id: ports
            for pod_id, ports in present.items()
            if written.get(pod_id) != ports and not _is_kept(pod_id, _text(ports))
        }
        if not wrong:
            return
        for pod_id, ports in wrong.items():
            write(pod_id, ports, log)
        written |= wrong


def _keep(lookup: Lookup, pod_id: str, written: Mapping[str, int] | None) -> None:
    """Write or remove a file until it is as the ruleset is: others may do the same at the same time."""
    for _ in range(ATTEMPTS):
        ports = assignment.assigned(lookup, pod_id)
        if ports == written:
            return
        if ports:
            _write(pod_id, _text(ports))
        else:
            _remove(pod_id)
        written = ports


def _text(ports: Mapping[str, int]) -> bytes:
    import json  # a DEL that leaves a pod nothing needs neither

    from cni_hostport.dynamic_ports.request import status

    return f"{json.dumps(status(ports))}\n".encode()


def _is_kept(pod_id: str, text: bytes) -> bool:
    """Tell whether a file has this text; a pod that may write there can have put anything in its place."""
    try:
        place = os.open(f"{DIRECTORY}/{pod_id}/{NAME}", os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not S_ISREG(os.stat(place).st_mode):
                return False
            with open(f"/proc/self/fd/{place}", "rb") as file:
                return file.read(len(text) + 1) == text
        finally:
            os.close(place)
    except OSError:
        return False


def _write(pod_id: str, text: bytes) -> None:
    """Replace a file by one rename, so that no pod reads half of it."""
    directory = f"{DIRECTORY}/{pod_id}"
    temporary = f"{directory}/.{NAME}.{os.getpid()}"
    mask = os.umask(MASK)
    try:
        os.makedirs(directory, exist_ok=True)
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        with open(descriptor, "wb") as file:
            file.write(text)
        os.rename(temporary, f"{directory}/{NAME}")
    finally:
        os.umask(mask)


def _remove(pod_id: str) -> None:
    """Remove a file, and its directory if that holds nothing else."""
    with suppress(FileNotFoundError):
        os.unlink(f"{DIRECTORY}/{pod_id}/{NAME}")
    with suppress(OSError):
        os.rmdir(f"{DIRECTORY}/{pod_id}")
