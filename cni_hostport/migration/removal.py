"""The removal of portmap's rules.

DEL and ADD remove those of their container. ADD also removes those of containers that no longer exist, where they claim
a host port that it wants.
"""

from __future__ import annotations

from cni_hostport.log import announce
from cni_hostport.portmap import MissingProgramError, chain_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.attachment import Attachment
    from cni_hostport.log import Log
    from cni_hostport.migration.claims import Claim
    from cni_hostport.portmap import Rules
    from cni_hostport.ruleset.plan import Plan
    from cni_hostport.skel import Call


def delete(rules: Rules, call: Call, log: Log) -> None:
    """Remove portmap's rules of the container that a DEL is about.

    A DEL that leaves rules which lead traffic must not succeed, since it is not repeated then. Raises ``CNIError`` and
    ``NFTError`` as ``remove`` does; only a program that is not installed is told instead of raised, since no repetition
    would find it.
    """
    try:
        remove(rules, call.network, call.container_id)
    except MissingProgramError as error:
        announce(log, f"portmap's rules of {call.container_id} may still be there: {error}")


def make_room(rules: Rules, attachment: Attachment, plan: Plan, log: Log) -> None:
    """Remove portmap's rules of an attachment's own container, and of those that are gone where they claim its ports.

    Raises what ``claims_of_gone_containers`` does, with nothing changed, and what ``remove`` does.
    """
    for claim in claims_of_gone_containers(rules, attachment, plan):
        for network in claim.networks:
            remove(rules, network, claim.container_id)
        announce(log, f"{claim}; container {attachment.container_id} ({attachment.ifname}) takes over")
    remove(rules, attachment.network, attachment.container_id)


def claims_of_gone_containers(rules: Rules, attachment: Attachment, plan: Plan) -> Sequence[Claim]:
    """Return portmap's claims to the host ports of a plan, if the containers that have them no longer exist.

    Only where some rule may claim one of the ports, iptables is run and it is found out who lives. Raises ``CNIError``:
    ``Code.PORT_TAKEN`` if a container has one of the ports that lives, or of which that cannot be told, and
    ``Code.HOST_SETTING`` if rules cannot be read; and ``NFTError``.
    """
    if not rules.may_claim({forward.host_port for forward in plan.forwards}):
        return ()
    from cni_hostport.migration import claims

    return claims.of_gone_containers(rules, attachment, plan)


def remove(rules: Rules, network: str, container_id: str) -> None:
    """Remove all rules of a container: of iptables those for this network, of nftables those for any.

    Raises what ``Rules.remove`` does, ``CNIError`` (``Code.HOST_SETTING``) if legacy iptables refuses, and
    ``MissingProgramError`` if that is not installed.
    """
    rules.remove(network, container_id)
    if rules.legacy_families:
        name = chain_name(network, container_id)
        for family in rules.in_legacy_iptables(name):
            from cni_hostport.migration import iptables

            iptables.remove_legacy(family, name)
