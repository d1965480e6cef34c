"""The resident process of the warm start, and executables that call it at a socket of the test's own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import pytest
from go_tools import ROOT
from lab import LAUNCHER, require

from cni_hostport.handover import TAKEN

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator, Sequence

    Scenario = Callable[[socket.socket], None]
    Test = TypeVar("Test", bound=Callable[..., None])

MODULES = ("from cni_hostport.__main__ import run", "from cni_hostport.resident import process as resident")
PATIENT = ("import cni_hostport.handover as h", "h.UNTIL_TAKEN = 20")  # of a caller, until its call is taken
NEVER_COLD = "; ".join((*PATIENT, 'sys.modules["cni_hostport.skel"] = None'))
SLOW_CALLERS = "resident.REQUEST_TIMEOUT = 60"  # of a resident process, for what it is asked
# notes which commands children run, in a file
NOTES = """
call = run
def noted(environ):
    with open("{notes}", "a") as out:
        out.write(environ["CNI_COMMAND"])
    return call(environ)
run = noted
"""


def eventually(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Wait until something is so, and tell whether it came to that."""
    until = time.monotonic() + seconds
    while not (is_so := bool(condition())) and time.monotonic() < until:
        time.sleep(0.02)
    return is_so  # by then it may be so no longer


class Resident:
    """The resident process, at a socket in a directory of the test's; lines of Python alter it before, or ``run``."""

    def __init__(self, path: Path, *lines: str) -> None:
        self.path = path
        altered = "\n".join([*MODULES, *lines, f'resident.serve(run, "{path}")'])
        self.command = [sys.executable, "-Ic", altered] if lines else [*LAUNCHER, "serve", str(path)]
        self.log = path.with_suffix(".log")
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CNI_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=environment, stderr=log)
        if not eventually(lambda: self.path.exists() and sum(map(_waits, self.children)) > 1):
            raise AssertionError(self.log.read_text())

    @property
    def children(self) -> list[int]:
        """The process IDs of its children."""
        number = self.process.pid
        return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]

    @property
    def family(self) -> list[int]:
        return [self.process.pid, *self.children]

    def kill(self) -> None:
        """Kill it, but not its children."""
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to its children."""
        for process in self.family:
            with suppress(ProcessLookupError):  # a child ends when its call has
                os.kill(process, number)


def _waits(child: int) -> bool:
    """Tell whether a child waits for a call, as opposed to one that is being prepared or has another purpose."""
    try:
        return any(os.readlink(file) == "anon_inode:[eventpoll]" for file in Path(f"/proc/{child}/fd").iterdir())
    except OSError:  # it has ended
        return False


PYTHON, NATIVE, SANITIZED = "Python", "native", "native, with sanitizers"
COMPILER = {
    NATIVE: ("-O2", "-static"),
    SANITIZED: ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}
WARNINGS = ("-std=gnu11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
KINDS = (PYTHON, NATIVE, SANITIZED)
kind = PYTHON  # of the executables that ``launcher`` makes


def with_executables(*kinds: str) -> Callable[[Test], Test]:
    """Return a decorator that has a test run with each of these kinds of executables, all kinds if none is named."""
    marks = pytest.mark.usefixtures("kind"), pytest.mark.parametrize("kind", kinds or KINDS, indirect=True)
    return lambda test: marks[0](marks[1](test))


def launcher(directory: Path, path: Path, *lines: str) -> list[str]:
    """Return an executable that calls the resident process at ``path``, and has these lines of Python before that."""
    name = directory / f"hostport-{len(list(directory.glob('hostport-*')))}"
    text = "\n".join([f"#!{sys.executable} -I", "import sys", *lines, "from cni_hostport import handover"])
    name.write_text(f'{text}\nhandover.main("{path}")\n')
    name.chmod(0o755)
    return [str(name)] if kind == PYTHON else [str(compiled(name, path, *lines))]


def compiled(python: Path, path: Path, *lines: str) -> Path:
    """Compile the native executable of a Python executable, with the constants as lines of Python alter them."""
    require(shutil.which("cc"), "needs a C compiler")
    asks = "\n".join(
        ["import sys", *lines, "from cni_hostport import native", "print(*native.options(*sys.argv[1:]), sep='\\n')"]
    )
    asked = subprocess.run([sys.executable, "-Ic", asks, python, path], capture_output=True, text=True, check=True)
    name = python.with_name(f"native-{python.name}")
    options = [*WARNINGS, *COMPILER[kind], *asked.stdout.splitlines()]
    subprocess.run(["cc", *options, "-o", name, ROOT / "cni_hostport" / "handover.c"], check=True)
    return name


@contextmanager
def server(path: Path, scenario: Scenario) -> Iterator[None]:
    """Do with every connection that is made to ``path`` what the scenario does."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(path))
    listening.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            scenario(connection)
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def request(connection: socket.socket) -> list[int]:
    """Receive a call, and return its descriptors."""
    return socket.recv_fds(connection, 1 << 18, 6)[1]


@contextmanager
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Have a process that can be taken for the one that runs a call."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process
        finally:
            process.kill()


def take(connection: socket.socket, process: int) -> None:
    """Say that this process takes the call."""
    descriptor = os.pidfd_open(process)
    socket.send_fds(connection, [TAKEN], [descriptor])
    os.close(descriptor)


def run(executable: Sequence[str], stdin: bytes, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run an executable in this namespace; ``CNI_*`` variables are given without the prefix."""
    environment = {f"CNI_{name}": value for name, value in variables.items()}
    return subprocess.run(executable, input=stdin, env=environment, capture_output=True, check=False, timeout=180)
