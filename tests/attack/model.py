"""What the ruleset should hold after any sequence of operations, in plain Python: the promises of the README alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from cni_hostport import attachment as names

if TYPE_CHECKING:
    from collections.abc import Mapping

NOWHERE = ip_address("::1")  # the kernel forwards nothing from there


class Attachment(NamedTuple):
    """An attachment, by what a runtime calls it."""

    network: str
    container: str
    ifname: str

    @property
    def key(self) -> str:
        return names.Attachment(*self).key


class PortMapping(NamedTuple):
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
    namespace: int


class RefusedError(Exception):
    """A living container is in the way."""


def forwards(mappings: list[PortMapping], addresses: list[str]) -> dict[Port, tuple[str, int]]:
    """Return where ports should lead."""
    found = {}
    for mapping in mappings:
        for address in addresses:
            version = ip_address(address).version
            host_ip = ip_address(mapping.host_ip) if mapping.host_ip else None
            if mapping.port and (host_ip is None or (host_ip.version == version and host_ip != NOWHERE)):
                found[Port(version, mapping.host_ip, mapping.protocol, mapping.port)] = (address, mapping.target)
    return found


@dataclass
class Model:
    """The node: attachments, who wants each port in the order in which they get it, and namespaces.

    ``namespaces`` tell which one is at a container's path now, ``None`` if none is. ``deleted`` are the attachments
    that a restoration must not bring back. ``opened_here`` tells whether this plugin let 127.0.0.0/8 out.
    """

    held: dict[Attachment, Held] = field(default_factory=dict)
    queues: dict[Port, list[Attachment]] = field(default_factory=dict)
    namespaces: dict[str, int | None] = field(default_factory=dict)
    deleted: set[Attachment] = field(default_factory=set)
    has_base: bool = False
    is_whole: bool = False
    notes_deletions: bool = False
    is_guarded: bool = False
    is_open: bool = False
    opened_here: bool = False

    def claim(
        self, attachment: Attachment, mappings: list[PortMapping], addresses: list[str], *, again: bool = False
    ) -> None:
        """ADD, or ``again`` a restoration; raises ``RefusedError``, with nothing changed."""
        wanted = forwards(mappings, addresses)
        pods = {pod for pod, _ in wanted.values()}
        addresses = [address for address in addresses if address in pods]
        if not wanted:
            if attachment in self.held:
                self.release(attachment)
            return
        former = {other for other, held in self.held.items() if set(addresses) & set(held.addresses)} - {attachment}
        shared = {
            port for port in wanted if self.queues.get(port) and self._is_beside(self.queues[port][0], attachment)
        }
        shared = {port for port in shared if self.queues[port][0] not in former}
        leaving = set(former)
        for holder in former:
            has_moved = holder.network == attachment.network or self._is_beside(holder, attachment)
            if self.is_alive(holder) and (again or not has_moved):
                raise RefusedError
        for port in set(wanted) - shared:
            queue = self.queues.get(port, [])
            if queue[:1] != [attachment]:
                for holder in set(queue) - leaving - {attachment}:
                    if self.is_alive(holder):
                        raise RefusedError
                    leaving.add(holder)
        self._install(attachment, wanted, addresses, shared, leaving, again=again)

    def _install(
        self,
        attachment: Attachment,
        wanted: dict[Port, tuple[str, int]],
        addresses: list[str],
        shared: set[Port],
        leaving: set[Attachment],
        *,
        again: bool,
    ) -> None:
        for other in leaving | {attachment}:
            self._leave(other)
        for port in wanted:
            queue = self.queues.setdefault(port, [])
            queue.insert(len(queue) if port in shared else 0, attachment)
        namespace = self.namespaces[attachment.container]
        assert namespace is not None
        self.held[attachment] = Held(wanted, addresses, namespace)
        self.deleted.discard(attachment)
        self.has_base = self.is_whole = True
        if self._needs_localhost(attachment):
            if not self.is_guarded:
                self.is_guarded, self.opened_here = True, again or not self.is_open
            self.is_open = True
        self._close()

    def release(self, attachment: Attachment, *, wants_ports: bool = False) -> None:
        """DEL; ``wants_ports`` if the call has a word of mappings."""
        if attachment in self.held or wants_ports or self.notes_deletions:
            self.deleted.add(attachment)
        self._leave(attachment)
        self._close()

    def has(self, attachment: Attachment, mappings: list[PortMapping], addresses: list[str]) -> bool:
        """CHECK: tell whether an attachment is as ADD would install it, the base included."""
        wanted = forwards(mappings, addresses)
        return not wanted or (self.is_whole and attachment in self.held and self.held[attachment].targets == wanted)

    def collect(self, network: str, valid: set[Attachment]) -> None:
        """GC of a network."""
        for attachment in sorted(self.held, key=lambda held: held.key):
            if attachment.network == network and attachment not in valid:
                self.release(attachment)

    def restore(self, cached: Mapping[Attachment, tuple[list[PortMapping], list[str]]]) -> dict[Attachment, str]:
        """Restore attachments in the order of their last ADD, and return what becomes of those that have host ports."""
        entries = {
            attachment: asked for attachment, asked in cached.items() if any(mapping.port for mapping in asked[0])
        }
        if entries or self.has_base:
            self.has_base = self.is_whole = self.notes_deletions = True
        found = {attachment: self._restore(attachment, *asked) for attachment, asked in entries.items()}
        return {attachment: status for attachment, status in found.items() if status}

    def _restore(self, attachment: Attachment, mappings: list[PortMapping], addresses: list[str]) -> str:
        wanted = forwards(mappings, addresses)
        if self.namespaces[attachment.container] is None:
            return "gone"
        if not wanted:
            return ""
        if attachment in self.held and self.held[attachment].targets == wanted:
            return "present"
        if attachment in self.deleted:
            return "gone"
        try:
            self.claim(attachment, mappings, addresses, again=True)
        except RefusedError:
            return "failed"
        return "restored"

    def flush(self) -> None:
        """Somebody deletes the table, or the whole ruleset; whether 127.0.0.0/8 is let out is no part of that."""
        self.held, self.queues, self.deleted = {}, {}, set()
        self.has_base = self.is_whole = self.notes_deletions = self.is_guarded = self.opened_here = False

    def _leave(self, attachment: Attachment) -> None:
        self.held.pop(attachment, None)
        for port, queue in list(self.queues.items()):
            self.queues[port] = [waiter for waiter in queue if waiter != attachment]
            if not self.queues[port]:
                del self.queues[port]

    def _close(self) -> None:
        if not self.is_guarded or any(map(self._needs_localhost, self.held)):
            return
        if self.opened_here:
            self.is_open = False
        self.is_guarded = self.is_open
        self.opened_here = False

    def _needs_localhost(self, attachment: Attachment) -> bool:
        return any(port.version == 4 for port in self.held[attachment].targets)

    def is_alive(self, attachment: Attachment) -> bool:
        """Tell whether an attachment's namespace is the one that is at its path."""
        return self.held[attachment].namespace == self.namespaces[attachment.container]

    def _is_beside(self, holder: Attachment, attachment: Attachment) -> bool:
        return holder.container == attachment.container and holder != attachment and self.is_alive(holder)
