"""Work that a call leaves for later: a process that holds nothing of the caller's does it after the answer."""

from __future__ import annotations

import os

from cni_hostport import netlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn

FIRST_OTHER = 3  # file descriptor after the standard streams
MAX_DESCRIPTORS = 1 << 20


def fork(tasks: Iterable[Callable[[], None]]) -> None:
    """Have a child do the tasks, so that this process can end; where there can be no child, do them here."""
    try:
        if os.fork():
            return
    except OSError:
        for task in tasks:
            task()
        return
    run(tasks)


def run(tasks: Iterable[Callable[[], None]]) -> NoReturn:
    """Do the tasks in this process, detached from the process that started it, and end."""
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(FIRST_OTHER):
            os.dup2(null, stream)
        netlink.close_all()  # nobody is to use a descriptor that is closed now
        os.closerange(FIRST_OTHER, MAX_DESCRIPTORS)
        for task in tasks:
            task()
        status = 0
    finally:
        os._exit(status)
