"""What the reference plugin ``portmap``, whose type a conflist had before, has in nf_tables on this node.

Its rules come before this plugin's, and are removed: ``migration.removal`` says when. nf_tables is asked and changed by
netlink messages, in the tables of iptables too: after a deletion iptables can still read them, which it cannot after
nft has written a rule of its own there. On a node without portmap, all this is one question about four chains, and
whether legacy iptables is in use.

Source: containernetworking/plugins, plugins/meta/portmap and pkg/utils/utils.go.
"""

from __future__ import annotations

from cni_hostport.errors import CNIError, Code
from cni_hostport.foreign_rules import (
    LEGACY_TABLE_NAMES,
    delete_chain,
    delete_rule,
    destination_ports,
    jump_target,
)
from cni_hostport.nf_answers import rule_comment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni_hostport.foreign_rules import Chain
    from cni_hostport.lookup import Lookup
    from cni_hostport.netlink import Message

IP_VERSIONS = {"ip": 4, "ip6": 6}  # by the families of the tables
# the back end for iptables: rules in the top chain jump to a chain of each container on a network
NAT, TOP_CHAIN, CHAIN_PREFIX = "nat", "CNI-HOSTPORT-DNAT", "CNI-DN-"
CHAIN_LENGTH = 28  # characters
# the back end for nftables: the comment of a rule is the container's ID
TABLE, CHAINS = "cni_hostport", ("hostports", "hostip_hostports", "masquerading")

REMOVE_ATTEMPTS = 12  # each but the last was lost against somebody else's success


class MissingProgramError(CNIError):
    """Rules of legacy iptables cannot be read or removed, because its programs are not installed."""


def chain_name(network: str, container_id: str) -> str:
    """Return the name of the iptables chain that translates a container's connections."""
    from hashlib import sha512

    return f"{CHAIN_PREFIX}{sha512((network + container_id).encode()).hexdigest()}"[:CHAIN_LENGTH]


class Rules:
    """What portmap has on this node, as far as its chains and tables tell."""

    def __init__(self, lookup: Lookup) -> None:
        """Look for them; raises ``NFTError``, and ``CNIError`` (``Code.HOST_SETTING``) if /proc cannot be read."""
        self._lookup = lookup
        found = lookup.existing(
            [(family, *top) for top in ((NAT, TOP_CHAIN), (TABLE, CHAINS[0])) for family in IP_VERSIONS]
        )
        self.in_iptables: list[Chain] = [chain for chain in found if chain[1] == NAT]
        self.in_nftables = [(family, TABLE, name) for family, table, _ in found if table == TABLE for name in CHAINS]
        self.legacy_families = [family for family in IP_VERSIONS if _uses_legacy_iptables(family)]

    def may_exist(self) -> bool:
        """Tell whether there is anything of portmap; where legacy iptables cannot be asked, there may be."""
        return bool(self.in_iptables or self.in_nftables or self.in_legacy_iptables())

    def in_legacy_iptables(self, name: str = CHAIN_PREFIX) -> list[str]:
        """Return the families in which legacy iptables has chains with such a name, or may have them."""
        if not self.legacy_families:
            return []
        from cni_hostport.kernel import xtables

        return [family for family in self.legacy_families if xtables.mentions(family, NAT, name)]

    def may_claim(self, ports: set[int]) -> bool:
        """Tell whether some rule translates one of these host ports, or may do so; raises ``NFTError``."""
        for chain in (*self.in_iptables, *self.in_nftables):
            rules = self._lookup.rules_of(chain) if chain[2] != "masquerading" else []
            compared = map(destination_ports, rules or ())
            if rules is None or any(not numbers or numbers & ports for numbers in compared):
                return True
        return bool(self.in_legacy_iptables())

    def remove(self, network: str, container_id: str) -> None:
        """Remove a container's rules from nf_tables: those of iptables for this network, those of nftables for any.

        Raises ``NFTError`` if nftables refuses, ``CNIError`` (``Code.TRY_AGAIN``) if too many races were lost.
        """
        for attempt in range(REMOVE_ATTEMPTS):
            changes = self._removal(network, container_id)
            if changes is not None and (not changes or self._lookup.commit(*changes)):
                return
            from cni_hostport import ownership

            ownership.pause(attempt)
        raise CNIError(
            Code.TRY_AGAIN,
            f"portmap's rules of {container_id} were changed by others {REMOVE_ATTEMPTS} times in a row; try again",
        )

    def _removal(self, network: str, container_id: str) -> list[Message] | None:
        """Return what removes a container's rules from nf_tables; ``None`` if some changed while they were listed."""
        changes: list[Message] = []
        for chain in self.in_nftables:
            rules = self._lookup.rules_of(chain)
            if rules is None:
                return None
            container_rules = [rule for rule in rules if rule_comment(rule) == container_id]
            changes += [delete_rule(rule, chain) for rule in container_rules]
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
