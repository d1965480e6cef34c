"""The executable's first act: hand the call to the resident process, or else run it here.

It runs before every call, and so imports next to nothing. Where ``install.sh`` finds a C compiler, ``handover.c`` does
the same without an interpreter, and executes this module only for what it does not do: run a call.

The protocol is this. Who calls connects to ``SOCKET`` and sends one message: ``IDENTITY``, what CNI_NETNS is here
(``file_at``) and its ``VARIABLES``, separated by NUL, and as descriptors the standard streams and its own process. The
streams are memory that both processes share: input is read beforehand, output copied to the real streams in the end. So
whatever becomes of the resident process, nobody waits for a stream that it holds, and the call can still be run here,
from its beginning and without printing anything twice. Since operations can be repeated, it does not matter how far the
other one came.

The resident process's child answers twice. It says ``TAKEN``, with a descriptor of itself, before it does anything.
Without that answer in ``UNTIL_TAKEN`` the connection is shut down, after which the child cannot give it any more: the
kernel decides which of the two comes first. Later it sends one byte, the status with which the call ends; until then it
can say that it is ``AT_WORK``. If it dies instead, or has to be killed because it says nothing for ``UNTIL_DONE``, the
call is run here. So it is when anything of this fails here.

The native executable gives standard input back, and tells this module by its first arguments, after ``NATIVE``: its own
path; the status of a call whose result could not be written, or nothing; and the number of the error with which writing
that, or reading the input, has ended, 0 if there was none.
"""

import os
import sys
from _socket import AF_UNIX, CMSG_SPACE, SCM_RIGHTS, SHUT_RDWR, SOCK_SEQPACKET, SOL_SOCKET, socket

from cni_hostport import LARGEST_INPUT, LONGEST_IFNAME, __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

SOCKET = "/run/hostport.sock"
VARIABLES = (
    "CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH", "CNI_NETNS_OVERRIDE"
)  # fmt: skip
COMMANDS = ("ADD", "CHECK", "DEL")
IDENTITY = f"{__version__} {__file__}"  # two installations never share a process
TAKEN, AT_WORK = b"taken", b"at work"
UNTIL_TAKEN = 0.5  # seconds; a process that is under no pressure needs less than one millisecond
CHUNK = 1 << 16  # bytes
UNTIL_DONE = 30  # seconds without a word; an operation that meets no difficulty needs a few milliseconds
NATIVE = "--native"
NATIVE_ARGUMENTS = 5  # those before the caller's own
# code 5 is Code.IO_FAILURE
CANNOT_START = '{"cniVersion": "1.1.0", "code": 5, "msg": "the plugin cannot be loaded: %s"}\n'


def main(path: str = SOCKET) -> None:
    """Run one call, in the resident process that listens at ``path`` or here, and exit with its status."""
    stdin: bytes | Exception | None = None
    if sys.argv[1:2] == [NATIVE] and len(sys.argv) >= NATIVE_ARGUMENTS:
        stdin = _continue_natives_call()
    elif _can_be_handed_over():
        status, stdin = _hand_over(path)
        if status is not None:
            os._exit(status)
    try:
        from cni_hostport.__main__ import main as run_here
    except (ImportError, OSError, MemoryError) as error:  # such as no descriptors left
        _cannot_start(error)
    run_here(stdin)


def read(source: int) -> bytes:
    """Return what a descriptor has, at most one chunk more than the largest input; raises ``OSError``."""
    chunks, size = [], 0
    while size <= LARGEST_INPUT and (more := os.read(source, CHUNK)):
        chunks.append(more)
        size += len(more)
    return b"".join(chunks)


def write(target: int, data: bytes) -> None:
    """Write all of the data to a descriptor; raises ``OSError``."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]


def file_at(path: str) -> str:
    """Return what tells the file at a path from others, ``<device>:<inode>``; empty if there is none to be seen."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{status.st_dev}:{status.st_ino}"


def _continue_natives_call() -> Exception | None:
    """Take the native executable's place, and return the error with which its reading of standard input ended.

    Does not return if a result could not be written.
    """
    _, _, executable, status, number, *arguments = sys.argv
    sys.argv[:] = executable, *arguments
    error = OSError(int(number), os.strerror(int(number))) if int(number) else None
    if status:
        from cni_hostport.__main__ import withdraw

        withdraw(int(status), None, error or OSError())
    return error


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
    )


