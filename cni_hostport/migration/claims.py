"""Host ports that an ADD wants and portmap's rules claim: whose they are, and whether that container exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport.attachment import SHORT_ID
from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel.nft import Nft
from cni_hostport.libcni import cache
from cni_hostport.migration import iptables as leftovers_iptables
from cni_hostport.migration import nftables as leftovers_nftables
from cni_hostport.migration.census import Census, Fate, Verdict

if TYPE_CHECKING:
    from cni_hostport.attachment import Attachment
    from cni_hostport.migration.nftables import Leftover
    from cni_hostport.portmap import Rules
    from cni_hostport.ruleset.plan import Forward, Plan


@dataclass(frozen=True)
class Claim:
    """A host port that is another container's by portmap's rules, and the networks on which that has rules."""

    forward: Forward
    container_id: str
    networks: frozenset[str]

    def __str__(self) -> str:
        """Say whose it was."""
        return f"host port {self.forward} was held by {self.whose}, which no longer exists"

    @property
    def whose(self) -> str:
        """Name the container."""
        return f"container {self.container_id[:SHORT_ID]} (portmap)"


def of_gone_containers(rules: Rules, attachment: Attachment, plan: Plan) -> list[Claim]:
    """Return what claims ports of a plan for containers that no longer exist.

    The attachment's own container claims nothing. Raises ``CNIError`` with code 100 if a container that lives, or of
    which that cannot be told, has a port, and with code 102 if rules cannot be read; and ``NFTError``.
    """
    found = [*leftovers_nftables.find(Nft()), *leftovers_iptables.of(rules)]
    of_others: dict[str, list[Leftover]] = {}
    for leftover in found:
        if leftover.container_id != attachment.container_id:
            of_others.setdefault(leftover.container_id, []).append(leftover)
    claims = {
        container_id: Claim(forward, container_id, frozenset(one.network for one in of))
        for container_id, of in of_others.items()
        for forward in reversed(plan.forwards)
        if any(one.takes(forward) for one in of)
    }
    for container_id, verdict in _verdicts(attachment, {name: of_others[name] for name in claims}).items():
        if verdict.fate is not Fate.GONE:
            claim = claims[container_id]
            raise CNIError(Code.PORT_TAKEN, f"host port {claim.forward} is taken by {claim.whose}", verdict.reason)
    return list(claims.values())


def _verdicts(attachment: Attachment, claimants: dict[str, list[Leftover]]) -> dict[str, Verdict]:
    if not claimants:
        return {}
    try:
        census = Census.take([cache.DEFAULT_DIR], attachment.netns)
    except (CNIError, OSError) as error:
        return dict.fromkeys(claimants, Verdict(Fate.UNKNOWN, f"whether it exists cannot be told: {error}"))
    return {
        container_id: census.verdict(container_id, frozenset(ip for one in of for ip in one.addresses))
        for container_id, of in claimants.items()
    }
