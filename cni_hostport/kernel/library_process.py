"""libnftables in a process of its own.

libnftables ends the process that it runs in when it has no netlink socket or no memory, or when it cannot receive; and
it crashes on some conditions and sets. In a process of its own, all this is an error like others.
"""

from __future__ import annotations

import fcntl
import gc
import marshal
import os
from _socket import socketpair
from _thread import get_native_id
from contextlib import ExitStack, suppress

from cni_hostport.errors import LibraryEndedError, UnavailableError
from cni_hostport.kernel.library import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import BinaryIO, NoReturn

    from cni_hostport.kernel.library import Answer

NAMESPACE = "/proc/{}/ns/net"
PR_SET_PDEATHSIG, SIGKILL = 1, 9  # linux/prctl.h, asm/signal.h: the module signal takes a millisecond to import
STDIN, STDOUT, STDERR, FIRST_OTHER = 0, 1, 2, 3  # file descriptors
MAX_DESCRIPTORS = 1 << 20
FAULT_SIGNALS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")
LONGEST_MESSAGE = 1000  # bytes of what libnftables wrote before it ended


class NoProcessError(UnavailableError):
    """The kernel refuses another process."""


class Process:
    """A libnftables context in a process of its own, which is started again if libnftables has ended it.

    The process ends with this one, and when this object is no longer used. libnftables looks up the names of interfaces
    in the network namespace of its process, to whichever the context is bound. So the process enters the namespace of
    the thread that asks.
    """

    def __init__(self) -> None:
        """Start it; raises ``NoProcessError``, and ``UnavailableError`` as ``Context`` does."""
        self._pid, self._parent, self._streams = 0, os.getpid(), ExitStack()
        self._lookup_inode = 0  # of the network namespace in which libnftables looks up interfaces
        try:
            self._namespace = os.open(NAMESPACE.format("thread-self"), os.O_RDONLY | os.O_CLOEXEC)
            self._messages = os.memfd_create("messages")
        except OSError as error:
            raise _not_started(error) from error
        self._start(None)

    def __del__(self) -> None:
        """Let it end, and wait for that."""
        if os.getpid() == self._parent:
            self._wait()
            with suppress(AttributeError):
                os.close(self._namespace)
                os.close(self._messages)

    def ask(self, command: bytes, output: Collection[str], *, without_sets: bool = False) -> Answer:
        """Do as ``Context.ask``; raises ``LibraryEndedError`` where libnftables ends its process instead."""
        if not self._pid:
            self._start(self._namespace)
        inode = os.stat(NAMESPACE.format("thread-self")).st_ino
        namespace = "" if inode == self._lookup_inode else NAMESPACE.format(os.readlink("/proc/thread-self"))
        self._lookup_inode = inode
        try:
            marshal.dump((namespace, command, tuple(output), without_sets), self._requests)
            self._requests.flush()
            return self._answer()
        except (OSError, EOFError):
            raise self._end(knew_sets=not without_sets) from None

    def _answer(self) -> Answer:
        """Return the next answer; raises ``EOFError`` if the process ends before all of it is here."""
        try:
            answer: Answer = marshal.load(self._answers)  # noqa: S302 - from this very program
        except (ValueError, TypeError) as error:
            raise EOFError from error
        return answer

    def _start(self, namespace: int | None) -> None:
        try:
            os.ftruncate(self._messages, 0)
            os.lseek(self._messages, 0, os.SEEK_SET)
            ours, theirs = (end.detach() for end in socketpair())
            self._answers = self._streams.enter_context(open(ours, "rb"))  # noqa: SIM115 - closed by _wait
            self._requests = self._streams.enter_context(open(ours, "wb", closefd=False))  # noqa: SIM115
        except OSError as error:
            raise _not_started(error) from error
        is_main = get_native_id() == self._parent
        try:
            self._pid = os.fork()
        except OSError as error:
            os.close(theirs)
            self._streams.close()
            raise NoProcessError([(f"libnftables cannot be started: {error.strerror}", "")]) from error
        if not self._pid:  # and before anything that can fail: no error of the child's is one of the caller's
            _serve(theirs, self._messages, self._parent, namespace, is_main=is_main)
        os.close(theirs)
        self._lookup_inode = os.fstat(self._namespace).st_ino
        try:
            _, _, reason = self._answer()
        except (OSError, EOFError):
            raise self._end(knew_sets=False) from None
        if reason:
            raise UnavailableError([(reason.decode(), "")])

    def _end(self, *, knew_sets: bool) -> LibraryEndedError:
        """Return the error that says how the process ended."""
        status = self._wait()
        message = os.pread(self._messages, LONGEST_MESSAGE, 0).decode(errors="replace")
        suffix = f": {' '.join(message.split())}" if message.strip() else ""
        if status is None:
            reason, is_crash = "libnftables ended its process", not suffix
        elif status >= 0:
            reason, is_crash = f"libnftables ended its process with exit status {status}", False
        else:
            from signal import Signals

            name = Signals(-status).name
            is_crash = name in FAULT_SIGNALS
            reason = f"libnftables crashed ({name})" if is_crash else f"libnftables was ended by a signal ({name})"
        return LibraryEndedError(f"{reason}{suffix}", is_crash=is_crash, knew_sets=knew_sets)

    def _wait(self) -> int | None:
        """Wait until the process has ended, and return its exit status; a signal that ended it as a negative number.

        ``None`` where the kernel does not keep it for this process, which then was started with SIGCHLD ignored.
        """
        pid, self._pid = self._pid, 0
        with suppress(OSError):  # what could not be sent
            self._streams.close()
        if not pid:
            return None
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:
            return None


