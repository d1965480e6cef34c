"""What container runtimes say is running, in libcni's cache, against what the ruleset holds."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

from cni_hostport import plugin, precedence
from cni_hostport.attachment import Attachment
from cni_hostport.errors import CNIError
from cni_hostport.libcni import cache, directory
from cni_hostport.libcni.conflist import PLUGIN
from cni_hostport.lookup import Lookup
from cni_hostport.names import PODS
from cni_hostport.operate import requests
from cni_hostport.operate.mappings import HolderState
from cni_hostport.operate.statements import RESTORE, note, problem
from cni_hostport.ruleset.commands import map_and_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from cni_hostport.check import Comparison
    from cni_hostport.dynamic_ports.assignment import Assigned
    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.statements import Statement
    from cni_hostport.ruleset.installed import Installed
    from cni_hostport.ruleset.plan import Plan, Request
    from cni_hostport.skel import Call

MAX_EXAMPLES = 10  # of what a statement says
# where install.sh puts the executable by default
DEFAULT_EXECUTABLE = "/opt/cni/bin/hostport"


def by_holder(mappings: Iterable[InstalledMapping]) -> dict[str, list[InstalledMapping]]:
    """Return mappings by the attachment that holds them."""
    found: dict[str, list[InstalledMapping]] = {}
    for mapping in mappings:
        found.setdefault(mapping.key, []).append(mapping)
    return found


def dead_holders(mappings: Sequence[InstalledMapping]) -> Iterator[Statement]:
    """Say which attachments are of containers that no longer exist."""
    holders = by_holder(mappings)
    dead = {key: held for key, held in holders.items() if held[0].holder is HolderState.GONE}
    if len(dead) == len(holders) > 1:
        yield note(
            f"the network namespaces of all {len(dead)} holders seem to be gone",
            "Either every container on this node is dead, or this process does not see the runtime's mounts, and cannot"
            " tell who lives.",
            "Run this where the runtime runs: nsenter --mount --target PID-OF-THE-RUNTIME hostport doctor",
            tuple(f"{_holder(held[0])}: {held[0].netns}" for held in list(dead.values())[:MAX_EXAMPLES]),
        )
        return
    for held in dead.values():
        first = held[0]
        yield note(
            f"{_holder(first)} is gone, and its host ports are still mapped",
            f"Its network namespace {first.netns} does not exist: its runtime has not called DEL. The next container"
            " that wants one of the ports takes all of them over.",
            _removal_advice(first),
            tuple(f"{mapping.host} -> {mapping.target}" for mapping in held),
        )


def _holder(mapping: InstalledMapping) -> str:
    return f"{mapping.container} ({mapping.ifname}, network {mapping.network})"


def _removal_advice(mapping: InstalledMapping) -> str:
    if Attachment(mapping.network, mapping.container_id, mapping.ifname).key != mapping.key:
        return "The runtime's GC removes them, where it has one."  # a name or an ID is cut
    executable = _executable()
    config = json.dumps({"cniVersion": "1.0.0", "name": mapping.network, "type": PLUGIN})
    return (
        f"To remove them now: echo {shlex.quote(config)} | CNI_COMMAND=DEL"
        f" CNI_CONTAINERID={shlex.quote(mapping.container_id)} CNI_IFNAME={shlex.quote(mapping.ifname)}"
        f" CNI_PATH={shlex.quote(os.path.dirname(executable))} {shlex.quote(executable)}"
    )


def _executable() -> str:
    """Return the path of the executable that runs, or the default one where a Python runs the package."""
    path = os.path.realpath(sys.argv[0])
    return path if os.path.basename(path) == os.path.basename(DEFAULT_EXECUTABLE) else DEFAULT_EXECUTABLE


def differences(
    installed: Installed,
    mappings: Sequence[InstalledMapping],
    caches: Sequence[Path],
    comparison: Comparison,
) -> Iterator[Statement]:
    """Say which host ports of the cache the ruleset lacks, and which of the ruleset the cache does not know.

    ``mappings`` and ``installed`` are what was read of the ruleset before.
    """
    if not any(map(directory.exists, caches)):
        yield note(
            f"there is no cache of a runtime in {', '.join(map(str, caches))}",
            "Which host ports containers asked for is not known here.",
            "Name the directory that holds the runtime's results with --cache-dir.",
        )
        return
    by_key = by_holder(mappings)
    calls: list[Call] = []
    for path in directory.entries(caches):
        try:
            call = cache.read(path)
        except ValueError as error:
            yield note(
                f"{path} cannot be read: {error}",
                "What its container asked for is not known here, and may not be to its runtime.",
            )
        else:
            calls += [call] if call else []
    yield from _incomplete(installed, by_key, calls, comparison)
    known = {plugin.attachment_of(call).key for call in calls}
    for key, held in by_key.items():
        if key not in known and held[0].holder is not HolderState.GONE:
            yield note(
                f"{_holder(held[0])} has host ports, and is in no cache",
                "It is being started or stopped at this moment, its runtime keeps its cache elsewhere, or its runtime"
                " has forgotten it and will not call DEL.",
                "Name all cache directories with --cache-dir. If its runtime does not know the container: "
                + _removal_advice(held[0]),
                tuple(f"{mapping.host} -> {mapping.target}" for mapping in held),
            )


def _incomplete(
    installed: Installed,
    by_key: Mapping[str, Sequence[InstalledMapping]],
    calls: Sequence[Call],
    comparison: Comparison,
) -> Iterator[Statement]:
    """Say of which calls the ruleset lacks something; ``by_key`` has the mappings of attachments."""
    running: list[tuple[str, Attachment, Plan, list[str]]] = []  # with their names for people, and what is not in plans
    for call in calls:
        try:
            plan, unassigned = _plan(call)
        except CNIError as error:
            yield _untold(requests.name(call), error)
        else:
            running += [(requests.name(call), plugin.attachment_of(call), plan, unassigned)] if plan else []
    unchanged, incomplete = comparison.unchanged([(attachment, plan) for _, attachment, plan, _ in running]), []
    for name, attachment, plan, unassigned in running:
        held = plan.without(precedence.shared_ports(installed, attachment, plan))
        lacking = unassigned + _lacking(installed, by_key.get(attachment.key, ()), attachment, held)
        try:
            is_compared = not lacking and held.forwards and attachment.key not in unchanged
            if is_compared and comparison.is_changed(attachment, plan):
                lacking = ["its rules are not those of its ADD"]
        except CNIError as error:
            yield _untold(name, error)
        # one that was deleted stays in the cache until all plugins have deleted theirs
        if lacking and not Lookup(shared=True).is_deleted(attachment.key):
            incomplete.append(f"{name}: {', '.join(lacking)}")
    if incomplete:
        yield problem(
            f"the ruleset is not what {len(incomplete)} running container{'s' * (len(incomplete) > 1)} asked for",
            "Something changed it after their ADD, such as 'nft flush ruleset' or a firewall's reload.",
            RESTORE,
            tuple(incomplete),
        )


def _plan(call: Call) -> tuple[Plan | None, list[str]]:
    """Return what ``requests.plan`` does, and the dynamic host ports of which nobody knows any more which they were."""
    unassigned: list[str] = []

    def pick(request: Request, _: Attachment, kept: Assigned) -> Assigned:
        ports = (str(port) for block in request.blocks for port in block)
        unassigned.extend(f"the dynamic host port for {port}" for port in ports if port not in kept)
        return kept

    return requests.plan(call, pick)[0], unassigned


def _untold(name: str, error: CNIError) -> Statement:
    return note(f"what {name} asked for cannot be told: {error}", "Its host ports are not compared.")


def _lacking(
    installed: Installed, mappings: Sequence[InstalledMapping], attachment: Attachment, held: Plan
) -> list[str]:
    """Return what an attachment, which has these mappings, lacks of its plan, aside from ports that it waits for."""
    present = {(element.map, element.key) for element in installed.elements_to(attachment.key)}
    lacking = [str(forward) for forward in held.forwards if map_and_key(forward) not in present]
    lacking += [f"the entry of {ip}" for ip in held.masquerade if (PODS[ip.version], str(ip)) not in present]
    lacking += [f"the rule of {mapping.host}" for mapping in mappings if mapping.pod_ip is None]
    return list(dict.fromkeys(lacking))
