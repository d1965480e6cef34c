"""A bundle: a directory that holds all that this plugin needs to run, wherever it lies; and its copies.

``conf/bundle`` makes it. It is read by a descriptor, so that it can be copied into another root directory.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL, ENOENT, ENOEXEC
from pathlib import Path
from stat import S_IMODE, S_ISDIR, S_ISLNK, S_ISREG
from typing import TYPE_CHECKING

from cni_hostport import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

MARKER = ".hostport-installation"  # in every installation, install.sh's too; names the directories that it serves
EXECUTABLE = Path("bin", "hostport")
DIGEST = "DIGEST"  # in every bundle, of its names and contents; an environment that install.sh made has none
WORKS_WITHIN = 60  # seconds for the first start on a slow disk
CHUNK = 1 << 20  # bytes
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Entry:
    """A file, directory or symbolic link of a bundle; ``size`` is in bytes, and 0 but for files."""

    path: str
    mode: int
    size: int
    link: str


@dataclass(frozen=True)
class Bundle:
    """An open bundle, and the name of its version among installations."""

    directory: int
    entries: frozenset[Entry]
    name: str


def own() -> Path:
    """Return the bundle from which this program runs; raises ``OSError`` if it runs from none."""
    path = Path(sys.prefix)
    if not (path / DIGEST).is_file():
        raise OSError(
            ENOENT, "this program does not run from a bundle, which alone can be installed on a node", str(path)
        )
    return path


def name() -> str:
    """Return the name, among installations, of the bundle from which this program runs; raises ``OSError``."""
    return _name((own() / DIGEST).read_text())


def _name(digest: str) -> str:
    return f"{__version__}-{digest.strip()}"


@contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """Open a bundle for reading; raises ``OSError``."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with open(os.open(DIGEST, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)) as file:
            yield Bundle(directory, _entries(directory), _name(file.read()))
    finally:
        os.close(directory)


def _entries(directory: int) -> frozenset[Entry]:
    """Return what is below a directory, but for the marker, to which each installation adds; raises ``OSError``."""
    found = set()
    for place, directories, names, descriptor in os.fwalk(".", dir_fd=directory, onerror=_raise):
        for name in directories + names:
            path = os.path.normpath(os.path.join(place, name))
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            link = os.readlink(name, dir_fd=descriptor) if S_ISLNK(status.st_mode) else ""
            if not (link or S_ISDIR(status.st_mode) or S_ISREG(status.st_mode)):
                raise OSError(EINVAL, "it is neither a file nor a directory nor a link", path)
            found.add(Entry(path, status.st_mode, status.st_size if S_ISREG(status.st_mode) else 0, link))
    return frozenset(entry for entry in found if entry.path != MARKER)


def _raise(error: OSError) -> None:
    raise error


def _ordered(entries: frozenset[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.path)  # a directory comes before what is in it


def _file(directory: int, entry: Entry) -> BinaryIO:
    return open(os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "rb")


def is_whole_at(bundle: Bundle, target: Path) -> bool:
    """Tell whether all of a bundle is in a directory, as far as names, kinds, modes and sizes tell."""
    try:
        directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return (target / MARKER).is_file() and bundle.entries <= _entries(directory)
    except OSError:
        return False
    finally:
        os.close(directory)


def copy(bundle: Bundle, target: Path) -> None:
    """Copy a bundle into a directory that is empty, down to the disk; raises ``OSError`` naming a path."""
    path = target
    try:
        target.chmod(0o755)
        for entry in _ordered(bundle.entries):
            path = target / entry.path
            if S_ISDIR(entry.mode):
                path.mkdir()
            elif entry.link:
                path.symlink_to(entry.link)
            else:
                _copy_file(bundle.directory, entry, path)
        for entry in bundle.entries:
            path = target / entry.path
            if S_ISDIR(entry.mode):
                path.chmod(S_IMODE(entry.mode))
        path = target / MARKER  # last: what has it is whole
        path.touch()
        synchronize(target)
    except OSError as error:
        raise OSError(error.errno, f"cannot write it: {error.strerror}", str(path)) from error


def _copy_file(directory: int, entry: Entry, path: Path) -> None:
    with _file(directory, entry) as source, path.open("xb") as file:
        shutil.copyfileobj(source, file, CHUNK)
        file.flush()
        os.fchmod(file.fileno(), S_IMODE(entry.mode))
        status = os.fstat(source.fileno())
        # Python takes what it compiled for out of date where the source has another time
        os.utime(file.fileno(), ns=(status.st_mtime_ns, status.st_mtime_ns))


def synchronize(directory: Path) -> None:
    """Have a file system write down all that it was given: one call, where a call for each file takes seconds."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _LIBC.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def try_out(installation: Path) -> None:
    """See that the executable of an installation answers to VERSION; raises ``OSError`` with what it says instead."""
    executable = installation / EXECUTABLE
    try:
        ran = subprocess.run(  # noqa: S603 - what this program has put there
            [executable], env={"CNI_COMMAND": "VERSION"}, input=b"", capture_output=True,
            check=False, timeout=WORKS_WITHIN,
        )  # fmt: skip
        said = (ran.stderr.strip() or ran.stdout.strip()).decode(errors="replace")
        works = ran.returncode == 0 and "supportedVersions" in json.loads(ran.stdout)
    except OSError as error:
        works, said = False, error.strerror or str(error)
    except subprocess.TimeoutExpired:
        works, said = False, f"it takes longer than {WORKS_WITHIN} seconds"
    except ValueError:
        works, said = False, "its answer is not JSON"
    if not works:
        # by which it finds its other files
        missing = "" if Path("/proc/self").exists() else ", and there is no /proc in this root directory"
        reason = f"it does not work on this node: {said or 'it says nothing'}{missing}"
        raise OSError(ENOEXEC, reason, str(executable))
