"""libnftables in a process of its own.

It ends the process that it runs in where it has no netlink socket, no memory, or an error while it receives, and it
crashes on some conditions and sets. In a process of its own, that is an error like others.
"""

from __future__ import annotations

import fcntl
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
STDIN, STDOUT, STDERR, FIRST_OTHER, MOST_DESCRIPTORS = 0, 1, 2, 3, 1 << 20
FAULTS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")
LONGEST_WORDS = 1000  # bytes


class NoProcessError(UnavailableError):
    """The kernel refuses another process."""


class Process:
    """A libnftables context in a process of its own, which is started again if libnftables has ended it.

    It ends with this process, and when this object is no longer used. libnftables looks up the interfaces that commands
    name where its process is, whatever namespace the context is bound to: it follows the thread that asks.
    """

    def __init__(self) -> None:
        """Start it; raises ``NoProcessError``, and ``UnavailableError`` as ``Context`` does."""
        self._pid, self._parent, self._streams = 0, os.getpid(), ExitStack()
        self._place = 0  # the network namespace, by its inode, in which it looks for interfaces
        try:
            self._namespace = os.open(NAMESPACE.format("thread-self"), os.O_RDONLY | os.O_CLOEXEC)
            self._words = os.memfd_create("words")
        except OSError as error:
            raise _not_started(error) from error
        self._start(None)

    def __del__(self) -> None:
        """Let it end, and wait for that."""
        if os.getpid() == self._parent:
            self._wait()
            with suppress(AttributeError):
                os.close(self._namespace)
                os.close(self._words)

    def ask(self, command: bytes, output: Collection[str], *, without_sets: bool = False) -> Answer:
        """Do as ``Context.ask``; raises ``LibraryEndedError`` where libnftables ends its process instead."""
        if not self._pid:
            self._start(self._namespace)
        here = os.stat(NAMESPACE.format("thread-self")).st_ino
        move = "" if here == self._place else NAMESPACE.format(os.readlink("/proc/thread-self"))
        self._place = here
        try:
            marshal.dump((move, command, tuple(output), without_sets), self._requests)
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
            os.ftruncate(self._words, 0)
            os.lseek(self._words, 0, os.SEEK_SET)
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
        self._place = os.fstat(self._namespace).st_ino
        if not self._pid:
            _serve(theirs, self._words, self._parent, namespace, is_main=is_main)
        os.close(theirs)
        try:
            _, _, reason = self._answer()
        except (OSError, EOFError):
            raise self._end(knew_sets=False) from None
        if reason:
            raise UnavailableError([(reason.decode(), "")])

    def _end(self, *, knew_sets: bool) -> LibraryEndedError:
        """Return what is to be said of its end."""
        status = self._wait()
        said = os.pread(self._words, LONGEST_WORDS, 0).decode(errors="replace")
        words = f": {' '.join(said.split())}" if said.strip() else ""
        if status is None:
            reason, is_crash = "libnftables ended its process", not words
        elif status >= 0:
            reason, is_crash = f"libnftables ended its process with exit status {status}", False
        else:
            from signal import Signals

            name = Signals(-status).name
            is_crash = name in FAULTS
            reason = f"libnftables crashed ({name})" if is_crash else f"libnftables was ended by a signal ({name})"
        return LibraryEndedError(f"{reason}{words}", is_crash=is_crash, knew_sets=knew_sets)

    def _wait(self) -> int | None:
        """Wait for its end and return its exit status, or the number of the signal that ended it as a negative one.

        ``None`` where this process was started so that it is not told.
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


def _serve(caller: int, words: int, parent: int, namespace: int | None, *, is_main: bool) -> NoReturn:
    """Be the process: it has nothing of the caller's but a socket, and a file for what libnftables says.

    ``is_main`` tells whether the caller's main thread started it. To the kernel, the thread is the parent.
    """
    try:
        caller = fcntl.fcntl(caller, fcntl.F_DUPFD, FIRST_OTHER) if caller < FIRST_OTHER else caller
        os.dup2(words, STDERR)
        if namespace is not None:
            _enter(f"/proc/self/fd/{namespace}")
        os.dup2(STDERR, STDOUT)
        os.dup2(STDERR, STDIN)
        os.closerange(FIRST_OTHER, caller)
        os.closerange(caller + 1, MOST_DESCRIPTORS)
        _leave_no_core()
        if is_main:  # another thread can end before the caller does, whose end is then only seen on the socket
            _end_with(parent)
        with open(caller, "rb") as asked, open(caller, "wb", closefd=False) as answered:
            _answer_all(asked, answered)
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


def _answer_all(asked: BinaryIO, answered: BinaryIO) -> NoReturn:
    def answer(what: Answer) -> None:
        marshal.dump(what, answered)
        answered.flush()

    try:
        context = Context()
    except UnavailableError as error:
        answer((1, b"", str(error).encode()))
        os._exit(0)
    answer((0, b"", b""))
    while True:
        try:
            move, command, output, without_sets = marshal.load(asked)  # noqa: S302 - from this very program
        except EOFError:
            os._exit(0)
        if move:
            _enter(move)
        answer(context.ask(command, output, without_sets=without_sets))
