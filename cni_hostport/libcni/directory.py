"""The directories that hold libcni's cache, a file for each attachment: ``libcni.cache`` reads these."""

from __future__ import annotations

from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING

from cni_hostport.kernel import files

if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT = Path("/var/lib/cni")
RESULTS = "results"


def exists(directory: Path) -> bool:
    """Tell whether a directory is that of a cache; raises ``OSError`` if that cannot be told."""
    try:
        return S_ISDIR((directory / RESULTS).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def entries(directories: Iterable[Path]) -> list[Path]:
    """Return the files of caches, each cache being the directory that holds ``results``.

    None of a cache that is not there; raises ``OSError`` if one cannot be looked at.
    """
    return sorted(path for directory in directories if exists(directory) for path in files.names(directory / RESULTS))
