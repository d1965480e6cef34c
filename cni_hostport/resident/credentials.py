"""Whom the resident process serves: a process that could do by itself all that is done for it.

What is done for a caller is done with the resident process's capabilities, in the caller's root directory. So the
caller has to be the same user, in the same user namespace, with each of these capabilities: the rule by which the
kernel lets one process control another (cap_ptrace_access_check of security/commoncap.c). Any other caller runs its
call itself, with what it has.

The kernel says who the caller is. It numbers the process that made the connection (SO_PEERCRED of unix(7)), and the one
that sent the request (SCM_CREDENTIALS). By the time at which a number is looked up it can be another process's. What
excludes that is the order: a directory of ``/proc`` is opened by the number, and shows one process only, and nothing
once that has ended; then a descriptor of the sender is found to have the number; then more is opened in the directory.
That descriptor is the kernel's (SO_PEERPIDFD) or, before Linux 6.5, came with the request. In the latter case too its
process had the number when the request was sent, since it has had one number only, and so is the sender.
"""

import os
import re
import socket
import struct
from array import array
from errno import ENOPROTOOPT
from typing import NamedTuple, Self

from cni_hostport.kernel import netns

SO_PEERPIDFD = 77  # asm-generic/socket.h
UCRED = struct.Struct("=iII")  # struct ucred (linux/socket.h): process, user, group
# proc_pid_status(5); the numbers are those in the PID namespace of this /proc and in each one below it
STATUS = re.compile(rb"^NSpid:\t(?P<numbers>.*)$(?s:.*)^CapEff:\t(?P<capabilities>[0-9a-f]+)$", re.MULTILINE)
NUMBER = re.compile(rb"^Pid:\t(\d+)$", re.MULTILINE)  # in proc_pid_fdinfo(5), of a descriptor of a process
LARGEST_STATUS = 1 << 16  # bytes
PLACES = {"ns/net": os.O_RDONLY, "root": os.O_PATH, "cwd": os.O_PATH}


class Rights(NamedTuple):
    """What a process may do: its user namespace, as device and inode, and its effective capabilities in it, as bits."""

    user_namespace: tuple[int, int]
    capabilities: int

    def include(self, others: Self) -> bool:
        """Tell whether these are at least the others."""
        return self.user_namespace == others.user_namespace and not others.capabilities & ~self.capabilities


class Process:
    """A process, as this one's ``/proc`` shows it."""

    def __init__(self, number: int) -> None:
        """Look at a process; raises ``OSError`` if there is none, or it may not be looked at."""
        self._number = number
        self._directory = os.open(f"/proc/{number}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        status = STATUS.search(_content("status", self._directory))
        if not status:
            raise OSError(0, "the kernel does not tell the capabilities of processes")
        namespace = os.stat("ns/user", dir_fd=self._directory)
        self.rights = Rights((namespace.st_dev, namespace.st_ino), int(status["capabilities"], 16))
        self.is_in_this_pid_namespace = b"\t" not in status["numbers"]

    def sent(self, request: "Request", connection: socket.socket) -> bool:
        """Tell whether it is the one that sent a request, whose last descriptor is one of the sender.

        Raises ``OSError`` if it has ended.
        """
        if request.sender != self._number:
            return False
        try:
            descriptor = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError as error:
            if error.errno != ENOPROTOOPT:
                raise
            descriptor = os.dup(request.descriptors[-1])  # on an older kernel
        try:
            found = NUMBER.search(_content(f"/proc/self/fdinfo/{descriptor}"))
        finally:
            os.close(descriptor)
        return found is not None and int(found[1]) == self._number

    def follow(self) -> None:
        """Enter its network namespace, root and working directory; raises ``OSError``, among others if it has ended."""
        places = [os.open(name, flags | os.O_CLOEXEC, dir_fd=self._directory) for name, flags in PLACES.items()]
        namespace, root, directory = places
        netns.enter_namespace(namespace)
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(directory)
        for descriptor in places:
            os.close(descriptor)
        self.close()

    def close(self) -> None:
        """Close what shows it; its rights stay known."""
        os.close(self._directory)


class Request(NamedTuple):
    """A message with descriptors, and the number of the process that sent it."""

    content: bytes
    descriptors: list[int]
    sender: int


def caller(connection: socket.socket) -> Process | None:
    """Return the process that made a connection, ``None`` if it is another user's; raises what ``Process`` raises."""
    process, user, _ = UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return Process(process) if user == os.geteuid() else None


def receive(connection: socket.socket, size: int, descriptors: int) -> Request:
    """Receive a request of at most so many bytes and descriptors, on a connection that has SO_PASSCRED set."""
    space = socket.CMSG_SPACE(descriptors * array("i").itemsize) + socket.CMSG_SPACE(UCRED.size)
    content, ancillary, *_ = connection.recvmsg(size, space)
    found = {kind: data for level, kind, data in ancillary if level == socket.SOL_SOCKET}
    received = array("i", found.get(socket.SCM_RIGHTS, b""))
    sender, *_ = UCRED.unpack(found.get(socket.SCM_CREDENTIALS, bytes(UCRED.size)))
    return Request(content, list(received), sender)


def _content(path: str, directory: int | None = None) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(descriptor, LARGEST_STATUS)
    finally:
        os.close(descriptor)
