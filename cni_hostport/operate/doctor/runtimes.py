"""What container runtimes say is running, in libcni's cache, against what the ruleset holds."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from cni_hostport import ownership, plugin
from cni_hostport.attachment import Attachment
from cni_hostport.errors import CNIError
from cni_hostport.libcni import cache
from cni_hostport.lookup import Lookup
from cni_hostport.names import PODS
from cni_hostport.operate.mappings import Holder
from cni_hostport.operate.statements import note, problem
from cni_hostport.ruleset.commands import map_and_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.check import Comparison
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement
    from cni_hostport.ruleset.installed import Installed
    from cni_hostport.skel import Call

SHOWN = 10  # examples of what holds for all


def by_holder(mappings: Iterable[PortMapping]) -> dict[str, list[PortMapping]]:
    """Return mappings by the attachment that holds them."""
    found: dict[str, list[PortMapping]] = {}
    for mapping in mappings:
        found.setdefault(mapping.key, []).append(mapping)
    return found


def dead_holders(mappings: Sequence[PortMapping]) -> Iterator[Statement]:
    """Say which attachments are of containers that no longer exist."""
    holders = by_holder(mappings)
    dead = {key: of for key, of in holders.items() if of[0].holder is Holder.GONE}
    if len(dead) == len(holders) > 1:
        yield note(
            f"the network namespaces of all {len(dead)} holders seem to be gone",
            "Either every container on this node is dead, or this process does not see the runtime's mounts, and cannot"
            " tell who lives.",
            "Run this where the runtime runs: nsenter --mount --target PID-OF-THE-RUNTIME hostport doctor",
            tuple(f"{_who(of[0])}: {of[0].netns}" for of in list(dead.values())[:SHOWN]),
        )
        return
    for of in dead.values():
        first = of[0]
        yield note(
            f"{_who(first)} is gone, and its host ports are still mapped",
            f"Its network namespace {first.netns} does not exist: its runtime has not called DEL. The next container"
            " that wants one of the ports takes all of them over.",
            _removal(first),
            tuple(f"{mapping.host} -> {mapping.target}" for mapping in of),
        )


def _who(mapping: PortMapping) -> str:
    return f"{mapping.who} ({mapping.ifname}, network {mapping.network})"


def _removal(mapping: PortMapping) -> str:
    if Attachment(mapping.network, mapping.container_id, mapping.ifname).key != mapping.key:
        return "The runtime's GC removes them, where it has one."  # a name or an ID is cut
    config = json.dumps({"cniVersion": "1.0.0", "name": mapping.network, "type": cache.PLUGIN})
    return (
        f"To remove them now: echo {shlex.quote(config)} | CNI_COMMAND=DEL"
        f" CNI_CONTAINERID={shlex.quote(mapping.container_id)} CNI_IFNAME={shlex.quote(mapping.ifname)}"
        " CNI_PATH=/opt/cni/bin /opt/cni/bin/hostport"
    )


def differences(
    installed: Installed,
    mappings: Sequence[PortMapping],
    caches: Sequence[Path],
    comparison: Comparison,
) -> Iterator[Statement]:
    """Say which host ports of the cache the ruleset lacks, and which of the ruleset the cache does not know.

    ``mappings`` and ``installed`` are what was read of the ruleset before.
    """
    if not any(map(cache.exists, caches)):
        yield note(
            f"there is no cache of a runtime in {', '.join(map(str, caches))}",
            "Which host ports containers asked for is not known here.",
            "Name the directory that holds the runtime's results with --cache-dir.",
        )
        return
    known, incomplete, by_key = set[str](), [], by_holder(mappings)
    for path in cache.entries(caches):
        try:
            call = cache.read(path)
        except ValueError as error:
            yield note(
                f"{path} cannot be read: {error}",
                "What its container asked for is not known here, and may not be to its runtime.",
            )
            continue
        if call:
            key = plugin.attachment_of(call).key
            known.add(key)
            try:
                lacking = _lacking(installed, by_key.get(key, ()), call, comparison)
            except CNIError as error:
                yield note(
                    f"what {cache.attachment(call)} asked for cannot be told: {error}",
                    "Its host ports are not compared.",
                )
            else:
                incomplete += [f"{cache.attachment(call)}: {', '.join(lacking)}"] if lacking else []
    if incomplete:
        yield problem(
            f"the ruleset is not what {len(incomplete)} running container{'s' * (len(incomplete) > 1)} asked for",
            "Something changed it after their ADD, such as 'nft flush ruleset' or a firewall's reload.",
            "hostport restore",
            tuple(incomplete),
        )
    for key, of in by_key.items():
        if key not in known and of[0].holder is not Holder.GONE:
            yield note(
                f"{_who(of[0])} has host ports, and is in no cache",
                "It is being started or stopped at this moment, its runtime keeps its cache elsewhere, or its runtime"
                " has forgotten it and will not call DEL.",
                "Name all cache directories with --cache-dir. If its runtime does not know the container: "
                + _removal(of[0]),
                tuple(f"{mapping.host} -> {mapping.target}" for mapping in of),
            )


def _lacking(installed: Installed, mappings: Sequence[PortMapping], call: Call, comparison: Comparison) -> list[str]:
    """Return what is not as an attachment, which has these mappings, asked for if it is there.

    Raises ``CNIError`` if its plan cannot be made.
    """
    attachment = plugin.attachment_of(call)
    plan, _ = cache.plan(call)
    if plan is None:
        return []
    plan = plan.without(ownership.shared(installed, attachment, plan))
    present = {(element.map, element.key) for element in installed.of(attachment.key)}
    lacking = [str(of) for of in plan.forwards if map_and_key(of) not in present]
    lacking += [f"the entry of {ip}" for ip in plan.masquerade if (PODS[ip.version], str(ip)) not in present]
    lacking += [f"the rule of {of.host}" for of in mappings if of.pod_ip is None]
    if not lacking and plan.forwards and comparison.is_changed(attachment, plan):
        lacking = ["its rules are not those of its ADD"]
    # one that was deleted stays in the cache until all plugins have deleted theirs
    return list(dict.fromkeys(lacking)) if lacking and not Lookup(kept=True).is_deleted(attachment.key) else []
