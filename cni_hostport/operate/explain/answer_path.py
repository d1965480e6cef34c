"""What becomes of a pod's answer, in words: whether it comes back to the client, as from where the client connected to.

A second packet stands for it. It comes in where the pod's packets do, and belongs to a connection that connection
tracking is told of for that while.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport.errors import NFTError
from cni_hostport.operate.explain import links, probe, routing
from cni_hostport.operate.explain import tracked_connection as tracked
from cni_hostport.operate.explain.links import Arrival
from cni_hostport.operate.firewalls import TRANSLATED
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.explain.links import Passing
    from cni_hostport.operate.explain.packet import Packet
    from cni_hostport.operate.explain.probe import Way
    from cni_hostport.operate.explain.rules import Rules
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

    Address = IPv4Address | IPv6Address

MARKED = (
    'mark what comes in on {0} (nft: iifname "{0}" ct mark set 1), give its answers that mark (ct direction reply meta'
    " mark set ct mark), and route by it (ip rule add fwmark 1 lookup TABLE, which has the routes of {0})"
)


@dataclass
class Answer:
    """The answer to the probe ``packet``, which went this ``way`` from a client to a mapping's pod."""

    rules: Rules
    of: PortMapping
    client: Client
    packet: Packet
    way: Way

    def statements(self, *, hidden: bool) -> Iterator[Statement]:
        """Say where the answer goes; ``hidden`` is whether the pod's routes are not in its network namespace.

        Raises ``NFTError`` if it cannot be told who manages a table.
        """
        if not self.way.source or not self.of.pod_ip:
            return
        to = self.way.source[0]
        by = self.way.interface
        arrival: Arrival | Passing = Arrival(by, by)
        if hidden:
            yield note(f"how {self.of.who} routes its answers cannot be seen: they are taken to come in on {by}")
        else:
            try:
                arrival = links.home(self.of, to, by)
            except OSError as error:
                yield problem(
                    f"{self.of.who} has no route back to {to}: {error.strerror}",
                    "It gets the connection, and its answers go nowhere.",
                    "give it a route by way of the node: the plugin that makes the interface has 'routes' for that",
                )
                return
        if not isinstance(arrival, Arrival):
            yield self._passing(arrival, to)
            return
        try:
            with tracked.connection(self.packet, self.way):
                way = probe.send(self._packet(), arrival.device, arrival.macs)
        except (OSError, NFTError) as error:
            reason = getattr(error, "strerror", None) or error
            yield note(
                f"the way of the pod's answers could not be traced: {reason}", "It is not known what drops them."
            )
            return
        yield self._traced(way, arrival.interface)

    def _packet(self) -> Packet:
        """Return the answer as the pod sends it."""
        return probe.answer(
            self.packet, self.way.destination or self.packet.server, self.way.source or self.packet.client
        )

    def _passing(self, passing: Passing, to: Address) -> Statement:
        of = self.of
        if passing.hop is None and passing.kind == "bridge":
            text = f"{of.who} answers {to} over {passing.parent}, where the node translates what passes"
            return note(text, "What rules do to its answers is not traced.")
        if passing.hop is None:
            return note(f"the pod's answers go through {passing.parent} ({passing.kind}), and are not traced")
        if passing.kind:
            return problem(
                f"{of.who} has a {passing.kind} interface on {passing.parent}, by which the node would reach it",
                "The kernel lets nothing pass between the two: connections do not reach the pod.",
                f"give the node a {passing.kind} interface on {passing.parent} too, and a route to {of.pod_ip} by it",
            )
        where = "directly" if passing.hop == to else f"by way of {passing.hop}"
        remedy = '"masqAll": true in the network configuration: it then answers the node'
        if passing.hop == to:
            remedy = f'"snat": true in the network configuration, or if that is so, {remedy}'
        return problem(
            f"{of.who} answers {to} {where}, past this node",
            f"Only the node translates answers back: {to} did not connect to {of.target}, and drops them.",
            f"{remedy}. Or give it a route by way of the node",
        )

    def _traced(self, way: Way, interface: str) -> Statement:
        what = f"the pod's answer (in on {interface})"
        details = self.rules.lines(way.hops)
        back = self.client.destination, self.of.host_port
        stays = way.end == "input"
        if way.end not in {"input", "postrouting"}:
            return self._lost(what, way, interface)
        if (way.destination, stays) != (self.packet.client, not self.client.interface):
            address = way.destination[0] if way.destination else "an unknown address"
            where = "stays on the node" if stays else f"leaves for {address} by {way.interface}"
            return self._not_translated(f"{what} {where} instead of going to {self.client.source}", way)
        if way.source != back:
            where = "comes to the node itself" if stays else f"leaves for {self.client.source} by {way.interface}"
            return self._not_translated(f"{what} {where} as it is, as from {self.of.target}", way)
        if stays:
            return ok(f"{what} comes back to the node itself", *details)
        if way.interface != self.client.interface:
            return problem(
                f"{what} leaves for {self.client.source} by {way.interface}, and the connection came in on"
                f" {self.client.interface}",
                f"It is sent as from {self.client.destination}, which whoever forwards there may drop.",
                MARKED.format(self.client.interface),
                details,
            )
        return ok(f"{what} leaves for {self.client.source} by {way.interface}", *details)

    def _lost(self, what: str, way: Way, interface: str) -> Statement:
        details = self.rules.lines(way.hops)
        stop = self.rules.stop(what, way.hops, TRANSLATED)
        if stop:
            return stop
        if way.end in {"", "ingress"}:
            text = f"{what} does not come to nftables' prerouting hook"
            return problem(text, f"Something takes it before on {interface}: most likely an XDP or tc program.")
        causes = " ".join(routing.obstacles_back(interface, self.of, self.client))
        text = f"{what} is lost on its way through the kernel, and no rule of nftables dropped it"
        return problem(text, causes or "Why cannot be seen from here.", details=details)

    def _not_translated(self, text: str, way: Way) -> Statement:
        details = self.rules.lines(way.hops)
        untracking = self.rules.untracking(way.hops)
        if untracking:
            text = f"{text}: a rule in {untracking.place} takes it from connection tracking (notrack)"
            remedy = "change that rule, with the tool that owns the table, so that it spares what pods send"
            return problem(text, "Nothing translates it back, and the client drops it.", remedy, details)
        meaning = "Connection tracking does not know the connection that it belongs to, and does not translate it back."
        return problem(text, meaning, "see the rules that it met, and those of 'ct zone set'", details)
