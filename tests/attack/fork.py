"""Calls in forks of this process: as fast as in-process, and whatever the library does to its process can be seen."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from attack.answer import Answer

from cni_hostport import plugin, skel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

    from lab import Namespace


def call(node: Namespace, environ: Mapping[str, str], stdin: bytes) -> Answer:
    """Run one CNI command on a node, and what it leaves to be done after its answer."""

    def run() -> int:
        status = skel.run(environ, io.BytesIO(stdin), sys.stdout, sys.stderr, plugin.OPERATIONS.__getitem__)
        for work in skel.AFTERWARDS:
            work()
        return status

    return forked(node, run)


def forked(node: Namespace, run: Callable[[], int]) -> Answer:
    """Run a function, which returns an exit status, in a fork of this process on a node."""
    stdout, stderr = (os.memfd_create(name) for name in ("stdout", "stderr"))
    try:
        child = os.fork()
        if not child:
            _end(node, run, stdout, stderr)
        _, waited = os.waitpid(child, 0)
        return Answer(os.waitstatus_to_exitcode(waited), _content(stdout), _content(stderr))
    finally:
        os.close(stdout)
        os.close(stderr)


def _end(node: Namespace, run: Callable[[], int], stdout: int, stderr: int) -> NoReturn:
    status = 70
    try:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = (open(stream, "w", errors="surrogateescape") for stream in (1, 2))  # noqa: SIM115
        with node.inside():
            status = run()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - nothing of it may reach the test
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(status)


def _content(stream: int) -> bytes:
    return os.pread(stream, os.fstat(stream).st_size, 0)
