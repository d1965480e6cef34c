"""The process: hands the real environment and standard streams to the protocol's edge."""

from __future__ import annotations

import gc
import os
import sys

from cni_hostport import skel
from cni_hostport.text import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn


class _Stdin:
    """File descriptor 0, opened only when it is read: VERSION does not need it, and it can be closed."""

    def __init__(self, already_read: bytes | None) -> None:
        self._already_read = already_read

    def read(self) -> bytes:
        if self._already_read is not None:
            return self._already_read
        with open(0, "rb", closefd=False) as stream:
            return stream.read()


def run(environ: Mapping[str, str], stdin: bytes | None = None) -> int:
    """Run one CNI command on this process's standard streams and return its exit status.

    ``stdin`` is standard input where that has been read already.
    """
    status = skel.run(environ, _Stdin(stdin), sys.stdout, sys.stderr)
    sys.stderr.flush()
    return status


def main(stdin: bytes | None = None) -> NoReturn:
    """Run one CNI command and exit with its status; or, without one, what a person asks for on the command line."""
    if sys.argv[1:] and not os.environ.get("CNI_COMMAND"):
        _operate(sys.argv[1:])
    _keep_small()
    gc.disable()  # the process ends before that could pay
    status = run(os.environ, stdin)
    if skel.AFTERWARDS:
        from cni_hostport import afterwards

        afterwards.fork(skel.AFTERWARDS)
    os._exit(status)  # everything is said: taking the modules down in order would only cost time


def _keep_small() -> None:
    sys.modules["psutil"] = None  # type: ignore[assignment]  # pyroute2 imports it, for what is not used here


def _operate(arguments: list[str]) -> NoReturn:
    if arguments[0] == "serve" and len(arguments) <= 2 and not arguments[-1].startswith("-"):  # noqa: PLR2004 - SOCKET
        _keep_small()
        from cni_hostport.resident import serve

        try:
            serve(*arguments[1:])
        except KeyboardInterrupt:
            sys.exit(130)  # as a shell says that SIGINT ended it
        except OSError as error:
            sys.exit(escaped(f"Error: cannot {' '.join(arguments)}: {error.strerror}"))
    if sys.stdout is None:  # it was closed, and is to be no other file that is opened
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    from cni_hostport.operate.cli import main as operate

    sys.exit(operate(prog_name="hostport"))


if __name__ == "__main__":
    main()
