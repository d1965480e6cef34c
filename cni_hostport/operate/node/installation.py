"""Puts a bundle onto a node, whole or not at all, and in the place of the version before."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from cni_hostport.operate.node import bundle, installations, root_directory

if TYPE_CHECKING:
    from pathlib import Path

    from cni_hostport.log import Log
    from cni_hostport.operate.node.bundle import Bundle

MASK = 0o022  # who runs containers need not be root


def install(source: Path, root: Path, bin_dir: Path, lib_dir: Path, log: Log) -> None:
    """Install the bundle in a directory; those of the node are below ``root``.

    Raises ``OSError`` naming a path, and what was installed then is as it was.
    """
    mask = os.umask(MASK)
    try:
        with bundle.opened(source) as opened, root_directory.inside(root):
            _install(opened, bin_dir, lib_dir, log)
    finally:
        os.umask(mask)


def tidy(bin_dir: Path, lib_dir: Path, log: Log) -> None:
    """Remove versions that are out of use since the installation.

    Raises ``OSError``: ``BlockingIOError`` while somebody installs.
    """
    if installations.executable(bin_dir).is_symlink() and lib_dir.is_dir():
        with installations.locked(lib_dir, waits=False):
            installations.clear(lib_dir)
            installations.remove_unused(bin_dir, lib_dir, log)


def _install(opened: Bundle, bin_dir: Path, lib_dir: Path, log: Log) -> None:
    previous = installations.current(bin_dir, lib_dir)
    target = lib_dir / opened.name
    with installations.locked(lib_dir):
        installations.clear(lib_dir)
        if not (bundle.is_whole_at(opened, target) and _works(target)):
            _copy(opened, target)
            log(f"Copied to {target}")
        installations.switch(bin_dir, target)
        installations.remove_unused(bin_dir, lib_dir, log)
    log(f"Installed {installations.executable(bin_dir)}, which leads to {target}")
    if previous and previous.parent != lib_dir:
        log(f"The executable before was of the installation in {previous}, which stays as it is")


def _works(installation: Path) -> bool:
    try:
        bundle.try_out(installation)
    except OSError:
        return False
    return True


def _copy(opened: Bundle, target: Path) -> None:
    new = installations.temporary(target.parent, installations.NEW)
    try:
        bundle.copy(opened, new)
        bundle.try_out(new)
        if target.exists():
            installations.remove(target)  # it is damaged
        new.rename(target)
        bundle.synchronize(target.parent)
    except OSError:
        with suppress(OSError):  # else the next installation does it
            installations.clear(target.parent)
        raise
