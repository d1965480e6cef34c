"""Files that others write and an operator's command reads: caches, network configurations, files of a pod in /proc.

By the time that such a name is opened, anything can be there. So reading neither waits for a writer nor goes on without
an end.
"""

from __future__ import annotations

import os
from errno import EFBIG, EINVAL
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# libcni's entry of a container with 200,000 mappings; the mounts of a node with 50,000 containers
MAX_BYTES = 16 << 20
CHUNK_BYTES = 1 << 20


def read(path: Path) -> bytes:
    """Return what is in a regular file.

    Raises ``OSError`` if it cannot be read, is of another kind, or is larger than ``MAX_BYTES``. The error's reason can
    end a sentence. Only ``FileNotFoundError`` means that the file is not there.
    """
    # O_NONBLOCK: a FIFO that nobody writes to is opened at once
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(EINVAL, "it is not a regular file", str(path))
        parts, size = [], 0
        while part := os.read(descriptor, CHUNK_BYTES):
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise OSError(EFBIG, f"it is larger than {MAX_BYTES >> 20} MiB", str(path))
        return b"".join(parts)
    finally:
        os.close(descriptor)


def text(path: Path) -> str:
    """Return what ``read`` does as text; bytes that are not UTF-8 become lone surrogates."""
    return read(path).decode(errors="surrogateescape")


def names(directory: Path) -> Iterator[Path]:
    """Yield what is in a directory, but no directories, in the order of the names; raises ``OSError``."""
    for name in sorted(os.listdir(directory)):
        path = directory / name
        try:
            if S_ISDIR(path.stat().st_mode):
                continue
        except OSError:
            pass  # whoever opens it finds out why
        yield path
