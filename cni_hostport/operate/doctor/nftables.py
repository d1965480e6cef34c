"""Whether nftables can be used on this node: the version of its library, and what the kernel takes of the ruleset."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from cni_hostport import availability
from cni_hostport.errors import CNIError, LibraryEndedError, NFTError
from cni_hostport.kernel import crashes
from cni_hostport.operate.doctor.runtimes import MAX_EXAMPLES
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.operate.doctor.checks import Examination
    from cni_hostport.operate.statements import Statement

OLDEST_VERSION = (1, 0, 2)  # of libnftables; 0.9.8 knows neither keys of verdict maps by expressions nor their counters
# words of the kernel's or libnftables' error, and what a person can do about it
REMEDIES = {
    "libnftables crashed": "Install a newer version of nftables.",
    "libnftables cannot be used": "Install the package libnftables1 (Debian, Ubuntu) or nftables (Fedora).",
    "not permitted": "Run this as root, with the capability CAP_NET_ADMIN in the node's own network namespace.",
}
OTHER_REMEDY = (
    "The kernel needs nf_tables with nft_chain_nat, nft_fib_inet, nft_ct, nft_nat, nft_masq and dynamic sets, and"
    " nobody else may have a table inet hostport of another kind."
)


def statements(examination: Examination) -> Iterator[Statement]:
    """Ask the kernel, as STATUS does, whether it takes every expression of the ruleset."""
    release = os.uname().release
    # before anything that an old library could fail, or crash, on
    version = _version(examination)
    if version and tuple(map(int, re.findall(r"\d+", version)))[: len(OLDEST_VERSION)] < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        yield problem(
            f"libnftables {version} is too old: host ports need {oldest} or later",
            "A container that has host ports does not start: its ADD fails.",
            f"Upgrade the package libnftables1 (Debian, Ubuntu) or nftables (Fedora): Debian 12, Ubuntu 22.04 and later"
            f" releases have {oldest} or later.",
        )
        return
    try:
        availability.probe({})
    except CNIError as error:
        reason = error.details or error.msg
        remedy = next((remedy for words, remedy in REMEDIES.items() if words in reason), OTHER_REMEDY)
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
    except LibraryEndedError as error:
        yield from _crash(error, crashes.sets())


def _crash(error: LibraryEndedError, sets: Sequence[str]) -> Iterator[Statement]:
    """Say on which sets libnftables ended; firewalls can have hundreds of one kind."""
    if sets:
        others = f" and {len(sets) - 1} more" if len(sets) > 1 else ""
        yield note(
            f"{error} on {sets[0]}{others}",
            "Host ports work all the same. nft itself crashes here, and what is about these sets is not checked.",
            f"{crashes.REMEDY[0].upper()}{crashes.REMEDY[1:]}.",
            tuple(sets[1:MAX_EXAMPLES]),
        )


def _version(examination: Examination) -> str:
    """Return libnftables' version, empty where it cannot be asked."""
    try:
        listed = examination.nft.listing("chains")
    except NFTError:
        return ""
    return next((item["metainfo"]["version"] for item in listed if "metainfo" in item), "")
