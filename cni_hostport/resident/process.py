"""The resident process: everything imported, and a child for each call.

Children wait on the listening socket before there is a call, so that a call does not wait for a fork. A child takes the
caller's streams, environment, network namespace and directories, and then is what the executable would have been: it
runs the call by the same function, and ends. ``handover`` has the caller's side and the protocol, ``credentials``
decides who is served. Besides, the addresses of Services are watched (``ipvs``).
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import socket
import stat
import sys
import time
from contextlib import suppress
from errno import EAGAIN, ECONNREFUSED, ENOENT
from typing import TYPE_CHECKING, NoReturn

from cni_hostport import afterwards, handover, log, netlink, plugin, port_wait, skel
from cni_hostport.dynamic_ports import pod_files
from cni_hostport.handover import AT_WORK, IDENTITY, SOCKET, TAKEN, VARIABLES
from cni_hostport.kernel import ipvs, library, netns
from cni_hostport.kernel.nft import Nft
from cni_hostport.resident import code, credentials
from cni_hostport.text import escaped, log_to

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    RunCall = Callable[[Mapping[str, str]], int]
    """Runs the call of an environment on this process's standard streams; returns its exit status."""
    Answer = Callable[[socket.socket], None]
    """Runs the call of whoever made a connection, and tells the caller how it ended."""

MAX_WAITING = 2  # children that wait for a call
# children, those that are at work included; callers beyond them wait, and help themselves in the end. One that waits
# for a container to go is not among them: it sleeps, and ends with its caller
MAX_CHILDREN = 32
FORK_DELAY = 20  # milliseconds; while a child waits, a fork would only slow down the call that was just taken
FAILURE_PAUSE = 1.0  # seconds without a fork, after one that failed and after a child that died
REQUEST_TIMEOUT = 1.0  # seconds for a caller to say what it wants; it does so at once
REPORT_INTERVAL = 1.0  # seconds between reports of progress; a caller waits for ``handover.UNTIL_DONE``
GRACE = 0.005  # seconds in which a caller has the processor to itself, before its call's process cleans up and ends
LARGEST_REQUEST = 1 << 18  # bytes; the kernel's limit for a message is lower
DESCRIPTORS = 4  # number of them in a request: standard streams, and the process that sends it
EXIT_STATUSES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # by the signal that ends it; of the latter, a shell's status
FIRST_INHERITED = 3  # sd_listen_fds(3)
NOWHERE = "/proc/nowhere"  # where no file of a pod can be written
REHEARSED = "CNI_CONTAINERID=rehearsal", "CNI_IFNAME=eth0", "CNI_PATH=/", "CNI_NETNS=/"
REHEARSAL = (
    b'{"cniVersion": "1.0.0", "name": "rehearsal", "prevResult": {"ips": [{"address": "192.0.2.2/24"}]},'
    b' "dynamicPorts": "40000-40999",'
    b' "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80}], "dynamicPorts": "81/tcp"}}'
)


def serve(run: RunCall, path: str = SOCKET) -> NoReturn:
    """Answer calls until SIGTERM or SIGINT, on the socket that systemd hands over or else on one made at ``path``.

    Raises ``OSError`` if there cannot be such a socket, or no child.
    """
    code.load()
    if "JOURNAL_STREAM" not in os.environ:  # else a line for syslog is in the same journal
        log.COPIES.append(_own_stderr())
    with netns.scratch_namespace():
        stage = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    listener, remove = _listener(path)

    def end(number: int, _: object) -> NoReturn:
        remove()
        os._exit(EXIT_STATUSES[signal.Signals(number)])  # an exception would be lost within a hook of fork

    for number in EXIT_STATUSES:
        signal.signal(number, end)
    try:
        this = credentials.Process(os.getpid())
        this.close()
        _serve(listener, stage, lambda connection: _answer(connection, this.rights, run))
    finally:
        remove()


def _own_stderr() -> log.Log:
    """Return what writes a line to where this process's messages go, and not those of a call."""
    stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    return log_to(stderr)


def _serve(listener: socket.socket, stage: int, answer: Answer) -> NoReturn:
    listener.settimeout(0)  # of the children that a call wakes, one gets it
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # connections have it from the beginning
    lifeline, alive = os.pipe()
    # each child is known by a descriptor, on which it tells when it takes a call, and which ends with it
    children, waiting = set[int](), set[int]()
    begun = False
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes those that ended
    events = select.poll()
    watch = ipvs.Watch(events)
    while True:
        watch.work()
        lacks = len(waiting) < MAX_WAITING and len(children) < MAX_CHILDREN
        ready = [found for found, _ in events.poll(None if not lacks else FORK_DELAY if waiting else 0)]
        heard = [descriptor for descriptor in ready if not watch.takes(descriptor)]
        if lacks and not (ready if waiting else heard):
            hears, tells = os.pipe()
            try:
                is_child = not os.fork()
            except OSError:
                os.close(hears)
                if not begun:
                    raise
                time.sleep(FAILURE_PAUSE)  # callers do without
            else:
                if is_child:
                    os.close(alive)
                    _wait_for_a_call(listener, lifeline, tells, answer, stage if waiting else None)
                begun = True
                children.add(hears)
                waiting.add(hears)
                events.register(hears, select.POLLIN)
            os.close(tells)
        for descriptor in heard:
            if os.read(descriptor, 1):
                waiting.discard(descriptor)
                continue
            events.unregister(descriptor)
            os.close(descriptor)
            children.discard(descriptor)
            if descriptor in waiting:  # it did not get as far as a call: do not fork as fast as children die
                waiting.discard(descriptor)
                time.sleep(FAILURE_PAUSE)


