"""Takes this plugin off a node when no container needs it.

Its configuration goes first, then its executable and installations, the files that it made for pods, and its table.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from errno import EBUSY, EEXIST
from sys import byteorder
from typing import TYPE_CHECKING

from cni_hostport.config import NetworkConfig
from cni_hostport.dynamic_ports import pod_files
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.kernel import interfaces, localnet
from cni_hostport.libcni import cache, directory
from cni_hostport.libcni.conflist import PLUGIN
from cni_hostport.lookup import Lookup
from cni_hostport.names import FAMILY, LOCALNET, MAPS, TABLE
from cni_hostport.nf_tables import delete_table, get_table
from cni_hostport.operate import requests, sysctls
from cni_hostport.operate.arguments import sentence
from cni_hostport.operate.node import configuration_directory, installations, root_directory
from cni_hostport.operate.node.configuration_directory import Directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cni_hostport.log import Log

INTERVAL = 1  # seconds between looks at the caches
QUIET = 3  # seconds without a container: a call that began before has reached the cache by then
NAMED = 10  # attachments at most, in one line
BY_HAND = f"'nft delete table {FAMILY} {TABLE}' removes it"


def uninstall(
    root: Path,
    bin_dir: Path,
    lib_dir: Path,
    conf_dir: Path,
    caches: Sequence[Path],
    *,
    log: Log,
    force: bool = False,
    wait: bool = False,
) -> None:
    """Remove what ``installation`` and ``configuration`` made; the directories of the node are below ``root``.

    With ``wait``, wait until no container needs the plugin; with ``force``, do not ask for that. Raises ``OSError``,
    which names containers or a path, if it has to stay.
    """
    NetworkConfig.parse({})  # builds the validators, which otherwise is left to their first use
    with root_directory.inside(root):
        _refuse_others_executable(bin_dir, lib_dir)
        if not force:
            _refuse_while_configured(conf_dir)
            if not wait:
                _refuse_while_needed(bin_dir, caches)
        configuration_directory.remove(conf_dir, log)
        if not force:
            for path in caches:
                if not directory.exists(path):
                    log(f"There is no cache of a runtime in {path}.")
            if wait:
                _await_quiet(conf_dir, caches, log)
            else:
                _refuse_newcomers(bin_dir, conf_dir, caches)
        _remove_files(bin_dir, lib_dir, log)
        with suppress(FileNotFoundError):
            shutil.rmtree(pod_files.TOP)
        log(f"Removed hostport from {bin_dir} and {lib_dir}.")
        _remove_table(log)


def _refuse_others_executable(bin_dir: Path, lib_dir: Path) -> None:
    place, installation = installations.executable(bin_dir), installations.current(bin_dir, lib_dir)
    if installation and not (place.is_symlink() and installation.parent == lib_dir):
        reason = f"it is of the installation in {installation}, which stays: 'hostport node install' did not make it"
        raise OSError(EEXIST, reason, str(place))


def _refuse_while_configured(conf_dir: Path) -> None:
    """Refuse while a configuration of somebody else's has this plugin: it would fail all pods."""
    if not conf_dir.is_dir():
        return
    configurations = Directory(conf_dir)
    for name in configurations.look().others:
        try:
            uses_this = configurations.read(name).has_hostport
        except (OSError, ValueError):
            continue  # no runtime can use it either
        if uses_this:
            reason = f"it has the plugin {PLUGIN}, without which all pods fail: change it first"
            raise OSError(EBUSY, reason, str(conf_dir / name))


def _needing(caches: Sequence[Path]) -> Iterator[str]:
    """Yield names of the attachments whose DEL will be this plugin's; raises ``OSError`` if a cache cannot be read."""
    for path in directory.entries(caches):
        try:
            call = cache.read(path)
        except ValueError as error:
            # libcni leaves empty files after a crash
            yield f"whoever {path} is of (it cannot be read: {error}; if that container is gone, remove the file)"
        else:
            if call:
                yield requests.name(call)


