"""What is installed on a node: versions side by side in one directory, and the executable that leads to one of them.

The executable is a symbolic link. An installation is a copy of a bundle, whole since it got its name: while it is made,
and while it is removed, it has a temporary one. All paths are those of the root directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from errno import EEXIST
from pathlib import Path
from typing import TYPE_CHECKING

from cni_hostport.kernel import files
from cni_hostport.operate.node.bundle import EXECUTABLE, MARKER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cni_hostport.log import Log

NEW, OLD = ".new-", ".old-"  # what is being made, and what is being removed
PACKAGED = "packaged"  # the link by which the packages of conf/packages know their version
LINK = ".hostport.new"  # a link that is about to take the executable's place
# of executables that install.sh makes, the native one and the one in Python
NATIVE = re.compile(rb"^native executable of (/.*)/bin/hostport$", re.MULTILINE)
PYTHON = re.compile(rb"\A#!(/.*)/bin/python.*\n(?s:.*)^from cni_hostport", re.MULTILINE)
CALL_BEGINS_WITHIN = 60  # seconds from the moment in which a runtime looks up the executable
PROC = Path("/proc")


def executable(bin_dir: Path) -> Path:
    """Return where a runtime finds the plugin."""
    return bin_dir / EXECUTABLE.name


def current(bin_dir: Path, lib_dir: Path) -> Path | None:
    """Return the installation that the executable belongs to, ``None`` if there is no executable.

    Raises ``OSError`` if what is in its place is not of this program's making, nor of install.sh's.
    """
    path = executable(bin_dir)
    if os.path.lexists(lib_dir / PACKAGED):
        raise OSError(EEXIST, "it is of a package of this system, which has to be removed first", str(path))
    if path.is_symlink():
        target = Path(os.path.normpath(bin_dir / path.readlink()))
        installation = target.parent.parent
        if target.parts[-2:] == EXECUTABLE.parts and (
            installation.parent == lib_dir or (installation / MARKER).is_file()
        ):
            return installation
    elif not os.path.lexists(path):
        return None
    elif path.is_file():
        content = files.read(path)
        found = NATIVE.search(content) or PYTHON.search(content)
        if found:
            return Path(os.fsdecode(found[1]))
    raise OSError(EEXIST, "it is not of this program's making: move it away first", str(path))


@contextmanager
def locked(lib_dir: Path, *, waits: bool = True) -> Iterator[None]:
    """Run the block while nobody else changes what is in a directory, which is made if it is not there.

    Raises ``OSError``: without ``waits``, ``BlockingIOError`` if somebody does.
    """
    while True:
        lib_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lib_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, lib_dir):  # else who held the lock before has removed it
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def temporary(lib_dir: Path, prefix: str) -> Path:
    """Make an empty directory with a name that no installation has."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=lib_dir))


def clear(lib_dir: Path) -> None:
    """Remove what others began to make or to remove, and did not end; raises ``OSError``."""
    for path in lib_dir.iterdir():
        if path.name.startswith((NEW, OLD)):
            shutil.rmtree(path)


def remove(installation: Path) -> None:
    """Remove an installation: all of it as far as its name tells, at once; raises ``OSError``."""
    old = temporary(installation.parent, OLD)
    installation.rename(old)
    shutil.rmtree(old)


def switch(bin_dir: Path, installation: Path) -> None:
    """Have the executable lead to an installation, by a rename: a runtime finds the old one or the new one."""
    place, target = executable(bin_dir), installation / EXECUTABLE
    if place.is_symlink() and place.readlink() == target:
        return
    if bin_dir not in bin_dirs(installation):
        with (installation / MARKER).open("a") as marker:
            marker.write(f"{bin_dir}\n")
    os.utime(installation)  # the order in which versions were in use
    bin_dir.mkdir(parents=True, exist_ok=True)
    staged = bin_dir / LINK
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    staged.replace(place)


def bin_dirs(installation: Path) -> list[Path]:
    """Return the directories whose executables have led to an installation."""
    return [Path(line) for line in files.text(installation / MARKER).splitlines() if line]


def all_in(lib_dir: Path) -> list[Path]:
    """Return the installations in a directory, the one that came into use last first."""
    found = [path.parent for path in lib_dir.glob(f"*/{MARKER}") if not path.parent.name.startswith((NEW, OLD))]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def serves_elsewhere(installation: Path, bin_dir: Path) -> bool:
    """Tell whether an executable in another directory leads to an installation."""
    links = (executable(path) for path in bin_dirs(installation) if path != bin_dir)
    return any(link.is_symlink() and link.readlink() == installation / EXECUTABLE for link in links)


def remove_unused(bin_dir: Path, lib_dir: Path, log: Log) -> None:
    """Remove the installations that no executable leads to and no process uses.

    The one before stays as long as a runtime may be about to start it; and where it cannot be told who uses it.
    """
    place = executable(bin_dir)
    since_switch = time.time() - place.lstat().st_mtime
    others = [path for path in all_in(lib_dir) if path / EXECUTABLE != place.readlink()]
    used = names_in_use([path.name for path in others])
    for number, path in enumerate(others):
        is_previous = number == 0 and (used is None or since_switch < CALL_BEGINS_WITHIN)
        if is_previous or (used and path.name in used) or serves_elsewhere(path, bin_dir):
            continue
        try:
            remove(path)
        except OSError as error:
            log(f"{error.filename or path} stays, and nothing uses it: {error.strerror}")


def names_in_use(names: Collection[str]) -> set[str] | None:
    """Return which of these installations' names processes of the node use; ``None`` where its processes are not seen.

    They are seen where the node has mounted ``/proc``. Who may not see which executable a process runs still sees its
    command line.
    """
    if not (PROC / "1" / "cmdline").exists():
        return None
    used = set()
    for process in filter(str.isdecimal, os.listdir(PROC)):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            command = (PROC / process / "cmdline").read_bytes()
            try:
                program = os.fsencode((PROC / process / "exe").readlink())
            except PermissionError:
                program = b""
                if os.path.basename(command.partition(b"\0")[0]) == os.fsencode(EXECUTABLE.name):
                    used |= {*names}  # a native executable, of whichever
            used |= {name for name in names if any(f"/{name}/".encode() in text for text in (command, program))}
    return used
