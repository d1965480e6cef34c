"""Host ports that an ADD wants and portmap's rules claim: whose they are, and whether that container exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport.attachment import short_id
from cni_hostport.errors import CNIError, PortTakenError
from cni_hostport.kernel.nft import Nft
from cni_hostport.libcni import directory
from cni_hostport.migration import iptables, nftables
from cni_hostport.migration.census import Census, Fate, Verdict
from cni_hostport.migration.leftover import addresses, by_container

if TYPE_CHECKING:
    from cni_hostport.attachment import Attachment
    from cni_hostport.migration.leftover import Leftover
    from cni_hostport.portmap import Rules
    from cni_hostport.ruleset.plan import Forward, Plan


@dataclass(frozen=True)
class Claim:
    """A host port that is another container's by portmap's rules, and the networks on which that has rules."""

    forward: Forward
    container_id: str
    networks: frozenset[str]

    def __str__(self) -> str:
        """Return it as a sentence without its end."""
        return f"host port {self.forward} was held by {self.holder}, which no longer exists"

    @property
    def holder(self) -> str:
        """The container, named for people."""
        return f"container {short_id(self.container_id)} (portmap)"


def of_gone_containers(rules: Rules, attachment: Attachment, plan: Plan) -> list[Claim]:
    """Return what claims ports of a plan for containers that no longer exist.

    The attachment's own container claims nothing. Raises ``CNIError``: ``Code.PORT_TAKEN`` if a container has a port
    that lives, or of which that cannot be told, ``Code.HOST_SETTING`` if rules cannot be read; and ``NFTError``.
    """
    found = by_container([*nftables.find(Nft()), *iptables.find_by_rules(rules)])
    found.pop(attachment.container_id, None)
    claims = {
        container_id: Claim(forward, container_id, frozenset(leftover.network for leftover in leftovers))
        for container_id, leftovers in found.items()
        for forward in reversed(plan.forwards)
        if any(leftover.takes(forward) for leftover in leftovers)
    }
    for container_id, verdict in _verdicts(attachment, {name: found[name] for name in claims}).items():
        if verdict.fate is not Fate.GONE:
            claim = claims[container_id]
            msg = f"host port {claim.forward} is taken by {claim.holder}"
            raise PortTakenError(msg, (claim.forward.protocol, claim.forward.host_port), verdict.reason)
    return list(claims.values())


def _verdicts(attachment: Attachment, claimants: dict[str, list[Leftover]]) -> dict[str, Verdict]:
    if not claimants:
        return {}
    try:
        census = Census.take([directory.DEFAULT], attachment.netns)
    except (CNIError, OSError) as error:
        return dict.fromkeys(claimants, Verdict(Fate.UNKNOWN, f"whether it exists cannot be told: {error}"))
    return {
        container_id: census.verdict(container_id, addresses(leftovers))
        for container_id, leftovers in claimants.items()
    }
