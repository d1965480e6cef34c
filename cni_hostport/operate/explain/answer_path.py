"""What becomes of a pod's answer, in words: whether it comes back to the client, from the address that it connected to.

A second probe stands for the answer. It comes in where the pod's packets do. For that while, connection tracking gets
an entry of the connection, so that the answer belongs to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport.errors import NFTError
from cni_hostport.operate.explain import dropping_rule, pod_link, probe, routing
from cni_hostport.operate.explain.conntrack_entry import temporary_entry
from cni_hostport.operate.explain.pod_link import Arrival
from cni_hostport.operate.firewalls import TRANSLATED
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.explain.packet import IPAddress, Packet
    from cni_hostport.operate.explain.pod_link import Bypass
    from cni_hostport.operate.explain.rule_listing import RuleListing
    from cni_hostport.operate.explain.trace import Trace
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

ROUTE_BY_MARK = (
    'mark what comes in on {0} (nft: iifname "{0}" ct mark set 1), give its answers that mark (ct direction reply meta'
    " mark set ct mark), and route by it (ip rule add fwmark 1 lookup TABLE, which has the routes of {0})"
)


@dataclass
class AnswerPath:
    """The path of a pod's answer to ``packet``, a probe from a client that came to the pod with ``trace``."""

    listing: RuleListing
    mapping: PortMapping
    client: Client
    packet: Packet
    trace: Trace

    def statements(self, *, has_own_stack: bool) -> Iterator[Statement]:
        """Say where the answer goes; ``has_own_stack`` is whether the pod's routes are not in its network namespace.

        Raises ``NFTError`` if it cannot be told who manages a table.
        """
        if not self.trace.source or not self.mapping.pod_ip:
            return
        pod, destination, interface = self.mapping.who, self.trace.source[0], self.trace.interface
        arrival: Arrival | Bypass = Arrival(interface, interface)
        if has_own_stack:
            yield note(f"how {pod} routes its answers cannot be seen: they are taken to come in on {interface}")
        else:
            try:
                arrival = pod_link.arrival(self.mapping, destination, interface)
            except OSError as error:
                yield problem(
                    f"{pod} has no route back to {destination}: {error.strerror}",
                    "It gets the connection, and its answers go nowhere.",
                    "give it a route by way of the node: the plugin that makes the interface has 'routes' for that",
                )
                return
        if not isinstance(arrival, Arrival):
            yield self._bypassing(arrival, destination)
            return
        try:
            with temporary_entry(self.packet, self.trace):
                answer_trace = probe.send(self._packet(), arrival.device, arrival.macs)
        except (OSError, NFTError) as error:
            reason = getattr(error, "strerror", None) or error
            yield note(
                f"the way of the pod's answers could not be traced: {reason}", "It is not known what drops them."
            )
            return
        yield self._traced(answer_trace, arrival.interface)

    def _packet(self) -> Packet:
        """Return the answer as the pod sends it."""
        pod_side, client_side = self.trace.destination, self.trace.source
        return probe.answer_packet(self.packet, pod_side or self.packet.server, client_side or self.packet.client)

    def _bypassing(self, bypass: Bypass, destination: IPAddress) -> Statement:
        """Say why the node does not get the answer as a packet for it."""
        pod, pod_ip = self.mapping.who, self.mapping.pod_ip
        if bypass.hop is None and bypass.kind == "bridge":
            text = f"{pod} answers {destination} over {bypass.parent}, where the node translates what passes"
            return note(text, "What rules do to its answers is not traced.")
        if bypass.hop is None:
            return note(f"the pod's answers go through {bypass.parent} ({bypass.kind}), and are not traced")
        if bypass.kind:
            return problem(
                f"{pod} has a {bypass.kind} interface on {bypass.parent}, by which the node would reach it",
                "The kernel lets nothing pass between the two: connections do not reach the pod.",
                f"give the node a {bypass.kind} interface on {bypass.parent} too, and a route to {pod_ip} by it",
            )
        route = "directly" if bypass.hop == destination else f"by way of {bypass.hop}"
        remedy = '"masqAll": true in the network configuration: it then answers the node'
        if bypass.hop == destination:
            remedy = f'"snat": true in the network configuration, or if that is so, {remedy}'
        return problem(
            f"{pod} answers {destination} {route}, past this node",
            f"Only the node translates answers back: {destination} did not connect to {self.mapping.target},"
            " and drops them.",
            f"{remedy}. Or give it a route by way of the node",
        )

    def _traced(self, trace: Trace, interface: str) -> Statement:
        """Say where the node sends the answer, which came in on ``interface``."""
        client, subject = self.client, f"the pod's answer (in on {interface})"
        details = self.listing.lines(trace.hops)
        stays_on_node = trace.end == "input"
        if trace.end not in {"input", "postrouting"}:
            return self._loss(subject, trace, interface)
        if (trace.destination, stays_on_node) != (self.packet.client, not client.interface):
            address = trace.destination[0] if trace.destination else "an unknown address"
            end = "stays on the node" if stays_on_node else f"leaves for {address} by {trace.interface}"
            return self._untranslated(f"{subject} {end} instead of going to {client.source}", trace)
        if trace.source != (client.destination, self.mapping.host_port):
            end = "comes to the node itself" if stays_on_node else f"leaves for {client.source} by {trace.interface}"
            return self._untranslated(f"{subject} {end} as it is, as from {self.mapping.target}", trace)
        if stays_on_node:
            return ok(f"{subject} comes back to the node itself", *details)
        if trace.interface != client.interface:
            return problem(
                f"{subject} leaves for {client.source} by {trace.interface}, and the connection came in on"
                f" {client.interface}",
                f"It is sent as from {client.destination}, which whoever forwards there may drop.",
                ROUTE_BY_MARK.format(client.interface),
                details,
            )
        return ok(f"{subject} leaves for {client.source} by {trace.interface}", *details)

    def _loss(self, subject: str, trace: Trace, interface: str) -> Statement:
        """Say what stopped the answer on the node."""
        drop = dropping_rule.statement(self.listing, subject, trace.hops, TRANSLATED)
        if drop:
            return drop
        if trace.end in {"", "ingress"}:
            text = f"{subject} does not come to nftables' prerouting hook"
            return problem(text, f"Something takes it before on {interface}: most likely an XDP or tc program.")
        causes = " ".join(routing.answer_obstacles(interface, self.mapping, self.client))
        text = f"{subject} is lost on its way through the kernel, and no rule of nftables dropped it"
        details = self.listing.lines(trace.hops)
        return problem(text, causes or "Why cannot be seen from here.", details=details)

    def _untranslated(self, text: str, trace: Trace) -> Statement:
        """Say why the answer, of which ``text`` says where it goes, is not translated back."""
        details = self.listing.lines(trace.hops)
        notrack = self.listing.notrack_hop(trace.hops)
        if notrack:
            text = f"{text}: a rule in {notrack.place} takes it from connection tracking (notrack)"
            remedy = "change that rule, with the tool that owns the table, so that it spares what pods send"
            return problem(text, "Nothing translates it back, and the client drops it.", remedy, details)
        meaning = "Connection tracking does not know the connection that it belongs to, and does not translate it back."
        return problem(text, meaning, "see the rules that it met, and those of 'ct zone set'", details)
