"""What a call leaves to be done once the caller has its answer, by a process that holds nothing of the caller's."""

from __future__ import annotations

import os

from cni_hostport import netlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn

FIRST_OTHER = 3  # file descriptor after the standard streams
MOST_DESCRIPTORS = 1 << 20


def fork(works: Iterable[Callable[[], None]]) -> None:
    """Have the works done by a child, so that this process can end; where there cannot be one, do them here."""
    try:
        if os.fork():
            return
    except OSError:
        for work in works:
            work()
        return
    run(works)


def run(works: Iterable[Callable[[], None]]) -> NoReturn:
    """Do the works in this process, detached from whoever started it, and end."""
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(FIRST_OTHER):
            os.dup2(null, stream)
        netlink.close_all()  # nobody is to use a descriptor that is closed now
        os.closerange(FIRST_OTHER, MOST_DESCRIPTORS)
        for work in works:
            work()
        status = 0
    finally:
        os._exit(status)