def _is_plain(name: str) -> bool:
    letters = name.replace("_", "").replace("-", "").replace(".", "")
    return name.isascii() and letters.isalnum() and name[0].isalnum()


def _hand_over(path: str) -> tuple[int | None, bytes | Exception | None]:
    """Return the status with which the call ended elsewhere, ``None`` if it did not, and its standard input.

    The latter is ``None`` if it has not been read, and an error if it could not be.
    """
    shared: list[int] = []
    data = None
    try:
        connection = socket(AF_UNIX, SOCK_SEQPACKET)
        connection.settimeout(UNTIL_TAKEN)
        if connection.fileno() > 2:  # noqa: PLR2004 - else a standard stream is closed
            connection.connect(path)
            shared.extend(map(os.memfd_create, ("stdin", "stdout", "stderr")))
            shared.append(os.pidfd_open(os.getpid()))
            data = _input()
            if isinstance(data, bytes) and len(data) <= LARGEST_INPUT:
                write(shared[0], data)
                os.lseek(shared[0], 0, os.SEEK_SET)
                status = _status_from(connection, shared)
                if status is not None:
                    stdout, stderr = map(_content, shared[1:3])
                    _print(stdout, stderr, status, data)
                    return status, data
    except (OSError, MemoryError):
        pass
    for descriptor in shared:
        os.closerange(descriptor, descriptor + 1)  # which does not fail
    return None, data


def _input() -> bytes | Exception:
    try:
        return read(0)
    except (OSError, MemoryError) as error:
        return error  # what was read before it is lost


def _status_from(connection: socket, descriptors: list[int]) -> int | None:
    """Ask for the call to be run with these descriptors, and return its status, ``None`` if it is not run."""
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    request = os.fsencode("\0".join([IDENTITY, file_at(os.environ.get("CNI_NETNS", "")), *variables]))
    connection.sendmsg([request], [(SOL_SOCKET, SCM_RIGHTS, _pack(descriptors))])
    process, in_time = _taken(connection)
    if process is None:
        return None
    if in_time:
        try:
            connection.settimeout(UNTIL_DONE)
            while (status := connection.recv(len(AT_WORK))) == AT_WORK:
                pass
            return status[0] if status else None  # without one, it is dead
        except ConnectionResetError:
            return None
        except OSError:
            pass
    _kill(process)
    return None


def _taken(connection: socket) -> tuple[int | None, bool]:
    """Return a descriptor of the process that takes the call, if there is one, and whether it does so in time."""
    in_time = True
    try:
        answer, rights, *_ = connection.recvmsg(len(TAKEN), CMSG_SPACE(4))
    except OSError:
        connection.shutdown(SHUT_RDWR)
        answer, rights, *_ = connection.recvmsg(len(TAKEN), CMSG_SPACE(4))
        in_time = False
    return (int.from_bytes(rights[0][2], sys.byteorder) if answer == TAKEN and rights else None), in_time


def _kill(process: int) -> None:
    """Kill a process, by its descriptor, and wait until it is dead."""
    try:
        from select import POLLIN, poll
        from signal import SIGKILL, pidfd_send_signal

        pidfd_send_signal(process, SIGKILL)
        death = poll()
        death.register(process, POLLIN)
        death.poll()
    except (OSError, ImportError):
        pass  # it is dead, or ends with the connection


def _content(memory: int) -> bytes:
    return os.pread(memory, os.fstat(memory).st_size, 0)


def _print(stdout: bytes, stderr: bytes, status: int, data: bytes | Exception | None) -> None:
    """Print what the call did; does not return if its result cannot be printed."""
    _log(stderr)
    try:
        write(1, stdout)
    except OSError as error:
        if status:
            _log(stdout)  # a runtime shows it where there is no error JSON
        from cni_hostport.__main__ import withdraw

        withdraw(status, data, error)


def _log(text: bytes) -> None:
    try:  # noqa: SIM105 - contextlib would be another import
        write(2, text)
    except OSError:
        pass  # no call fails because nobody listens


def _pack(descriptors: list[int]) -> bytes:
    return b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in descriptors)


def _cannot_start(error: BaseException) -> "NoReturn":
    """End with an error JSON where nothing can be imported that would make one."""
    reason = "".join(letter for letter in str(error) if " " <= letter <= "~" and letter not in '"\\')
    try:
        write(1, (CANNOT_START % reason).encode())
    finally:
        os._exit(1)
