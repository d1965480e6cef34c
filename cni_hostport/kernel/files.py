"""What others write, and a command of the operator's reads: caches, network configurations, what a pod has in /proc.

A name there can be anything by the time that it is opened. Nothing is waited for, and nothing is read without an end.
"""

from __future__ import annotations

import os
from errno import EFBIG, EINVAL
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# bytes: libcni's entry of a container with 200,000 mappings; the mounts of a node with 50,000 containers
LARGEST = 16 << 20
CHUNK = 1 << 20  # bytes


def read(path: Path) -> bytes:
    """Return what is in a regular file.

    Raises ``OSError`` if it cannot be read, is of another kind, or is larger than ``LARGEST``: with a reason that is a
    sentence's end. Only ``FileNotFoundError`` means that it is not there.
    """
    # O_NONBLOCK: a FIFO that nobody writes to is opened at once
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(EINVAL, "it is not a regular file", str(path))
        parts, size = [], 0
        while part := os.read(descriptor, CHUNK):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                raise OSError(EFBIG, f"it is larger than {LARGEST >> 20} MiB", str(path))
        return b"".join(parts)
    finally:
        os.close(descriptor)


def text(path: Path) -> str:
    """Return what ``read`` does as text, in which what is not UTF-8 can be told from the rest."""
    return read(path).decode(errors="surrogateescape")


def names(directory: Path) -> Iterator[Path]:
    """Yield what is in a directory and is none itself, in the order of the names; raises ``OSError``."""
    for name in sorted(os.listdir(directory)):
        path = directory / name
        try:
            if S_ISDIR(path.stat().st_mode):
                continue
        except OSError:
            pass  # whoever opens it finds out why
        yield path
