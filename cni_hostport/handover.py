"""The executable's first act: hand the call to the resident process, or else run it here.

It runs before every call, and so imports next to nothing. The call is handed over with one message: environment and
version, and as descriptors the standard streams, the network namespace, the root and the working directory. The streams
are memory that both processes share: input is read beforehand, output copied to the real streams in the end. So
whatever becomes of the resident process, nobody waits for a stream that it holds, and the call can still be run here,
from its beginning and without printing anything twice. Since operations can be repeated, it does not matter how far the
other one came.

The resident process's child answers twice. It says that it takes the call, with a descriptor of itself, before it does
anything. Without that answer in time the connection is shut down, after which the child cannot give it any more: the
kernel decides which of the two comes first. Later it says with which status it ends. If it dies instead, or has to be
killed because it takes too long without a word of getting on, the call is run here.
"""

import os
from _socket import AF_UNIX, CMSG_SPACE, SCM_RIGHTS, SHUT_RDWR, SOCK_SEQPACKET, SOL_SOCKET, socket
from sys import byteorder

from cni_hostport import __version__

SOCKET = "/run/hostport.sock"
VARIABLES = (
    "CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH", "CNI_NETNS_OVERRIDE"
)  # fmt: skip
COMMANDS = ("ADD", "CHECK", "DEL")
LONGEST_IFNAME = 15  # bytes; the kernel's IFNAMSIZ is 16, with the final NUL
OWN_PATHS = ("/proc/self/", "/proc/thread-self/", "/dev/fd/", "/dev/std")  # another process has other files there
IDENTITY = f"{__version__} {__file__}"  # two installations never share a process
TAKEN, AT_WORK = b"taken", b"at work"
UNTIL_TAKEN = 0.5  # seconds; a process that is under no pressure needs less than one millisecond
CHUNK = 1 << 16  # bytes
UNTIL_DONE = 30  # seconds without a word; an operation that meets no difficulty needs a few milliseconds


def main(path: str = SOCKET) -> None:
    """Run one call, in the resident process that listens at ``path`` or here, and exit with its status."""
    stdin = None
    if _can_be_handed_over():
        status, stdin = _hand_over(path)
        if status is not None:
            os._exit(status)
    from cni_hostport.__main__ import main as run_here

    run_here(stdin)


def _can_be_handed_over() -> bool:
    """Tell whether the call is a frequent one, and not one that is refused before its standard input is read."""
    command, container, netns, ifname, path = (
        os.environ.get(f"CNI_{name}", "") for name in ("COMMAND", "CONTAINERID", "NETNS", "IFNAME", "PATH")
    )
    return (
        command in COMMANDS
        and _is_plain(container)
        and _is_plain(ifname)
        and len(ifname) <= LONGEST_IFNAME
        and bool(path)
        and bool(netns or command == "DEL")
        and not os.path.normpath(netns).startswith(OWN_PATHS)
    )


def _is_plain(name: str) -> bool:
    letters = name.replace("_", "").replace("-", "").replace(".", "")
    return name.isascii() and letters.isalnum() and name[0].isalnum()


def _hand_over(path: str) -> tuple[int | None, bytes | None]:
    """Return the status with which the call ended elsewhere, or ``None`` and what was read of its standard input."""
    connection = socket(AF_UNIX, SOCK_SEQPACKET)
    connection.settimeout(UNTIL_TAKEN)
    data = None
    try:
        connection.connect(path)
        if connection.fileno() <= 2:  # noqa: PLR2004 - a standard stream is closed
            connection.close()
            return None, None
        streams = stdin, stdout, stderr = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
        data = _read(0)
        _write(stdin, data)
        os.lseek(stdin, 0, os.SEEK_SET)
    except OSError:
        return None, data
    status = _status_from(connection, streams)
    if status is not None:
        for source, target in ((stderr, 2), (stdout, 1)):
            os.lseek(source, 0, os.SEEK_SET)
            _write(target, _read(source))
    return status, data


def _status_from(connection: socket, streams: list[int]) -> int | None:
    """Ask for the call to be run with these standard streams, and return its status, ``None`` if it is not run."""
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    request = os.fsencode("\0".join([IDENTITY, *variables]))
    try:
        places = [os.open(place, os.O_RDONLY | os.O_CLOEXEC) for place in ("/proc/self/ns/net", "/", ".")]
        connection.sendmsg([request], [(SOL_SOCKET, SCM_RIGHTS, _pack(streams + places))])
        process, in_time = _taken(connection)
    except OSError:
        return None
    if process is None:
        return None
    if in_time:
        connection.settimeout(UNTIL_DONE)
        try:
            while (status := connection.recv(len(AT_WORK))) == AT_WORK:
                pass
            return status[0] if status else None  # without one, it is dead
        except ConnectionResetError:
            return None
        except TimeoutError:
            pass
    _kill(process)
    return None


def _taken(connection: socket) -> tuple[int | None, bool]:
    """Return a descriptor of the process that takes the call, if there is one, and whether it does so in time."""
    in_time = True
    try:
        answer, rights, *_ = connection.recvmsg(len(TAKEN), CMSG_SPACE(4))
    except TimeoutError:
        connection.shutdown(SHUT_RDWR)
        answer, rights, *_ = connection.recvmsg(len(TAKEN), CMSG_SPACE(4))
        in_time = False
    return (int.from_bytes(rights[0][2], byteorder) if answer == TAKEN and rights else None), in_time


def _kill(process: int) -> None:
    """Kill a process, by its descriptor, and wait until it is dead."""
    from select import POLLIN, poll
    from signal import SIGKILL, pidfd_send_signal

    try:
        pidfd_send_signal(process, SIGKILL)
    except ProcessLookupError:
        return
    death = poll()
    death.register(process, POLLIN)
    death.poll()


def _read(source: int) -> bytes:
    data = b""
    while more := os.read(source, CHUNK):
        data += more
    return data


def _write(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]


def _pack(descriptors: list[int]) -> bytes:
    return b"".join(descriptor.to_bytes(4, byteorder) for descriptor in descriptors)
