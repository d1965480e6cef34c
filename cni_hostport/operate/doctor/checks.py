"""The checks of doctor, each a row of a table: whether this node is fit for host ports, and those it has are sound.

Nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cni_hostport.check import Comparison
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.kernel.nft import Nft
from cni_hostport.operate import firewalls, mappings, shadowed_programs
from cni_hostport.operate.doctor import (
    conflists,
    crio,
    dynamic_ports,
    leftovers,
    local_addresses,
    nftables,
    node,
    runtimes,
)
from cni_hostport.operate.statements import note, ok

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.statements import Statement
    from cni_hostport.ruleset.installed import Installed


@dataclass(frozen=True)
class Check:
    """What a check is about, what is said where nothing is wrong with it, if anything, and what finds out."""

    subject: str
    finding_if_sound: str
    statements: Callable[[Examination], Iterable[Statement]]


CHECKS = (
    Check("nftables", "", nftables.statements),
    Check(
        "the network configurations",
        "the network configurations call hostport as they should",
        lambda examination: conflists.statements(examination.conf_dirs),
    ),
    Check(
        "the ranges of dynamic host ports",
        "",
        lambda examination: dynamic_ports.statements(examination.conf_dirs, examination.mappings),
    ),
    Check("runtimes that make host ports themselves", "", lambda _: crio.statements()),
    Check(
        "forwarding",
        "the kernel forwards what it is sent for others",
        lambda examination: node.forwarding(examination.mappings),
    ),
    Check(
        "reverse path filtering",
        "rp_filter drops no client of a host port",
        lambda examination: node.reverse_path(examination.mappings, conflists.bridges(examination.conf_dirs)),
    ),
    Check(
        "the forward policy",
        "no other table drops connections to host ports by default",
        lambda examination: firewalls.forward_policy(examination.nft, examination.mappings),
    ),
    Check(
        "the addresses of Services",
        "no address of this node is one of a Service (kube-proxy's IPVS mode)",
        lambda examination: local_addresses.services(examination.nft, examination.mappings),
    ),
    Check(
        "the host addresses of mappings",
        "this node has every address that is a hostIP",
        lambda examination: local_addresses.host_ips(examination.mappings),
    ),
    Check(
        "who listens on mapped ports",
        "no program of this node listens on a mapped port",
        lambda examination: shadowed_programs.statements(examination.mappings),
    ),
    Check(
        "the base rules",
        "the rules below all host ports are as they should be",
        lambda examination: node.base_rules(examination.comparison, examination.table, examination.mappings),
    ),
    Check(
        "route_localnet",
        "nobody else can reach what listens on this node's 127.0.0.1",
        lambda examination: node.route_localnet(examination.comparison, examination.table, examination.installed),
    ),
    Check(
        "the holders of host ports",
        "no container that holds a host port is known to be gone",
        lambda examination: runtimes.dead_holders(examination.mappings),
    ),
    Check(
        "the caches of runtimes",
        "the ruleset is what runtimes asked for",
        lambda examination: runtimes.differences(
            examination.installed, examination.mappings, examination.caches, examination.comparison
        ),
    ),
    Check(
        "what portmap left in nftables",
        "portmap left nothing in nftables",
        lambda examination: leftovers.statements(examination.nft, examination.caches, "nftables"),
    ),
    Check(
        "what portmap left in iptables",
        "portmap left nothing in iptables",
        lambda examination: leftovers.statements(examination.nft, examination.caches, "iptables"),
    ),
)


@dataclass(frozen=True)
class Examination:
    """What the checks look at, each part read when the first of them needs it."""

    conf_dirs: Sequence[Path]
    caches: Sequence[Path]

    @cached_property
    def nft(self) -> Nft:
        """Access to nftables in this network namespace; raises ``NFTError`` where it cannot be used."""
        return Nft()

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """All of the plugin's table, as nft lists it."""
        return mappings.table(self.nft)

    @cached_property
    def installed(self) -> Installed:
        """What the ruleset holds."""
        return mappings.installed_in(self.table)

    @cached_property
    def comparison(self) -> Comparison:
        """Comparisons with what the ruleset should hold."""
        return Comparison(self.nft)

    @cached_property
    def mappings(self) -> list[InstalledMapping]:
        """The mappings of the ruleset."""
        return mappings.mappings_in(self.table)


def examine(conf_dirs: Sequence[Path], caches: Sequence[Path]) -> Iterator[Statement]:
    """Yield what is found out about this node.

    ``conf_dirs`` hold runtimes' network configurations, ``caches`` the ``results`` that libcni keeps.
    """
    examination = Examination(conf_dirs, caches)
    for check in CHECKS:
        is_sound = True
        try:
            for statement in check.statements(examination):
                is_sound = False
                yield statement
        except (CNIError, NFTError, OSError, ValueError) as error:
            yield note(f"{check.subject} could not be checked: {error}")
        else:
            if is_sound and check.finding_if_sound:
                yield ok(check.finding_if_sound)
