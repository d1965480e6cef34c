"""The reference plugin ``portmap``, whose type a conflist had before: its rules come before this plugin's.

They are removed when this plugin is asked to delete their container, or to add it again, and when somebody wants a port
that they claim for a container that no longer exists. nf_tables is asked and changed by netlink messages, in the tables
of iptables too: deleting leaves iptables able to read them, whereas a rule of nft's own would not. On a node without
portmap, all this is one question about four chains, and whether legacy iptables is in use.

Source: containernetworking/plugins, plugins/meta/portmap and pkg/utils/utils.go.
"""

from __future__ import annotations

from cni_hostport.errors import CNIError, Code
from cni_hostport.foreign_rules import (
    LEGACY_TABLE_NAMES,
    comment,
    delete_chain,
    delete_rule,
    destination_ports,
    jump_target,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.attachment import Attachment
    from cni_hostport.foreign_rules import Chain
    from cni_hostport.log import Log
    from cni_hostport.lookup import Lookup
    from cni_hostport.migration.claims import Claim
    from cni_hostport.netlink import Message
    from cni_hostport.ruleset.plan import Plan
    from cni_hostport.skel import Call

FAMILIES = ("ip", "ip6")
# the back end for iptables: rules in the chain TOP jump to a chain of each container on a network
NAT, TOP, PREFIX = "nat", "CNI-HOSTPORT-DNAT", "CNI-DN-"
CHAIN_CHARACTERS = 28
# the back end for nftables: the comment of a rule is the container's ID
TABLE, CHAINS = "cni_hostport", ("hostports", "hostip_hostports", "masquerading")

ATTEMPTS = 12  # each but the last was lost against somebody else's success


class MissingProgramError(CNIError):
    """Rules of legacy iptables cannot be read or removed, because its programs are not installed."""


def chain_name(network: str, container_id: str) -> str:
    """Return the name of the iptables chain that translates a container's connections."""
    from hashlib import sha512

    return f"{PREFIX}{sha512((network + container_id).encode()).hexdigest()}"[:CHAIN_CHARACTERS]


def delete(lookup: Lookup, call: Call, log: Log) -> None:
    """Remove portmap's rules of the container that a DEL is about.

    A DEL that leaves rules which lead traffic must not succeed, since it is not repeated then. Raises ``CNIError`` and
    ``NFTError`` as ``Rules.remove`` does; only a program that is not installed is told instead of raised, since no
    repetition would find it.
    """
    try:
        Rules(lookup).remove(call.network, call.container_id)
    except MissingProgramError as error:
        from cni_hostport.log import announce

        announce(log, f"portmap's rules of {call.container_id} may still be there: {error}")


def make_room(lookup: Lookup, attachment: Attachment, plan: Plan, log: Log) -> None:
    """Remove portmap's rules of the attachment's own container, and of those that are gone where they claim its ports.

    Raises ``CNIError``, with nothing changed, if a container that lives, or of which that cannot be told, has one of
    the ports (code 100), or rules cannot be read (102); and what ``Rules.remove`` raises.
    """
    lookup.leave_open()
    rules = Rules(lookup)
    for claim in rules.in_the_way(attachment, plan):
        for network in claim.networks:
            rules.remove(network, claim.container_id)
        from cni_hostport.log import announce

        announce(log, f"{claim}; container {attachment.container_id} ({attachment.ifname}) takes over")
    rules.remove(attachment.network, attachment.container_id)


class Rules:
    """What portmap has on this node, as far as its chains and tables tell."""

    def __init__(self, lookup: Lookup) -> None:
        """Look for them; raises ``NFTError``, and ``CNIError`` with code 102 if /proc cannot be read."""
        self._lookup = lookup
        found = lookup.existing([(family, *top) for top in ((NAT, TOP), (TABLE, CHAINS[0])) for family in FAMILIES])
        self.in_iptables: list[Chain] = [chain for chain in found if chain[1] == NAT]
        self.in_nftables = [(family, TABLE, name) for family, table, _ in found if table == TABLE for name in CHAINS]
        self._legacy = [family for family in FAMILIES if _uses_legacy_iptables(family)]

    def in_legacy_iptables(self, name: str = PREFIX) -> list[str]:
        """Return the families in which legacy iptables has chains with such a name, or may have them."""
        if not self._legacy:
            return []
        from cni_hostport.kernel import xtables

        return [family for family in self._legacy if xtables.mentions(family, NAT, name)]

    def in_the_way(self, attachment: Attachment, plan: Plan) -> Sequence[Claim]:
        """Return what claims ports of a plan for containers that are gone. Raises ``CNIError`` as ``make_room`` does.

        Only where some rule may claim one of the ports, iptables is run and it is found out who lives.
        """
        if not self._may_claim({forward.host_port for forward in plan.forwards}):
            return ()
        from cni_hostport.migration import claims

        return claims.of_gone_containers(self, attachment, plan)

    def _may_claim(self, ports: set[int]) -> bool:
        for chain in (*self.in_iptables, *self.in_nftables):
            rules = self._lookup.rules_of(chain) if chain[2] != "masquerading" else []
            compared = map(destination_ports, rules or ())
            if rules is None or any(not of_rule or of_rule & ports for of_rule in compared):
                return True
        return bool(self.in_legacy_iptables())

    def remove(self, network: str, container_id: str) -> None:
        """Remove all rules of a container: of iptables those for this network, of nftables those for any.

        Raises ``NFTError`` if nftables refuses, ``CNIError`` with code 11 if too many races were lost, with code 102 if
        legacy iptables refuses, ``MissingProgramError`` if that is not installed.
        """
        for attempt in range(ATTEMPTS):
            changes = self._removal(network, container_id)
            if changes is not None and (not changes or self._lookup.commit(*changes)):
                break
            from cni_hostport import ownership

            ownership.pause(attempt)
        else:
            raise CNIError(
                Code.TRY_AGAIN,
                f"portmap's rules of {container_id} were changed by others {ATTEMPTS} times in a row; try again",
            )
        if self._legacy:
            name = chain_name(network, container_id)
            for family in self.in_legacy_iptables(name):
                from cni_hostport.migration import iptables as leftovers_iptables

                leftovers_iptables.remove_legacy(family, name)

    def _removal(self, network: str, container_id: str) -> list[Message] | None:
        """Return what removes a container's rules from nf_tables; ``None`` if some changed while they were listed."""
        changes: list[Message] = []
        for chain in self.in_nftables:
            rules = self._lookup.rules_of(chain)
            if rules is None:
                return None
            own = [rule for rule in rules if comment(rule) == container_id]
            changes += [delete_rule(rule, chain) for rule in own]
        name = chain_name(network, container_id) if self.in_iptables else ""
        for top in self.in_iptables:
            chain = (top[0], NAT, name)
            if self._lookup.existing([chain]):
                jumps = [rule for rule in self._lookup.rules_of(top) or () if jump_target(rule) == name]
                # a jump that was not listed makes the kernel refuse to delete the chain
                changes += [*(delete_rule(rule, top) for rule in jumps), *delete_chain(chain)]
        return changes


def _uses_legacy_iptables(family: str) -> bool:
    try:
        with open(LEGACY_TABLE_NAMES.format(family)) as names:
            return NAT in names.read().split()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CNIError(
            Code.HOST_SETTING, f"cannot tell whether iptables is in use: {error.filename}: {error.strerror}"
        ) from error
