"""Is this node fit for host ports, and are those that it has as they should be? Nothing is changed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from cni_hostport import plugin
from cni_hostport.check import Comparison
from cni_hostport.errors import CNIError, LibraryEndedError, NFTError
from cni_hostport.kernel import crashes
from cni_hostport.kernel.nft import Nft
from cni_hostport.operate import firewalls, mappings, shadowed_programs, terminal
from cni_hostport.operate.doctor import conflists, leftovers, local_addresses, node, runtimes
from cni_hostport.operate.statements import Statement, note, ok, problem
from cni_hostport.skel import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.ruleset.installed import Installed

# what the kernel or libnftables says, and what a person can do about that
REMEDIES = {
    "libnftables crashed": "Install a newer version of nftables.",
    "libnftables cannot be used": "Install the package libnftables1 (Debian, Ubuntu) or nftables (Fedora).",
    "not permitted": "Run this as root, with the capability CAP_NET_ADMIN in the node's own network namespace.",
}
OLDEST = (1, 0, 2)  # of libnftables; 0.9.8 knows neither keys of verdict maps by expressions nor their counters
OTHERWISE = (
    "The kernel needs nf_tables with nft_chain_nat, nft_fib_inet, nft_ct, nft_nat, nft_masq and dynamic sets, and"
    " nobody else may have a table inet hostport of another kind."
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
    def installed(self) -> Installed:
        """What the ruleset holds."""
        return self.nft.installed()

    @cached_property
    def comparison(self) -> Comparison:
        """Comparisons with what the ruleset should hold."""
        return Comparison(self.nft)

    @cached_property
    def mappings(self) -> list[PortMapping]:
        """The mappings of the ruleset."""
        return mappings.read(self.nft)


@dataclass(frozen=True)
class Check:
    """A question: what it is about, what to say if nothing is wrong with that, and how to find out."""

    subject: str
    fine: str
    look: Callable[[Examination], Iterable[Statement]]


def examine(conf_dirs: Sequence[Path], caches: Sequence[Path]) -> Iterator[Statement]:
    """Yield what is found out about this node, at least one statement for each check.

    ``conf_dirs`` hold runtimes' network configurations, ``caches`` the ``results`` that libcni keeps.
    """
    examination = Examination(conf_dirs, caches)
    for check in CHECKS:
        said = False
        try:
            for statement in check.look(examination):
                said = True
                yield statement
        except (CNIError, NFTError, OSError, ValueError) as error:
            yield note(f"{check.subject} could not be checked: {error}")
        else:
            if not said:
                yield ok(check.fine)


def nftables(examination: Examination) -> Iterator[Statement]:
    """Ask the kernel, as STATUS does, whether it takes every expression of the ruleset."""
    release = os.uname().release
    # before anything that an old library could fail, or crash, on
    version = _version(examination)
    if version and tuple(map(int, re.findall(r"\d+", version)))[: len(OLDEST)] < OLDEST:
        needed = ".".join(map(str, OLDEST))
        yield problem(
            f"libnftables {version} is too old: host ports need {needed} or later",
            "A container that has host ports does not start: its ADD fails.",
            f"Upgrade the package libnftables1 (Debian, Ubuntu) or nftables (Fedora): Debian 12, Ubuntu 22.04 and later"
            f" releases have {needed} or later.",
        )
        return
    try:
        plugin.OPERATIONS["STATUS"](Call({"CNI_COMMAND": "STATUS"}, {"name": "doctor"}), terminal.log)
    except CNIError as error:
        reason = error.details or error.msg
        remedy = next((remedy for sign, remedy in REMEDIES.items() if sign in reason), OTHERWISE)
        yield problem(
            f"nftables cannot be used on this node (Linux {release})",
            "A container that has host ports does not start: its ADD fails.",
            remedy,
            tuple(reason.splitlines()),
        )
        return
    yield ok(f"nftables has all that host ports need (Linux {release}, libnftables {version})")
    try:
        examination.nft.listing("sets")
    except LibraryEndedError as end:
        yield from _crash(end, crashes.sets())


def _crash(end: LibraryEndedError, sets: Sequence[str]) -> Iterator[Statement]:
    """Say on which sets libnftables ended; firewalls can have hundreds of one kind."""
    if sets:
        others = f" and {len(sets) - 1} more" if len(sets) > 1 else ""
        yield note(
            f"{end} on {sets[0]}{others}",
            "Host ports work all the same. nft itself crashes here, and what is about these sets is not checked.",
            f"{crashes.REMEDY[0].upper()}{crashes.REMEDY[1:]}.",
            tuple(sets[1 : runtimes.SHOWN]),
        )


def _version(examination: Examination) -> str:
    """Return libnftables' version, empty where it cannot be asked."""
    try:
        listed = examination.nft.listing("chains")
    except NFTError:
        return ""
    return next((item["metainfo"]["version"] for item in listed if "metainfo" in item), "")


CHECKS = (
    Check("nftables", "", nftables),
    Check(
        "the network configurations",
        "the network configurations call hostport as they should",
        lambda it: conflists.statements(it.conf_dirs),
    ),
    Check("forwarding", "the kernel forwards what it is sent for others", lambda it: node.forwarding(it.mappings)),
    Check(
        "reverse path filtering",
        "rp_filter drops no client of a host port",
        lambda it: node.reverse_path(it.mappings, conflists.bridges(it.conf_dirs)),
    ),
    Check(
        "the forward policy",
        "no other table drops connections to host ports by default",
        lambda it: firewalls.forward_policy(it.nft, it.mappings),
    ),
    Check(
        "the addresses of Services",
        "no address of this node is one of a Service (kube-proxy's IPVS mode)",
        lambda it: local_addresses.services(it.nft, it.mappings),
    ),
    Check(
        "the host addresses of mappings",
        "this node has every address that is a hostIP",
        lambda it: local_addresses.host_ips(it.mappings),
    ),
    Check(
        "who listens on mapped ports",
        "no program of this node listens on a mapped port",
        lambda it: shadowed_programs.statements(it.mappings),
    ),
    Check(
        "the base rules",
        "the rules below all host ports are as they should be",
        lambda it: node.base_rules(it.comparison, it.mappings),
    ),
    Check(
        "route_localnet",
        "nobody else can reach what listens on this node's 127.0.0.1",
        lambda it: node.route_localnet(it.nft, it.comparison, it.installed),
    ),
    Check(
        "the holders of host ports",
        "no container that holds a host port is known to be gone",
        lambda it: runtimes.dead_holders(it.mappings),
    ),
    Check(
        "the caches of runtimes",
        "the ruleset is what runtimes asked for",
        lambda it: runtimes.differences(it.installed, it.mappings, it.caches, it.comparison),
    ),
    *(
        Check(
            f"what portmap left in {backend}",
            f"portmap left nothing in {backend}",
            partial(lambda find, it: leftovers.statements(it.nft, it.caches, find), find),
        )
        for backend, find in leftovers.BACKENDS.items()
    ),
)
