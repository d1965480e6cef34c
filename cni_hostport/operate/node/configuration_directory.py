"""A directory of network configurations: what is this plugin's in it, what is others', and how ours is written.

Runtimes take the first file in the order of the names' bytes. containerd (go-cni 1.1, ``loadFromConfDir``) then uses it
or none, CRI-O (ocicni) skips what it cannot load. Hidden files and links count like any others for both.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport.kernel import files
from cni_hostport.operate.node.configuration import Configuration

if TYPE_CHECKING:
    from pathlib import Path

    from cni_hostport.log import Log

SUFFIXES = (".conflist", ".conf", ".json")
# The first that fits is ours. It sorts behind multus' 00-multus.conf, so that multus, whenever it comes, finds ours as
# the configuration to hand pods to, and before what others use.
NAMES = (
    "01-hostport.conflist",
    "00-hostport.conflist",
    "00-0-hostport.conflist",
    "0-hostport.conflist",
    "+hostport.conflist",
)
# of no suffix that runtimes know, and in the same directory: containerd does not notice what is moved in from elsewhere
TEMPORARY = ".hostport-"
CILIUM_SUFFIX = ".cilium_bak"
MULTUS_PREFIX = "00-multus"  # multus itself knows its file by this


@dataclass(frozen=True)
class Listing:
    """The names of the files that runtimes look at, in their order; those of ours with their contents."""

    ours: dict[str, bytes]
    others: tuple[str, ...]

    def name_before(self, primary: str, multus: list[str]) -> str | None:
        """Return a name for ours that sorts before the primary's and behind multus', ``None`` if there is none."""
        fitting = (
            name
            for name in NAMES
            if name not in self.others
            and os.fsencode(name) < os.fsencode(primary)
            and all(os.fsencode(name) > os.fsencode(other) for other in multus)
        )
        return next(fitting, None)


class Directory:
    """A directory of network configurations, which may not exist."""

    def __init__(self, path: Path) -> None:
        """Open nothing."""
        self.path = path

    def look(self) -> Listing:
        """Return what is there; raises ``OSError``."""
        with os.scandir(self.path) as entries:
            names = [
                entry.name
                for entry in entries
                if entry.name.endswith(SUFFIXES) and not entry.is_dir(follow_symlinks=False)
            ]
        ours = {name: data for name in NAMES if name in names and (data := self._ours(name)) is not None}
        return Listing(ours, tuple(sorted((name for name in names if name not in ours), key=os.fsencode)))

    def _ours(self, name: str) -> bytes | None:
        """Return the content of a file if this plugin wrote it: an operator, too, may have chosen one of our names."""
        with suppress(OSError, ValueError):
            data = files.read(self.path / name)
            if Configuration.parse(NAMES[0], data).source is not None:
                return data
        return None

    def read(self, name: str) -> Configuration:
        """Read a file as a runtime would.

        Raises ``FileNotFoundError``, or ``ValueError`` with the rest of a sentence that begins with the file's name.
        """
        path = self.path / name
        try:
            return Configuration.parse(name, files.read(path))
        except FileNotFoundError:
            if not path.is_symlink():
                raise
            msg = f"is a link to {os.readlink(path)}, which does not exist"
        except OSError as error:
            msg = f"cannot be read: {error.strerror}"
        raise ValueError(msg)

    def write(self, name: str, data: bytes) -> None:
        """Put a file in its place, whole or not at all; raises ``OSError``."""
        temporary = self.path / f"{TEMPORARY}{os.getpid()}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o644)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.rename(temporary, self.path / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._sync()

    def remove(self, name: str) -> None:
        """Remove a file that was found to be ours; raises ``OSError``, except where it is gone."""
        with suppress(FileNotFoundError):
            os.unlink(self.path / name)
            self._sync()

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove_leftovers(self) -> None:
        """Remove what Cilium renamed of ours, and what was left half written; raises ``OSError``."""
        for name in os.listdir(self.path):
            was_ours = name.endswith(CILIUM_SUFFIX) and name.removesuffix(CILIUM_SUFFIX) in NAMES
            if (was_ours and self._ours(name)) or (name.startswith(TEMPORARY) and name.endswith(".tmp")):
                self.remove(name)


def remove(conf_dir: Path, log: Log) -> list[Path]:
    """Remove this plugin's files from a directory, nobody else's, and return their paths; raises ``OSError``."""
    directory = Directory(conf_dir)
    try:
        listing = directory.look()
    except (FileNotFoundError, NotADirectoryError):
        log(f"{conf_dir} is no directory: there is no network configuration to remove")
        return []
    for name in listing.ours:
        directory.remove(name)
        log(f"{conf_dir / name} is removed")
    directory.remove_leftovers()
    if not listing.ours:
        log(f"{conf_dir} has no network configuration of this plugin")
    elif not listing.others:
        log(f"{conf_dir} now has no network configuration: that of the primary plugin was gone already")
    return [conf_dir / name for name in listing.ours]