def _listed(names: Sequence[str]) -> str:
    rest = f", and {len(names) - NAMED} others" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def _refuse_while_needed(bin_dir: Path, caches: Sequence[Path]) -> None:
    names = list(_needing(caches))
    if names:
        reason = (
            f"it is needed by {_listed(names)}. Delete these first; or use --wait, with which new pods do without this"
            " plugin; or --force, with which the end of these fails"
        )
        raise OSError(EBUSY, reason, str(installations.executable(bin_dir)))


def _ours(conf_dir: Path) -> list[Path]:
    """Return the network configurations that this program has made."""
    if not conf_dir.is_dir():
        return []
    return [conf_dir / name for name in Directory(conf_dir).look().ours]


def _refuse_newcomers(bin_dir: Path, conf_dir: Path, caches: Sequence[Path]) -> None:
    """Refuse if a container came while the configuration went, or that came back."""
    time.sleep(QUIET)
    for path in _ours(conf_dir):
        raise OSError(EBUSY, "it is there again: end what keeps it there first, the DaemonSet", str(path))
    _refuse_while_needed(bin_dir, caches)


def _await_quiet(conf_dir: Path, caches: Sequence[Path], log: Log) -> None:
    """Wait until no container needs the plugin, while what keeps the configuration there may still be ending."""
    number, quiet_since = 0, time.monotonic()
    while True:
        names = list(_needing(caches))
        if len(names) != number:
            log(f"Waiting for the end of {_listed(names)}" if names else "No container is left")
        came_back = _ours(conf_dir)
        if came_back:
            configuration_directory.remove(conf_dir, log)
        if names or came_back:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= QUIET:
            return
        number = len(names)
        time.sleep(INTERVAL)


def _remove_files(bin_dir: Path, lib_dir: Path, log: Log) -> None:
    if lib_dir.is_dir():
        with installations.locked(lib_dir):
            _remove_executable(bin_dir)
            installations.clear(lib_dir)
            for installation in installations.all_in(lib_dir):
                if installations.serves_elsewhere(installation, bin_dir):
                    log(f"{installation} stays: an executable in another directory leads to it")
                else:
                    installations.remove(installation)
            with suppress(OSError):
                lib_dir.rmdir()  # only if nothing else is in it
    else:
        _remove_executable(bin_dir)


def _remove_executable(bin_dir: Path) -> None:
    with suppress(FileNotFoundError):
        (bin_dir / installations.LINK).unlink()
    with suppress(FileNotFoundError):
        installations.executable(bin_dir).unlink()


def _remove_table(log: Log) -> None:
    """Remove the table of this network namespace if nobody needs it, after closing what it guards."""
    try:
        lookup = Lookup()
        if lookup.ask(get_table()) == [None]:
            return
        if any(lookup.members(name) for name in MAPS):
            log(f"The table {FAMILY} {TABLE} stays: host ports are in it. When nobody needs them, {BY_HAND}.")
            return
        guarded = [int.from_bytes(key, byteorder) for key in lookup.members(LOCALNET) or ()]
        if guarded:
            (sysctls.SYSCTLS / sysctls.INTERFACES).stat()  # where it is missing, each interface would be taken for gone
        for interface in guarded:
            localnet.close(lookup, interface, log)
        still_open = [interface for interface in guarded if localnet.is_open(interface)]
        if lookup.commit(delete_table()):
            log(f"Removed the table {FAMILY} {TABLE}.")
        for name in map(interfaces.name, still_open):
            log(
                f"net.ipv4.conf.{name}.route_localnet is 1, which somebody else may need; without the table, neighbours"
                " there can reach the node's 127.0.0.1. If nobody needs it, set it to 0."
            )
    except (CNIError, NFTError, OSError) as error:
        reason = error.refusals[0][0] if isinstance(error, NFTError) else sentence(error)
        log(
            f"The table {FAMILY} {TABLE} may be left in the node's network namespace ({reason}). There, with"
            f" CAP_NET_ADMIN, {BY_HAND}."
        )
