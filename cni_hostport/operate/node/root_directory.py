"""The root directory of a node, for a program whose own files are elsewhere: in a container, with the node's mounted.

Symbolic links on the node can be absolute, so paths have to be resolved where the node's root directory is the root.
Within it, this program's own modules cannot be found, and what is found by their names is not theirs. So none is
imported there: who enters has imported all that it needs.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import NoReturn


@contextmanager
def inside(root: Path) -> Iterator[None]:
    """Run the block with another root directory, which is the working directory too; raises ``OSError``."""
    if os.path.samefile(root, "/"):
        yield
        return
    finders = sys.meta_path[:]
    own, work = (os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in ("/", "."))
    try:
        os.chroot(root)
        os.chdir("/")
        sys.meta_path[:] = [_End()]
        yield
    finally:
        sys.meta_path[:] = finders
        os.fchdir(own)
        os.chroot(".")
        os.fchdir(work)
        os.close(own)
        os.close(work)


class _End:
    """Finds no module, and asks nobody else."""

    def find_spec(self, name: str, *_: object) -> NoReturn:
        msg = f"{name} was not imported before the root directory was changed"
        raise ImportError(msg)
