"""Network namespaces: opened, entered and told apart."""

from __future__ import annotations

import ctypes
import fcntl
import os
from _socket import AF_UNIX, SOCK_DGRAM, SOL_SOCKET, socket
from contextlib import contextmanager
from errno import ENOENT, ENOPROTOOPT, ENOTDIR, ENOTTY, EPERM
from functools import cache
from sys import byteorder

from cni_hostport.errors import CNIError, Code
from cni_hostport.netlink import SOCK_CLOEXEC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NS_GET_NSTYPE = 0xB703  # linux/nsfs.h: _IO(0xb7, 0x3)
CLONE_NEWNET = 0x40000000  # linux/sched.h
SO_NETNS_COOKIE = 71  # asm-generic/socket.h
GONE = {ENOENT, ENOTDIR, ENOTTY}  # what says that there is no namespace at a path


@contextmanager
def namespace(path: str, directory: int | None = None) -> Iterator[int]:
    """Open a network namespace; a relative path begins at an open ``directory``.

    Raises ``OSError``, with one of the numbers ``GONE`` if there is none at ``path``.
    """
    # O_NONBLOCK: whatever the path has become, a FIFO included, opening it does not wait
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    try:
        if fcntl.ioctl(descriptor, NS_GET_NSTYPE) != CLONE_NEWNET:
            raise OSError(ENOTTY, "not a network namespace", path)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def scratch_namespace() -> Iterator[None]:
    """Run the block in a network namespace of its own, which lasts as long as what was opened in it.

    Raises ``OSError`` if the kernel refuses one.
    """
    with _entered(_unshare):
        yield


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _unshare() -> None:
    if _libc().unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Run the block in the network namespace at ``path``; raises ``OSError`` if there is none, or no way in."""
    with namespace(path) as descriptor, _entered(lambda: enter_namespace(descriptor)):
        yield


@contextmanager
def _entered(enter: Callable[[], None]) -> Iterator[None]:
    """Run the block in the network namespace that a function enters.

    Raises ``OSError`` if this thread's own cannot be noted or left, and ``CNIError`` if it cannot come back to that.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter()
        try:
            yield
        finally:
            try:
                enter_namespace(home)
            except OSError as error:  # nothing may be done in the other one
                reason = f"cannot come back to this network namespace: {error}"
                raise CNIError(Code.HOST_SETTING, reason) from error
    finally:
        os.close(home)


def enter_namespace(descriptor: int) -> None:
    """Move this thread to a network namespace; raises ``OSError``."""
    if _libc().setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def identity(path: str) -> str:
    """Return what tells the network namespace at ``path`` from others, ``<device>:<inode>``; empty if there is none.

    Raises ``OSError`` where it cannot be told.
    """
    try:
        with namespace(path) as descriptor:
            return file_identity(descriptor)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return ""


def cookie(namespace: int) -> str:
    """Return the number that an open network namespace alone has, until the node is started again.

    It is empty on kernels that do not tell it (before 5.14), and where this process may not enter the namespace. Raises
    ``OSError`` where there is another reason.
    """
    try:
        with _entered(lambda: enter_namespace(namespace)):
            asking = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)
            try:
                return str(int.from_bytes(asking.getsockopt(SOL_SOCKET, SO_NETNS_COOKIE, 8), byteorder))
            finally:
                asking.close()
    except OSError as error:
        if error.errno not in {ENOPROTOOPT, EPERM}:
            raise
        return ""


def file_identity(descriptor: int) -> str:
    """Return device and inode of an open file."""
    status = os.fstat(descriptor)
    return f"{status.st_dev}:{status.st_ino}"
