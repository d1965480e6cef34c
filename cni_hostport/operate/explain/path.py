"""What became of a probe, in words: where the connection goes, or what stops it, with the rules that it met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport.names import FAMILY, TABLE, dnat_chain
from cni_hostport.operate.explain import redirection, routing
from cni_hostport.operate.firewalls import TRANSLATED, untranslated
from cni_hostport.operate.sockets import listeners
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.explain.probe import Way
    from cni_hostport.operate.explain.rules import Rules
    from cni_hostport.operate.explain.trace import Hop
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

RESTORE = "hostport restore"
# which rules of this plugin leave a connection alone, and why that is so
LEFT = {
    "::1": ("the kernel cannot translate the IPv6 loopback address", "connect to 127.0.0.1, or to another address"),
    "fe80::/10": ("the kernel cannot translate a link-local address to a pod", "connect to another address"),
    "@ipvs_ip": ("it is an address of kube-ipvs0, all of which are Services'", ""),
}


@dataclass
class Traced:
    """The way of a probe that stands for connections of a client to a mapping.

    ``others`` are the other mappings of the same port and IP version.
    """

    rules: Rules
    of: PortMapping
    others: Sequence[PortMapping]
    client: Client
    way: Way

    @property
    def stays(self) -> bool:
        """Whether a process of the node gets the connection, if one listens."""
        way = self.way
        # what the node sends to itself is dropped before it comes in again
        return way.end == "input" or (way.end == "postrouting" and way.interface == "lo")

    def statement(self) -> Statement:
        """Say where the connection goes; raises ``NFTError`` if it cannot be told who manages a table."""
        of, way = self.of, self.way
        if self.arrives:
            return ok(f"{self._what} leaves for {of.target} by {way.interface}", *self._lines())
        if way.end not in {"postrouting", "input"}:
            return self._lost()
        redirected = redirection.of(way.hops, self.rules)
        if redirected:
            return self._redirected(redirected)
        beside = next((other for other in self.others if way.destination == (other.pod_ip, other.pod_port)), None)
        if beside:
            text = f"{self._what} goes to {beside.target}, {beside.who}"
            return note(text, f"A mapping of one address, {beside.host}, beats this one there.", "", self._lines())
        return self._untranslated()

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
    def _what(self) -> str:
        protocol = {"tcp": "TCP connection", "udp": "UDP datagram"}[self.of.protocol]
        where = f" (in on {self.client.interface})" if self.client.interface else ""
        return f"a {protocol} from {self.client} to {self.client.destination}{where}"

    def _lost(self) -> Statement:
        is_translated = self._met or redirection.of(self.way.hops, self.rules)
        acceptable = TRANSLATED if is_translated else untranslated(self.of.protocol, self.of.host_port)
        stop = self.rules.stop(self._what, self.way.hops, acceptable)
        if stop:
            return stop
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

    @property
    def _goes(self) -> str:
        address, port = self.way.destination or (self.client.destination, self.of.host_port)
        return f"{self._what} {'stays on the node' if self.stays else f'leaves for {address} port {port} instead'}"

    def _redirected(self, redirected: Hop) -> Statement:
        """Say which rule of others translated it."""
        whose = redirection.whose(redirected, self.way.hops)
        taker = f"{whose} takes it first, by a rule in" if whose else "a rule of others takes it first, in"
        meaning = (
            "What others of this node translate is theirs: it is more specific than a host port, which gets the rest."
        )
        return problem(
            f"{self._goes}: {taker} {redirected.place}",
            f"{meaning} {self._whoever}" if self.stays else meaning,
            "give the mapping another host port, or a hostIP that the rule does not take",
            self._lines(),
        )

    def _untranslated(self) -> Statement:
        of, details = self.of, self._lines()
        meaning = self._whoever if self.stays else ""
        untracking = self.rules.untracking(self.way.hops)
        if untracking:
            return problem(
                f"{self._goes}: a rule in {untracking.place} takes it from connection tracking (notrack)",
                f"Nothing is translated that is not tracked. {meaning}".strip(),
                "change that rule, with the tool that owns the table, so that it spares host ports",
                details,
            )
        left = next((why for why in map(self._left, self.way.hops) if why), None)
        if left:
            why, remedy = left
            return (problem if remedy else note)(f"{self._goes}: {why}", meaning, remedy, details)
        if of.pod_ip is None or not self._met:
            return problem(f"{self._goes}: the rules of this plugin do not translate it", meaning, RESTORE, details)
        if of.rule is not None and not of.rule.takes(self.client.destination):
            text = f"{self._goes}: {self.client.destination} is not in the hostAddresses of the mapping's network"
            return problem(text, meaning, "connect to one that is, or change the network configuration", details)
        token = f"{FAMILY} {TABLE} {dnat_chain(of.key)}"
        unmet = tuple(f"{token}: {rule}  <- not met" for rule in self.rules.of(token).values())
        text = f"{self._goes}: it does not meet the conditions of the mapping (conditionsV4, conditionsV6)"
        if self.client.made_up:
            return note(text, meaning, "see whether a client meets them with --from ADDRESS", details + unmet)
        return problem(text, meaning, "", details + unmet)

    def _left(self, hop: Hop) -> tuple[str, str] | None:
        """Return why a rule of this plugin left it alone, and what to do."""
        if (hop.family, hop.table, hop.verdict) != (FAMILY, TABLE, "return") or not hop.handle:
            return None
        rule = self.rules.text(hop)
        return next((why for sign, why in LEFT.items() if sign in rule), None)

    @property
    def _whoever(self) -> str:
        address, port = self.way.destination or (self.client.destination, self.of.host_port)
        found = listeners(self.of.protocol, port, address.version)
        who = next((of.process for of in found if of.serves(self.client.destination)), None)
        return f"{who} on this node gets it." if who else f"Nothing on this node listens on {port}/{self.of.protocol}."

    def _lines(self) -> tuple[str, ...]:
        return self.rules.lines(self.way.hops)
