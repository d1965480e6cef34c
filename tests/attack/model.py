"""What the ruleset should hold after any sequence of operations, in plain Python: the promises of the README alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from cni_hostport.attachment import Attachment

if TYPE_CHECKING:
    from collections.abc import Mapping

NOWHERE = ip_address("::1")  # the kernel forwards nothing from there


class Who(NamedTuple):
    """An attachment, by what a runtime calls it."""

    network: str
    container: str
    ifname: str

    @property
    def key(self) -> str:
        return Attachment(*self).key


class Wish(NamedTuple):
    """One mapping; ``host_ip`` is empty for any."""

    port: int
    target: int
    protocol: str
    host_ip: str


class Port(NamedTuple):
    """What one attachment alone can hold: a host port of one family."""

    version: int
    host_ip: str
    protocol: str
    number: int


@dataclass
class Held:
    """What an attachment has: the targets of its ports, its addresses, and the namespace in which it was added."""

    targets: dict[Port, tuple[str, int]]
    addresses: list[str]
    namespace: int | None


class RefusedError(Exception):
    """A living container is in the way."""


def forwards(wishes: list[Wish], addresses: list[str]) -> dict[Port, tuple[str, int]]:
    """Return where ports should lead."""
    found = {}
    for wish in wishes:
        for address in addresses:
            version = ip_address(address).version
            host_ip = ip_address(wish.host_ip) if wish.host_ip else None
            if wish.port and (host_ip is None or (host_ip.version == version and host_ip != NOWHERE)):
                found[Port(version, wish.host_ip, wish.protocol, wish.port)] = (address, wish.target)
    return found


@dataclass
class Model:
    """The node: attachments, who wants each port in the order in which they get it, and namespaces.

    ``namespaces`` tell which one is at a container's path now, ``None`` if none is. ``deleted`` are the attachments
    that a restoration must not bring back. ``opened`` tells who let the node's 127.0.0.0/8 out to the pods.
    """

    held: dict[Who, Held] = field(default_factory=dict)
    queues: dict[Port, list[Who]] = field(default_factory=dict)
    namespaces: dict[str, int | None] = field(default_factory=dict)
    deleted: set[Who] = field(default_factory=set)
    has_base: bool = False
    is_whole: bool = False
    notes_deletions: bool = False
    is_guarded: bool = False
    is_open: bool = False
    opened_here: bool = False

    def claim(self, who: Who, wishes: list[Wish], addresses: list[str], *, again: bool = False) -> None:
        """ADD, or ``again`` a restoration; raises ``RefusedError``, with nothing changed."""
        wanted = forwards(wishes, addresses)
        addresses = [of for of in addresses if any(pod == of for pod, _ in wanted.values())]
        if not wanted:
            if who in self.held:
                self.release(who)
            return
        former = {of for of, held in self.held.items() if set(addresses) & set(held.addresses)} - {who}
        shared = {port for port in wanted if self.queues.get(port) and self._is_beside(self.queues[port][0], who)}
        shared = {port for port in shared if self.queues[port][0] not in former}
        leaving = set(former)
        for holder in former:
            has_moved = holder.network == who.network or self._is_beside(holder, who)
            if not self._is_gone(holder, who) and (again or not has_moved):
                raise RefusedError
        for port in set(wanted) - shared:
            queue = self.queues.get(port, [])
            if queue[:1] != [who]:
                for holder in set(queue) - leaving - {who}:
                    if not self._is_gone(holder, who):
                        raise RefusedError
                    leaving.add(holder)
        self._install(who, wanted, addresses, shared, leaving, again=again)

    def _install(
        self,
        who: Who,
        wanted: dict[Port, tuple[str, int]],
        addresses: list[str],
        shared: set[Port],
        leaving: set[Who],
        *,
        again: bool,
    ) -> None:
        for of in leaving | {who}:
            self._leave(of)
        for port in wanted:
            queue = self.queues.setdefault(port, [])
            queue.insert(len(queue) if port in shared else 0, who)
        self.held[who] = Held(wanted, addresses, self.namespaces[who.container])
        self.deleted.discard(who)
        self.has_base = self.is_whole = True
        if self._needs_localhost(who):
            if not self.is_guarded:
                self.is_guarded, self.opened_here = True, again or not self.is_open
            self.is_open = True
        self._close()

    def release(self, who: Who, *, wants_ports: bool = False) -> None:
        """DEL; ``wants_ports`` if the call has a word of mappings."""
        if who in self.held or wants_ports or self.notes_deletions:
            self.deleted.add(who)
        self._leave(who)
        self._close()

    def has(self, who: Who, wishes: list[Wish], addresses: list[str]) -> bool:
        """CHECK: tell whether an attachment is as ADD would install it, the base included."""
        wanted = forwards(wishes, addresses)
        return not wanted or (self.is_whole and who in self.held and self.held[who].targets == wanted)

    def collect(self, network: str, valid: set[Who]) -> None:
        """GC of a network."""
        for who in sorted((of for of in self.held if of.network == network and of not in valid), key=lambda of: of.key):
            self.release(who)

    def restore(self, cached: Mapping[Who, tuple[list[Wish], list[str]]]) -> dict[Who, str]:
        """Restore attachments in the order of their last ADD, and return what becomes of those that have host ports."""
        entries = {who: asked for who, asked in cached.items() if any(wish.port for wish in asked[0])}
        if entries or self.has_base:
            self.has_base = self.is_whole = self.notes_deletions = True
        found = {who: self._restore(who, *asked) for who, asked in entries.items()}
        return {who: status for who, status in found.items() if status}

    def _restore(self, who: Who, wishes: list[Wish], addresses: list[str]) -> str:
        wanted = forwards(wishes, addresses)
        if self.namespaces[who.container] is None:
            return "gone"
        if not wanted:
            return ""
        if who in self.held and self.held[who].targets == wanted:
            return "present"
        if who in self.deleted:
            return "gone"
        try:
            self.claim(who, wishes, addresses, again=True)
        except RefusedError:
            return "failed"
        return "restored"

    def flush(self) -> None:
        """Somebody deletes the table, or the whole ruleset; whether 127.0.0.0/8 is let out is no part of that."""
        self.held, self.queues, self.deleted = {}, {}, set()
        self.has_base = self.is_whole = self.notes_deletions = self.is_guarded = self.opened_here = False

    def _leave(self, who: Who) -> None:
        self.held.pop(who, None)
        for port, queue in list(self.queues.items()):
            self.queues[port] = [of for of in queue if of != who]
            if not self.queues[port]:
                del self.queues[port]

    def _close(self) -> None:
        if not self.is_guarded or any(map(self._needs_localhost, self.held)):
            return
        if self.opened_here:
            self.is_open = False
        self.is_guarded = self.is_open
        self.opened_here = False

    def _needs_localhost(self, who: Who) -> bool:
        return any(port.version == 4 for port in self.held[who].targets)

    def is_alive(self, who: Who) -> bool:
        """Tell whether an attachment's namespace is the one that is at its path."""
        there, then = self.namespaces[who.container], self.held[who].namespace
        return there is not None and then in {None, there}

    def _is_gone(self, holder: Who, judge: Who) -> bool:
        return self.namespaces[judge.container] is not None and not self.is_alive(holder)

    def _is_beside(self, holder: Who, who: Who) -> bool:
        there, then = self.namespaces[who.container], self.held[holder].namespace
        return holder.container == who.container and holder != who and (there == then or None in {there, then})