def _listener(path: str) -> tuple[socket.socket, Callable[[], None]]:
    """Return the socket that systemd hands over or one made at a path, and what removes the latter in the end.

    What is at the path already may only be a socket on which nobody listens any more.
    """
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        return socket.socket(fileno=FIRST_INHERITED), lambda: None
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    error = probe.connect_ex(path)
    if error in {0, EAGAIN}:
        sys.exit(f"hostport: another process listens on {escaped(path)}")
    if error != ENOENT:
        if error != ECONNREFUSED or not stat.S_ISSOCK(os.lstat(path).st_mode):
            sys.exit(f"hostport: {escaped(path)} exists, and is not a socket that was left behind")
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    listener.bind(path)
    os.umask(mask)
    listener.listen(socket.SOMAXCONN)
    parent = os.getpid()

    def remove() -> None:
        if os.getpid() == parent:  # and not a child that a signal ends
            with suppress(FileNotFoundError):
                os.unlink(path)

    return listener, remove


def _wait_for_a_call(listener: socket.socket, lifeline: int, tells: int, answer: Answer, stage: int | None) -> NoReturn:
    """Be the child that answers one call; with a ``stage``, a network namespace, rehearse there first."""
    Nft.context_type = library.Context  # if that ends this process, the caller runs its call
    try:
        for number in (*EXIT_STATUSES, signal.SIGCHLD):  # a call may run iptables, and has to see how that ends
            signal.signal(number, signal.SIG_DFL)
        if stage is not None:
            _rehearse(stage)
        code.close()
        ready = select.epoll()
        ready.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        ready.register(lifeline, select.EPOLLIN)
        while lifeline not in dict(ready.poll()):  # else the resident process is gone
            with suppress(BlockingIOError):
                connection, _ = listener.accept()
                os.write(tells, TAKEN[:1])
                port_wait.PLACES.append(tells)
                answer(connection)
                break
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller finds the connection closed
        with suppress(OSError):
            handover.write(2, f"hostport: {escaped(f'{type(error).__name__}: {error}')}\n".encode())
    finally:
        os._exit(0)


def _rehearse(stage: int) -> None:
    """Answer calls of its own in a network namespace of its own.

    Memory that a call touches first has to be copied from the parent's; afterwards most of it is this process's.
    """
    netns.enter_namespace(stage)
    this = credentials.Process(os.getpid())
    process = os.pidfd_open(os.getpid())
    for command in ("ADD", "DEL"):
        variables = *REHEARSED, f"CNI_COMMAND={command}"
        request = "\0".join([IDENTITY, handover.file_at("/"), *variables])
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        socket.send_fds(ours, [os.fsencode(request)], [0, 1, 2, process])
        _answer(theirs, this.rights, _run_in_rehearsal)
        theirs.close()  # before the other end, whose end would be that of this process
        ours.close()
    os.close(process)
    this.close()
    netlink.close_all()


def _run_in_rehearsal(environ: Mapping[str, str]) -> int:
    pod_files.DIRECTORY, directory = NOWHERE, pod_files.DIRECTORY
    status = skel.run(environ, io.BytesIO(REHEARSAL), io.StringIO(), io.StringIO(), plugin.OPERATIONS.__getitem__)
    skel.AFTERWARDS.clear()
    pod_files.DIRECTORY = directory
    return status


def _answer(connection: socket.socket, rights: credentials.Rights, run: RunCall) -> None:
    """Run a caller's call, unless it is not to be run here, which the caller sees by the closed connection."""
    connection.settimeout(REQUEST_TIMEOUT)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # it was made before the listener had that
    try:
        caller = credentials.caller(connection)  # while it prepares its request
        request = credentials.receive(connection, LARGEST_REQUEST, DESCRIPTORS)
        if not request.content:
            return  # the caller has no input, or has ended
        identity, netns, *variables = os.fsdecode(request.content).split("\0")
        if (
            identity != IDENTITY
            or len(request.descriptors) != DESCRIPTORS
            or not (caller and caller.sent(request, connection) and caller.rights.include(rights))
            or not caller.is_in_this_pid_namespace
        ):
            return
        caller.follow()
    except (FileNotFoundError, ProcessLookupError):
        return  # the caller has ended: this one was too late for it
    environ = dict(variable.partition("=")[::2] for variable in variables)
    if netns != handover.file_at(environ.get("CNI_NETNS", "")):
        return  # the path means another file here, as paths in /proc/self do
    for target, stream in enumerate(request.descriptors[:-1]):
        os.dup2(stream, target)
    for descriptor in request.descriptors:
        os.close(descriptor)
    # the caller's end is the end of its call, wherever that runs: SIGIO, when the connection is closed, terminates
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    process = os.pidfd_open(os.getpid())
    with suppress(BrokenPipeError, ConnectionResetError):  # the caller does not wait any longer
        socket.send_fds(connection, [TAKEN], [process])
        netlink.PROGRESS_REPORTS.append(_reporting(connection))
        status = run({name: value for name, value in environ.items() if name in VARIABLES})
        netlink.PROGRESS_REPORTS.clear()
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # the caller's end is no longer the end of this process
        if status and not os.fstat(1).st_size:
            connection.close()  # there was no memory even for the error
        else:
            connection.send(bytes([status]))
            time.sleep(GRACE)
    os.close(process)
    if skel.AFTERWARDS:
        afterwards.run(skel.AFTERWARDS)


def _reporting(connection: socket.socket) -> Callable[[], None]:
    """Return a function that reports to a caller that its call gets on, at most once in each interval."""
    reported = time.monotonic()

    def report() -> None:
        nonlocal reported
        now = time.monotonic()
        if now > reported + REPORT_INTERVAL:
            reported = now
            with suppress(OSError):  # the caller's end is noticed elsewhere
                connection.send(AT_WORK)

    return report
