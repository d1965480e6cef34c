"""The process: hands the real environment and standard streams to the protocol's edge."""

from __future__ import annotations

import gc
import os
import sys

from cni_hostport import handover, skel
from cni_hostport.text import escaped, log_to

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from cni_hostport.skel import Operation

    Input = bytes | Exception | None
    """Standard input where it has been read already, or the error with which that ended."""

# how a standard stream that is closed is opened, so that it still can be neither read nor written
CLOSED = {0: os.O_WRONLY, 1: os.O_RDONLY, 2: os.O_RDONLY}


class _Stdin:
    """File descriptor 0, read only when it is asked for: VERSION does not need it, and it can be closed."""

    def __init__(self, already_read: Input) -> None:
        self._already_read = already_read

    def read(self) -> bytes:
        if isinstance(self._already_read, Exception):
            raise self._already_read
        return handover.read(0) if self._already_read is None else self._already_read


class _Output:
    """A file descriptor that text is written to at once, so that what cannot be written is known at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> None:
        handover.write(self._descriptor, text.encode(errors="backslashreplace"))


def run(environ: Mapping[str, str], stdin: Input = None) -> int:
    """Run one CNI command on this process's standard streams and return its exit status."""
    return skel.run(environ, _Stdin(stdin), _Output(1), _Output(2), _load_operation)


def main(stdin: Input = None) -> NoReturn:
    """Run one CNI command and exit with its status; or, without one, what a person asks for on the command line."""
    _keep_closed()
    if sys.argv[1:] and not os.environ.get("CNI_COMMAND"):
        _operate(sys.argv[1:])
    gc.disable()  # the process ends before that could pay
    _end(run(os.environ, stdin))


def withdraw(status: int, stdin: Input, error: Exception) -> NoReturn:
    """End a call that was run elsewhere, with this status, and whose output cannot be written; undo an ADD."""
    gc.disable()
    skel.withdraw(os.environ, None if status else _Stdin(stdin), error, _Output(2), _load_operation)
    _end(1)


def _end(status: int) -> NoReturn:
    """End, and leave what need not be done before the answer to another process."""
    try:
        if skel.AFTERWARDS:
            from cni_hostport import afterwards

            afterwards.fork(skel.AFTERWARDS)
    except Exception as error:  # noqa: BLE001 - the caller has its answer, which stays true
        log_to(_Output(2))(f"what was left to be done after the answer is not done: {error}")
    finally:
        os._exit(status)  # everything is said: taking the modules down in order would only cost time


def _load_operation(command: str) -> Operation:
    from cni_hostport import plugin  # VERSION, and a call that is refused, do without

    return plugin.OPERATIONS[command]


def _keep_closed() -> None:
    """Let no file that is opened be taken for a standard stream that is closed."""
    for descriptor, flags in CLOSED.items():
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(flags)  # by the lowest number that is free


def _open_null(flags: int) -> None:
    try:  # noqa: SIM105 - contextlib would be another import
        os.open(os.devnull, flags)
    except OSError:
        pass  # a root directory without devices


def _operate(arguments: list[str]) -> NoReturn:
    if arguments[0] == "serve" and len(arguments) <= 2 and not arguments[-1].startswith("-"):  # noqa: PLR2004 - SOCKET
        _serve(*arguments[1:])  # without what the command line needs, which the resident process would keep
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # there is none if it was closed
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    from cni_hostport.operate.cli import main as operate

    sys.exit(operate(prog_name="hostport", obj=_serve))


def _serve(*socket: str) -> NoReturn:
    """Be the resident process, at a path or at the usual one."""
    from cni_hostport.resident.process import serve

    try:
        serve(run, *socket)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says that SIGINT ended it
    except OSError as error:
        sys.exit(escaped(f"Error: cannot {' '.join(('serve', *socket))}: {error.strerror or error}"))


if __name__ == "__main__":
    main()
