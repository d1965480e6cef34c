"""The resident process: everything imported, and a child for each call.

Children wait on the listening socket before there is a call, so that a call does not wait for a fork. A child takes the
caller's streams, environment, network namespace and directories, and then is what the executable would have been: it
runs the same entry point, and ends. ``handover`` has the caller's side and the protocol. Besides, the addresses of
Services are watched (``ipvs``).
"""

import fcntl
import gc
import io
import os
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from errno import EAGAIN
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from cni_hostport import afterwards, departure, host, ipvs, library, netlink, skel
from cni_hostport.__main__ import run
from cni_hostport.handover import AT_WORK, IDENTITY, SOCKET, TAKEN, VARIABLES
from cni_hostport.nft import Nft

if TYPE_CHECKING:
    from collections.abc import Callable

SPARES = 2  # children that wait for a call
WHILE_ONE_WAITS = 20  # milliseconds in which no other is forked, which would slow down the call that was just taken
# children, those that are at work included; callers beyond them wait, and help themselves in the end. One that waits
# for a container to go is not among them: it sleeps, and ends with its caller
MOST = 32
BETWEEN_REPORTS = 1.0  # seconds; a caller waits for ``handover.UNTIL_DONE``
PATIENCE = 1.0  # seconds for a caller to say what it wants; it does so at once
LARGEST_REQUEST = 1 << 18  # bytes; the kernel's limit for a message is lower
DESCRIPTORS = 6  # of a request: standard streams, network namespace, root and working directory
FIRST_INHERITED = 3  # sd_listen_fds(3)
OPERATIONS_IMPORT = (
    *(
        f"cni_hostport.{module}"
        for module in (
            "comparison",
            "config",
            "conntrack",
            "deletion",
            "listeners",
            "listings",
            "lookup",
            "ownership",
            "plugin",
            "portmap",
            "upgrade",
        )
    ),
    "nftables",
    "pyroute2",
    "random",
    "syslog",
    "traceback",
)
REHEARSAL = (
    b'{"cniVersion": "1.0.0", "name": "rehearsal", "prevResult": {"ips": [{"address": "192.0.2.2/24"}]},'
    b' "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80}]}}'
)


def serve(path: str = SOCKET) -> NoReturn:
    """Answer calls for ever, on the socket that systemd hands over or else on one made at ``path``."""
    _import_everything()
    with host.scratch_namespace():
        stage = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    listener = _listener(path)
    lifeline, alive = os.pipe()
    # each child is known by a descriptor, on which it tells when it takes a call, and which ends with it
    children, waiting = set[int](), set[int]()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes those that ended
    events = select.poll()
    watch = ipvs.Watch(events)
    while True:
        watch.work()
        lacks = len(waiting) < SPARES and len(children) < MOST
        ready = [found for found, _ in events.poll(None if not lacks else WHILE_ONE_WAITS if waiting else 0)]
        heard = [descriptor for descriptor in ready if not watch.takes(descriptor)]
        if lacks and not (ready if waiting else heard):
            hears, tells = os.pipe()
            if not os.fork():
                os.close(alive)
                _wait_for_a_call(listener, lifeline, tells, stage if waiting else None)
            os.close(tells)
            children.add(hears)
            waiting.add(hears)
            events.register(hears, select.POLLIN)
        for descriptor in heard:
            if os.read(descriptor, 1):
                waiting.discard(descriptor)
                continue
            events.unregister(descriptor)
            os.close(descriptor)
            children.discard(descriptor)
            if descriptor in waiting:  # it did not get as far as a call: do not fork as fast as children die
                waiting.discard(descriptor)
                time.sleep(PATIENCE)


def _import_everything() -> None:
    """Import what operations import, so that children share it, and need no files that a caller's root may not have."""
    for module in OPERATIONS_IMPORT:
        import_module(module)
    gc.collect()
    gc.freeze()  # children then do not copy all of it only to count references
    gc.disable()


