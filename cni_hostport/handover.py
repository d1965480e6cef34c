"""The executable's first act: hand the call to the resident process, or else run it here.

It runs before every call, and so imports next to nothing. The call is handed over with one message: environment and
version, and as descriptors the standard streams, the network namespace, the root and the working directory. Standard
input is read beforehand, and output collected, in memory that both processes share. So whatever becomes of the resident
process, the call can still be run here, from its beginning and without printing anything twice; and since operations
can be repeated, it does not matter how far the other one came.

The resident process's child answers twice. It says that it takes the call, with a descriptor of itself, before it does
anything. Without that answer in time the connection is shut down, after which the child cannot give it any more: the
kernel decides which of the two comes first. Later it says with which status it ends. If it dies instead, or has to be
killed because it takes too long, the call is run here.
"""

import os
from _socket import AF_UNIX, CMSG_SPACE, SCM_RIGHTS, SHUT_RDWR, SOCK_SEQPACKET, SOL_SOCKET, socket
from sys import byteorder

from cni_hostport import __version__

SOCKET = "/run/hostport.sock"
VARIABLES = (
    "CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH", "CNI_NETNS_OVERRIDE"
)  # fmt: skip
NEEDED = ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH")
IDENTITY = f"{__version__} {__file__}"  # two installations never share a process
TAKEN = b"taken"
UNTIL_TAKEN = 0.5  # seconds; a process that is under no pressure needs less than one millisecond
CHUNK = 1 << 16  # bytes
UNTIL_DONE = 30  # seconds; an operation that meets no difficulty needs a few milliseconds


def main(path: str = SOCKET) -> None:
    """Run one call, in the resident process that listens at ``path`` or here, and exit with its status."""
    # a call that is refused before its standard input is read must not wait for that
    if os.environ.get("CNI_COMMAND") in {"ADD", "DEL", "CHECK"} and all(map(os.environ.get, NEEDED)):
        status = _hand_over(path)
        if status is not None:
            os._exit(status)
    from cni_hostport.__main__ import main as run_here

    run_here()


def _hand_over(path: str) -> int | None:
    """Return the status with which the call ended elsewhere, ``None`` if it has to be run here."""
    connection = socket(AF_UNIX, SOCK_SEQPACKET)
    connection.settimeout(UNTIL_TAKEN)
    try:
        connection.connect(path)
        if connection.fileno() <= 2:  # noqa: PLR2004 - a standard stream is closed
            connection.close()
            return None
    except OSError:
        return None
    stdin, stdout = os.memfd_create("stdin"), os.memfd_create("stdout")
    try:
        while data := os.read(0, CHUNK):
            os.write(stdin, data)
    except OSError:
        return None
    os.lseek(stdin, 0, os.SEEK_SET)
    status = _status_from(connection, [stdin, stdout, 2])
    if status is None:
        os.dup2(stdin, 0)
        os.lseek(0, 0, os.SEEK_SET)
    else:
        _copy(stdout, 1)
    return status


def _status_from(connection: socket, streams: list[int]) -> int | None:
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    request = os.fsencode("\0".join([IDENTITY, *variables]))
    places = [os.open(place, os.O_RDONLY | os.O_CLOEXEC) for place in ("/proc/self/ns/net", "/", ".")]
    try:
        connection.sendmsg([request], [(SOL_SOCKET, SCM_RIGHTS, pack(streams + places))])
        answer, rights, *_ = connection.recvmsg(len(TAKEN), CMSG_SPACE(4))
    except TimeoutError:
        connection.shutdown(SHUT_RDWR)
        answer, rights, *_ = connection.recvmsg(len(TAKEN), CMSG_SPACE(4))
    except OSError:
        return None
    if answer != TAKEN:
        return None
    connection.settimeout(UNTIL_DONE)
    try:
        answer = connection.recv(1)
    except TimeoutError:
        _kill(unpack(rights[0][2])[0])
        answer = b""
    except OSError:
        answer = b""
    return answer[0] if answer else None


def _kill(process: int) -> None:
    """Kill a process, by its descriptor, and wait until it is dead."""
    from select import POLLIN, poll
    from signal import SIGKILL, pidfd_send_signal

    pidfd_send_signal(process, SIGKILL)
    death = poll()
    death.register(process, POLLIN)
    death.poll()


def _copy(source: int, target: int) -> None:
    os.lseek(source, 0, os.SEEK_SET)
    while data := os.read(source, CHUNK):
        while data:
            data = data[os.write(target, data) :]


def pack(descriptors: list[int]) -> bytes:
    """Return descriptors as SCM_RIGHTS has them."""
    return b"".join(descriptor.to_bytes(4, byteorder) for descriptor in descriptors)


def unpack(rights: bytes) -> list[int]:
    """Return the descriptors in an SCM_RIGHTS message."""
    return [int.from_bytes(rights[start : start + 4], byteorder) for start in range(0, len(rights), 4)]
