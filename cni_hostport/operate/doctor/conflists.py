"""The network configurations of runtimes, as far as they are about this plugin."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cni_hostport import availability
from cni_hostport.config import NetworkConfig
from cni_hostport.dynamic_ports import keys
from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel import files
from cni_hostport.libcni.conflist import PLUGIN, Conflist
from cni_hostport.operate.statements import note, problem
from cni_hostport.skel import VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cni_hostport.operate.statements import Statement

SUFFIXES = {".conf", ".conflist", ".json"}
PORTMAP, BRIDGE, DEFAULT_BRIDGE = "portmap", "bridge", "cni0"
CAPABILITIES = '"capabilities": {"portMappings": true}'


def files_in(directory: Path) -> list[Path]:
    """Return the configuration files of a directory in the order in which runtimes look at them; raises ``OSError``.

    Source: containerd/go-cni, ``opts.go`` (``loadFromConfDir``).
    """
    return [path for path in files.names(directory) if path.suffix in SUFFIXES]


def bridges(directories: Sequence[Path]) -> set[str]:
    """Return the names of the bridges that configurations make for pods; those that cannot be read make none."""
    plugins = (plugin for _, conflist in readable(directories) for plugin in conflist.plugins)
    return {str(plugin.get("bridge") or DEFAULT_BRIDGE) for plugin in plugins if plugin.get("type") == BRIDGE}


def readable(directories: Sequence[Path]) -> Iterator[tuple[Path, Conflist]]:
    """Yield the configurations in directories, without what cannot be read, which ``statements`` tells."""
    for directory in directories:
        try:
            paths = files_in(directory)
        except OSError:
            continue
        for path in paths:
            with suppress(OSError, ValueError):
                yield path, Conflist.parse(files.read(path))


def statements(directories: Sequence[Path]) -> Iterator[Statement]:
    """Say what is wrong with the configurations in directories, as far as they are about this plugin."""
    uses, searched = 0, []
    for directory in directories:
        try:
            paths = files_in(directory)
        except OSError as error:
            yield note(f"{directory} cannot be read: {error.strerror}", "What runtimes are told is not known.")
            continue
        searched.append(str(directory))
        parsed: list[tuple[Path, Conflist]] = []
        for path in paths:
            try:
                parsed.append((path, Conflist.parse(files.read(path))))
            except (OSError, ValueError) as error:
                yield problem(
                    f"{path} is not a network configuration: {_reason(error)}",
                    "Runtimes skip it, or do not start pods at all.",
                    "Correct the file, or take it away.",
                )
        with_hostport = [(path, conflist) for path, conflist in parsed if PLUGIN in conflist.types]
        uses += len(with_hostport)
        for path, conflist in with_hostport:
            yield from _conflist_statements(path, conflist)
        if with_hostport and with_hostport[0] != parsed[0]:
            yield note(
                f"{parsed[0][0]} comes before {with_hostport[0][0]}, and does not use hostport",
                "Most runtimes use the first file by its name only: then hostport is never called.",
                f"If so, give {with_hostport[0][0].name} a name that sorts before {parsed[0][0].name}.",
            )
    if searched and not uses:
        yield note(
            f"no network configuration in {', '.join(searched)} uses hostport",
            "Runtimes do not call it, and no container is given host ports by it.",
            'Add {"type": "hostport", ' + CAPABILITIES + "} to the plugins of one.",
        )


def _conflist_statements(path: Path, conflist: Conflist) -> Iterator[Statement]:
    config = conflist.plugin() or {}
    yield from _capability_statements(path, config)
    if conflist.cni_version and conflist.cni_version not in VERSIONS:
        yield problem(
            f"{path}: hostport does not know cniVersion {conflist.cni_version!r}",
            f"Every pod fails with code {Code.INCOMPATIBLE_VERSION:d}.",
            f"Use one of {', '.join(VERSIONS)} that all plugins of the list know.",
        )
    if PORTMAP in conflist.types:
        yield problem(
            f"{path} has portmap beside hostport",
            "Both map every port, and portmap fails every pod that has a host port 0.",
            "Remove portmap's object.",
        )
    if conflist.types[0] == PLUGIN:
        yield problem(
            f"{path}: hostport is the first plugin",
            "It needs the addresses that a plugin before it gave the pod: every pod fails with code"
            f" {Code.INVALID_CONFIG:d}.",
            "Put it after the plugin that makes the interface.",
        )
    try:
        NetworkConfig.parse(config)
    except CNIError as error:
        yield problem(
            f"{path}: {error}",
            f"Every pod that has a host port fails with code {Code.INVALID_CONFIG:d}.",
            "Correct what this names.",
        )
    else:
        yield from _condition_statements(path, config)


def _capability_statements(path: Path, config: dict[str, Any]) -> Iterator[Statement]:
    """Say where the runtime is not told to send what pods ask for."""
    capabilities, gives_ports = config.get("capabilities"), bool(config.get("dynamicPorts"))
    given = capabilities.items() if isinstance(capabilities, dict) else ()
    declared = {key for key, value in given if value is True}
    can_ask = not declared.isdisjoint({keys.ANNOTATIONS, keys.CAPABILITY})
    if "portMappings" not in declared and gives_ports and can_ask:
        yield note(
            f"{path}: hostport does not have the capability portMappings",
            "Pods get dynamic host ports. The runtime sends no fixed ones, which do nothing, unless it is CRI-O, which"
            " makes those itself.",
            'Add "portMappings": true to the capabilities of hostport\'s object, which does no harm with CRI-O either.',
        )
    elif "portMappings" not in declared:
        yield problem(
            f"{path}: hostport does not have the capability portMappings",
            "The runtime sends it no mappings: pods start, and their host ports do nothing.",
            f"Add {CAPABILITIES} to hostport's object.",
        )
    if gives_ports and not can_ask:
        yield problem(
            f"{path}: hostport has dynamicPorts, and no capability by which a pod can ask for one",
            f"The runtime does not send what pods ask for: their annotation {keys.REQUEST} does nothing.",
            f'Add "{keys.ANNOTATIONS}": true to the capabilities of hostport\'s object; for cnitool, which sends no'
            f' annotations, "{keys.CAPABILITY}": true.',
        )


def _condition_statements(path: Path, config: dict[str, Any]) -> Iterator[Statement]:
    """Ask the kernel about the conditions of a configuration, where it accepts all else."""
    if not config.get("conditionsV4") and not config.get("conditionsV6"):
        return
    try:
        availability.probe({})
    except CNIError:
        return
    try:
        availability.probe(config)
    except CNIError as error:
        yield problem(
            f"{path}: nftables refuses the conditions",
            f"Every pod that has a host port fails with code {Code.RULESET_REFUSED:d}.",
            "Write conditionsV4 and conditionsV6 as matches that 'nft add rule' takes.",
            tuple(error.details.splitlines()),
        )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or os.strerror(error.errno or 0)
    return str(error)