def _not_started(error: OSError) -> UnavailableError:
    return UnavailableError([(f"libnftables cannot be started: {error.strerror}", "")])


def _serve(caller: int, messages: int, parent: int, namespace: int | None, *, is_main: bool) -> NoReturn:
    """Be the process. It has nothing of the caller's but a socket, and a file for what libnftables writes.

    ``is_main`` tells whether the caller's main thread started it. To the kernel, the thread is the parent.
    """
    gc.freeze()  # the caller's objects are not to be finalized here
    try:
        caller = fcntl.fcntl(caller, fcntl.F_DUPFD, FIRST_OTHER) if caller < FIRST_OTHER else caller
        os.dup2(messages, STDERR)
        if namespace is not None:
            _enter(f"/proc/self/fd/{namespace}")
        os.dup2(STDERR, STDOUT)
        os.dup2(STDERR, STDIN)
        os.closerange(FIRST_OTHER, caller)
        os.closerange(caller + 1, MAX_DESCRIPTORS)
        _leave_no_core()
        if is_main:  # another thread can end before the caller does, whose end is then only seen on the socket
            _end_with(parent)
        with open(caller, "rb") as requests, open(caller, "wb", closefd=False) as answers:
            _answer_all(requests, answers)
    except BaseException as error:  # noqa: BLE001 - it must not come back into the caller's code
        with suppress(OSError):
            os.write(STDERR, f"{type(error).__name__}: {error}".encode())
    os._exit(1)


def _enter(namespace: str) -> None:
    from cni_hostport.kernel import netns

    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    netns.enter_namespace(descriptor)
    os.close(descriptor)


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that is: nothing is done in its name later."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _leave_no_core() -> None:
    """Have the kernel write no file of this process's memory when libnftables crashes: that is not looked at.

    Services of container runtimes come without a limit to such files, and a runtime's calls can crash again and again.
    """
    import resource

    with suppress(OSError, ValueError):  # where a system call filter forbids it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer_all(requests: BinaryIO, answers: BinaryIO) -> NoReturn:
    def send(answer: Answer) -> None:
        marshal.dump(answer, answers)
        answers.flush()

    try:
        context = Context()
    except UnavailableError as error:
        send((1, b"", str(error).encode()))
        os._exit(0)
    send((0, b"", b""))
    while True:
        try:
            namespace, command, output, without_sets = marshal.load(requests)  # noqa: S302 - from this very program
        except EOFError:
            os._exit(0)
        if namespace:
            _enter(namespace)
        send(context.ask(command, output, without_sets=without_sets))
