"""What became of a probe, in words: where a client's connection goes, or what stops it, with the rules that it met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport.names import FAMILY, TABLE, dnat_chain
from cni_hostport.operate import sockets
from cni_hostport.operate.explain import dropping_rule, redirection, routing
from cni_hostport.operate.firewalls import TRANSLATED, untranslated
from cni_hostport.operate.statements import RESTORE, note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.explain.packet import Endpoint
    from cni_hostport.operate.explain.rule_listing import RuleListing
    from cni_hostport.operate.explain.trace import Hop, Trace
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

PROTOCOL_NOUNS = {"tcp": "TCP connection", "udp": "UDP datagram"}
# by what a rule of this plugin compares: why that rule leaves a connection alone, and what to do
EXEMPTIONS = {
    "::1": ("the kernel cannot translate the IPv6 loopback address", "connect to 127.0.0.1, or to another address"),
    "fe80::/10": ("the kernel cannot translate a link-local address to a pod", "connect to another address"),
    "@ipvs_ip": ("it is an address of kube-ipvs0, all of which are Services'", ""),
}


@dataclass
class ConnectionPath:
    """The path of a client's connection to a mapping, from the trace of a probe that stands for it.

    ``others`` are the other mappings of the same port and IP version.
    """

    listing: RuleListing
    mapping: PortMapping
    others: Sequence[PortMapping]
    client: Client
    trace: Trace

    @property
    def stays_on_node(self) -> bool:
        """Whether a process of the node gets the connection, if one listens."""
        # what the node sends to itself is dropped before it comes in again
        return self.trace.end == "input" or (self.trace.end == "postrouting" and self.trace.interface == "lo")

    @property
    def reaches_pod(self) -> bool:
        """Whether the pod gets the connection."""
        target = self.mapping.pod_ip, self.mapping.pod_port
        return bool(self.trace.end == "postrouting" and self.mapping.pod_ip and self.trace.destination == target)

    def statement(self) -> Statement:
        """Say where the connection goes; raises ``NFTError`` if it cannot be told who manages a table."""
        trace = self.trace
        if self.reaches_pod:
            return ok(f"{self._subject} leaves for {self.mapping.target} by {trace.interface}", *self._details)
        if trace.end not in {"postrouting", "input"}:
            return self._loss()
        redirecting = redirection.redirecting_hop(trace.hops, self.listing)
        if redirecting:
            return self._redirected(redirecting)
        other = next((other for other in self.others if trace.destination == (other.pod_ip, other.pod_port)), None)
        if other:
            text = f"{self._subject} goes to {other.target}, {other.who}"
            return note(text, f"A mapping of one address, {other.host}, beats this one there.", "", self._details)
        return self._untranslated()

    @property
    def _comes_to_mapping(self) -> bool:
        """Whether the rules of this plugin led it to the mapping's own chain."""
        return any(hop.verdict == f"goto {dnat_chain(self.mapping.key)}" for hop in self.trace.hops)

    @property
    def _subject(self) -> str:
        place = f" (in on {self.client.interface})" if self.client.interface else ""
        noun = PROTOCOL_NOUNS[self.mapping.protocol]
        return f"a {noun} from {self.client} to {self.client.destination}{place}"

    @property
    def _details(self) -> tuple[str, ...]:
        return self.listing.lines(self.trace.hops)

    def _loss(self) -> Statement:
        """Say what stopped the probe before it came to its end."""
        hops, mapping, interface = self.trace.hops, self.mapping, self.client.interface
        is_translated = self._comes_to_mapping or redirection.redirecting_hop(hops, self.listing)
        connections = TRANSLATED if is_translated else untranslated(mapping.protocol, mapping.host_port)
        drop = dropping_rule.statement(self.listing, self._subject, hops, connections)
        if drop:
            return drop
        if self.trace.end in {"", "ingress"}:
            place = f" on {interface}" if interface else ""
            return problem(
                f"{self._subject} does not come to nftables' {'prerouting' if interface else 'output'} hook",
                f"Something takes it before{place}: most likely an XDP or tc program.",
                details=self._details,
            )
        causes = " ".join(routing.connection_obstacles(mapping, self.client))
        return problem(
            f"{self._subject} is lost on its way through the kernel, and no rule of nftables dropped it",
            causes or "Why cannot be seen from here.",
            details=self._details,
        )

    @property
    def _diversion(self) -> str:
        """That the connection goes elsewhere than to the pod, as the first part of a sentence."""
        address, port = self._destination
        end = "stays on the node" if self.stays_on_node else f"leaves for {address} port {port} instead"
        return f"{self._subject} {end}"

    def _redirected(self, redirecting: Hop) -> Statement:
        """Say which rule of another program translated it."""
        program = redirection.program(redirecting, self.trace.hops)
        taker = f"{program} takes it first, by a rule in" if program else "a rule of others takes it first, in"
        meaning = (
            "What others of this node translate is theirs: it is more specific than a host port, which gets the rest."
        )
        return problem(
            f"{self._diversion}: {taker} {redirecting.place}",
            f"{meaning} {self._receiver}" if self.stays_on_node else meaning,
            "give the mapping another host port, or a hostIP that the rule does not take",
            self._details,
        )

    def _untranslated(self) -> Statement:
        """Say why no rule translated it."""
        mapping, details = self.mapping, self._details
        meaning = self._receiver if self.stays_on_node else ""
        notrack = self.listing.notrack_hop(self.trace.hops)
        if notrack:
            return problem(
                f"{self._diversion}: a rule in {notrack.place} takes it from connection tracking (notrack)",
                f"Nothing is translated that is not tracked. {meaning}".strip(),
                "change that rule, with the tool that owns the table, so that it spares host ports",
                details,
            )
        exemption = next((found for found in map(self._exemption, self.trace.hops) if found), None)
        if exemption:
            reason, remedy = exemption
            return (problem if remedy else note)(f"{self._diversion}: {reason}", meaning, remedy, details)
        if mapping.pod_ip is None or not self._comes_to_mapping:
            return problem(
                f"{self._diversion}: the rules of this plugin do not translate it", meaning, RESTORE, details
            )
        if mapping.rule is not None and not mapping.rule.takes(self.client.destination):
            text = f"{self._diversion}: {self.client.destination} is not in the hostAddresses of the mapping's network"
            return problem(text, meaning, "connect to one that is, or change the network configuration", details)
        return self._conditional(meaning)

    def _conditional(self, meaning: str) -> Statement:
        """Say that it does not meet the conditions of the mapping's network, and show the rules that have them."""
        chain = f"{FAMILY} {TABLE} {dnat_chain(self.mapping.key)}"
        rules = tuple(f"{chain}: {rule}  <- not met" for rule in self.listing.rules(chain).values())
        text = f"{self._diversion}: it does not meet the conditions of the mapping (conditionsV4, conditionsV6)"
        details = self._details + rules
        if self.client.is_example:
            return note(text, meaning, "see whether a client meets them with --from ADDRESS", details)
        return problem(text, meaning, "", details)

    def _exemption(self, hop: Hop) -> tuple[str, str] | None:
        """Return why a rule of this plugin left it alone, and what to do; ``None`` if the hop is no such rule."""
        if (hop.family, hop.table, hop.verdict) != (FAMILY, TABLE, "return") or not hop.handle:
            return None
        rule = self.listing.text(hop)
        return next((exemption for text, exemption in EXEMPTIONS.items() if text in rule), None)

    @property
    def _receiver(self) -> str:
        """Which process of the node gets it, as a sentence."""
        address, port = self._destination
        listeners = sockets.listeners(self.mapping.protocol, port, address.version)
        serving = (listener for listener in listeners if listener.serves(self.client.destination))
        process = next((listener.process for listener in serving), None)
        if process:
            return f"{process} on this node gets it."
        return f"Nothing on this node listens on {port}/{self.mapping.protocol}."

    @property
    def _destination(self) -> Endpoint:
        """Address and port to which it went in the end, as far as the trace tells."""
        return self.trace.destination or (self.client.destination, self.mapping.host_port)
