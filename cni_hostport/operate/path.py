"""What became of a probe, in words: where the connection goes, or what stops it, with the rules that it met."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from cni_hostport.operate import routing
from cni_hostport.operate.sockets import listeners
from cni_hostport.operate.statements import note, ok, problem
from cni_hostport.table import FAMILY, TABLE, dnat_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.nft import Nft
    from cni_hostport.operate.clients import Client
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.probe import Way
    from cni_hostport.operate.statements import Statement
    from cni_hostport.operate.trace import Hop

LOOPBACK6 = IPv6Address("::1")
TRANSLATION = re.compile(r"\b(dnat|redirect|tproxy)\b", re.IGNORECASE)
REJECTION = re.compile(r"\breject\b", re.IGNORECASE)
RESTORE = "hostport restore"


@dataclass
class Traced:
    """The way of a probe that stands for connections of a client to a mapping.

    ``others`` are the other mappings of the same port and IP version.
    """

    nft: Nft
    of: PortMapping
    others: Sequence[PortMapping]
    client: Client
    way: Way
    _rules: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def stays(self) -> bool:
        """Whether a process of the node gets the connection, if one listens."""
        way = self.way
        # what the node sends to itself is dropped before it comes in again
        return way.end == "input" or (way.end == "postrouting" and way.interface == "lo")

    def statement(self) -> Statement:
        """Say where the connection goes."""
        of, way = self.of, self.way
        if self.arrives:
            return ok(f"{self._what} leaves for {of.target} by {way.interface}", *self._lines())
        if way.end not in {"postrouting", "input"}:
            return self._lost()
        beside = next((other for other in self.others if way.destination == (other.pod_ip, other.pod_port)), None)
        if beside:
            text = f"{self._what} goes to {beside.target}, {beside.who}"
            return note(text, f"A mapping of one address, {beside.host}, beats this one there.", "", self._lines())
        return self._elsewhere()

    @property
    def arrives(self) -> bool:
        """Whether the pod gets the connection."""
        return bool(
            self.way.end == "postrouting"
            and self.of.pod_ip
            and self.way.destination == (self.of.pod_ip, self.of.pod_port)
        )

    @property
    def _met(self) -> bool:
        """Whether it came to the mapping's own chain."""
        return any(hop.verdict == f"goto {dnat_chain(self.of.key)}" for hop in self.way.hops)

    @property
    def _acceptance(self) -> str:
        """The rule that lets it pass: after the mapping, or before."""
        if self._met:
            return "ct status dnat accept (which is for the answers as well)"
        return f"{self.of.protocol} dport {self.of.host_port} accept"

    @property
    def _what(self) -> str:
        protocol = {"tcp": "TCP connection", "udp": "UDP datagram"}[self.of.protocol]
        where = f" (in on {self.client.interface})" if self.client.interface else ""
        return f"a {protocol} from {self.client} to {self.client.destination}{where}"

    def _lost(self) -> Statement:
        last = self.way.hops[-1] if self.way.hops else None
        if last and last.verdict.partition(" ")[0] in {"drop", "queue", "stolen"}:
            return self._stopped(last)
        if self.way.end in {"", "ingress"}:
            where = f" on {self.client.interface}" if self.client.interface else ""
            return problem(
                f"{self._what} does not come to nftables' {'prerouting' if where else 'output'} hook",
                f"Something takes it before{where}: most likely an XDP or tc program.",
                details=self._lines(),
            )
        causes = " ".join(routing.obstacles(self.of, self.client))
        return problem(
            f"{self._what} is lost on its way through the kernel, and no rule of nftables dropped it",
            causes or "Why cannot be seen from here.",
            details=self._lines(),
        )

    def _stopped(self, last: Hop) -> Statement:
        chain = _chain(last)
        details = self._lines()
        if (last.family, last.table) == (FAMILY, TABLE):
            meaning = "127.0.0.0/8 is for the node itself: connections from elsewhere have no business there."
            return problem(f"{self._what} is dropped by this plugin's chain {last.chain}", meaning, "", details)
        if not last.handle:
            text = f"{self._what} is dropped by {chain}: no rule there accepts it, and the chain's policy is drop"
            remedy = f"add a rule to it, with the tool that owns the table: {self._acceptance}"
            return problem(text, "", remedy, details)
        if last.verdict == "drop":
            verb = "rejected" if REJECTION.search(self._text(last)) else "dropped"
            remedy = f"change that rule, with the tool that owns the table, or put before it: {self._acceptance}"
            return problem(f"{self._what} is {verb} by a rule in {chain}", "", remedy, details)
        return problem(
            f"{self._what} is handed over by a rule in {chain} ({last.verdict})",
            "What becomes of it is up to the program that takes it, and could not be seen.",
            details=details,
        )

    def _elsewhere(self) -> Statement:
        of, way, details = self.of, self.way, self._lines()
        address, port = way.destination or (self.client.destination, of.host_port)
        goes = f"{self._what} {'stays on the node' if self.stays else f'leaves for {address} port {port} instead'}"
        translation = next((hop for hop in way.hops if self._translates(hop)), None)
        if translation:
            return problem(
                f"{goes}: a rule in {_chain(translation)} takes it first",
                self._whoever(address.version, port) if self.stays else "",
                "change that rule, with the tool that owns the table",
                details,
            )
        if self.client.destination == LOOPBACK6:
            text = f"{goes}: the kernel cannot translate the IPv6 loopback address"
            return problem(text, self._whoever(6, port), "connect to 127.0.0.1, or to another address", details)
        if not self.stays and address == self.client.destination:
            text = f"{goes}: it is not an address of this node"
            return problem(text, f"The mapping is for {of.host_ip} only.", "give the node the address", details)
        meaning = self._whoever(address.version, port) if self.stays else ""
        if of.pod_ip is None or not self._met:
            return problem(f"{goes}: the rules of this plugin do not translate it", meaning, RESTORE, details)
        token = dnat_chain(of.key)
        rules = tuple(f"{FAMILY} {TABLE} {token}: {rule}  <- not met" for rule in self._rules_of(token).values())
        text = f"{goes}: it does not meet the conditions of the mapping (conditionsV4, conditionsV6)"
        if self.client.made_up:
            return note(text, meaning, "see whether a client meets them with --from ADDRESS", details + rules)
        return problem(text, meaning, "", details + rules)

    def _whoever(self, version: int, port: int) -> str:
        found = listeners(self.of.protocol, port, version)
        who = next((of.process for of in found if of.serves(self.client.destination)), None)
        return f"{who} on this node gets it." if who else f"Nothing on this node listens on {port}/{self.of.protocol}."

    def _translates(self, hop: Hop) -> bool:
        own = (hop.family, hop.table) == (FAMILY, TABLE)
        return not own and hop.verdict == "accept" and bool(TRANSLATION.search(self._text(hop)))

    def _rules_of(self, chain: str) -> dict[int, str]:
        name = chain if " " in chain else f"{FAMILY} {TABLE} {chain}"
        if name not in self._rules:
            self._rules[name] = self.nft.rules(name)
        return self._rules[name]

    def _text(self, hop: Hop) -> str:
        return self._rules_of(_chain(hop)).get(hop.handle, f"rule {hop.handle}") if hop.handle else ""

    def _lines(self) -> tuple[str, ...]:
        return tuple(self._shown())

    def _shown(self) -> Iterator[str]:
        """Show the rules that it met, without the chains that only let it pass."""
        for hop in self.way.hops:
            if hop.handle:
                yield f"{_chain(hop)}: {self._text(hop)}"
            elif hop.verdict == "drop":
                yield f"{_chain(hop)}: policy drop"


def _chain(hop: Hop) -> str:
    return f"{hop.family} {hop.table} {hop.chain}"