def _listener(path: str) -> socket.socket:
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        listener = socket.socket(fileno=FIRST_INHERITED)
    else:
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        if probe.connect_ex(path) in {0, EAGAIN}:
            sys.exit(f"hostport: another process listens on {path}")
        with suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mask = os.umask(0o177)
        listener.bind(path)
        os.umask(mask)
        listener.listen(socket.SOMAXCONN)
    listener.settimeout(0)  # of the children that a call wakes, one gets it
    return listener


def _wait_for_a_call(listener: socket.socket, lifeline: int, tells: int, stage: int | None) -> NoReturn:
    """Be the child that runs one call; with a stage, which takes time, prepare for it first."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # pyroute2 has children of its own
    Nft.context_type = library.Context  # if that ends this process, the caller runs its call
    try:
        if stage is not None:
            _rehearse(stage)
        ready = select.epoll()
        ready.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        ready.register(lifeline, select.EPOLLIN)
        while lifeline not in dict(ready.poll()):  # else the resident process is gone
            with suppress(BlockingIOError):
                connection, _ = listener.accept()
                os.write(tells, TAKEN[:1])
                departure.PLACES.append(tells)
                _answer(connection)
                break
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller finds the connection closed
        sys.stderr.write(f"hostport: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
    os._exit(0)


def _rehearse(stage: int) -> None:
    """Add and delete an attachment in a network namespace of its own.

    Memory that a call touches first has to be copied from the parent's; afterwards most of it is this process's.
    """
    host.enter_namespace(stage)
    variables = {"CNI_CONTAINERID": "rehearsal", "CNI_IFNAME": "eth0", "CNI_PATH": "/", "CNI_NETNS": "/"}
    for command in ("ADD", "DEL"):
        skel.run(variables | {"CNI_COMMAND": command}, io.BytesIO(REHEARSAL), io.StringIO(), io.StringIO())
    netlink.KEPT.clear()
    skel.AFTERWARDS.clear()


def _answer(connection: socket.socket) -> None:
    """Run a caller's call, unless it is not to be run here, which the caller sees by the closed connection."""
    connection.settimeout(PATIENCE)
    _, user, _ = struct.unpack("=iii", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    request, descriptors, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, DESCRIPTORS)
    identity, *variables = os.fsdecode(request).split("\0")
    if user != os.geteuid() or identity != IDENTITY or len(descriptors) != DESCRIPTORS:
        return
    *streams, netns, root, directory = descriptors
    host.enter_namespace(netns)
    os.fchdir(root)
    os.chroot(".")
    os.fchdir(directory)
    if os.readlink("/proc/self") != str(os.getpid()):
        return  # the caller has process IDs of its own, and paths in its /proc mean nothing here
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    environ = dict(variable.partition("=")[::2] for variable in variables)
    # the caller's end is the end of its call, wherever that runs: SIGIO, when the connection is closed, terminates
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    with suppress(BrokenPipeError, ConnectionResetError):  # the caller does not wait any longer
        socket.send_fds(connection, [TAKEN], [os.pidfd_open(os.getpid())])
        netlink.PROGRESS.append(_reporting(connection))
        status = run({name: value for name, value in environ.items() if name in VARIABLES})
        netlink.PROGRESS.clear()
        if skel.AFTERWARDS:
            signal.signal(signal.SIGIO, signal.SIG_IGN)  # the caller's end is no longer the end of this process
        connection.send(bytes([status]))
    if skel.AFTERWARDS:
        afterwards.run(skel.AFTERWARDS)


def _reporting(connection: socket.socket) -> "Callable[[], None]":
    """Return what tells a caller now and then that its call gets on."""
    told = time.monotonic()

    def report() -> None:
        nonlocal told
        now = time.monotonic()
        if now > told + BETWEEN_REPORTS:
            told = now
            with suppress(OSError):  # the caller's end is noticed elsewhere
                connection.send(AT_WORK)

    return report
