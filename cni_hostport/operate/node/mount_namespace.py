"""From a container into the mount namespace of the node, where the files are those that container runtimes see.

The container has to have the node's process IDs (``hostPID``), and CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE.
"""

from __future__ import annotations

import ctypes
import os
from errno import EINVAL
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import NoReturn

FIRST_PROCESS = "/proc/1/ns/mnt"
CLONE_NEWNS = 0x20000  # linux/sched.h
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
KEPT = "HOSTPORT_"  # beginning of the environment variables that are this plugin's


def continue_on_node(executable: Path, arguments: Sequence[str], options: Path | None) -> NoReturn:
    """Become the node's executable, with these arguments.

    The file of the options is one of the container. Its directory stays open, and ``--options`` is given once more, as
    a path that begins there. Raises ``OSError`` that names what failed.
    """
    given = list(arguments)
    if options:
        directory = os.open(options.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.set_inheritable(directory, True)  # noqa: FBT003 - the function has no name for it
        given += ["--options", f"/proc/self/fd/{directory}/{options.name}"]
    _enter()
    environment = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    os.execve(executable, [str(executable), *given], {"PATH": PATH, **environment})  # noqa: S606 - this plugin itself


def _enter() -> None:
    namespace = os.open(FIRST_PROCESS, os.O_RDONLY | os.O_CLOEXEC)
    if os.stat(namespace).st_ino == os.stat("/proc/self/ns/mnt").st_ino:
        msg = "it is this process's own: the container needs the node's process IDs (hostPID)"
        raise OSError(EINVAL, msg, FIRST_PROCESS)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNS):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter the node's mount namespace: {os.strerror(number)}", FIRST_PROCESS)
