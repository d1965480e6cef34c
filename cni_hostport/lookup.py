"""One attachment in the kernel's ruleset: it is found by the names of its chains, and removed.

libnftables lists all chains of the node before it changes any, and it cannot tell which elements lead to a chain. Here
the kernel is asked for single objects, so that the cost does not grow with the node. The rules of an attachment say
which elements it should have; the kernel is asked for each of these, and says whether it leads to the attachment's
chains. Two cases are left to a listing: a rule that looks ports up in a map of the attachment, and an element without a
rule.
"""

from __future__ import annotations

import errno
import os

from cni_hostport import netlink, nf_answers, nf_tables
from cni_hostport.errors import NFTError
from cni_hostport.names import (
    ANY_ADDRESS,
    DYNAMIC,
    POD_MAPS,
    PORT_MAPS,
    PROTOCOLS,
    dnat_chain,
    interface_in,
    localnet_chain,
    masq_chain,
)
from cni_hostport.netlink import NETLINK_NETFILTER, Netlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.foreign_rules import Chain
    from cni_hostport.netlink import Message
    from cni_hostport.nf_tables import ElementKey


ASKED_AT_ONCE = 64  # objects; the socket's buffer has to hold all answers


class Held:
    """What an attachment holds: its elements, its chains, and the handle of the chain that is its ownership token.

    ``interface`` is the index of the interface on which it needs ``route_localnet``, 0 if there is none.
    """

    __slots__ = ("chains", "elements", "handle", "interface")

    def __init__(self, elements: list[ElementKey], chains: list[str], handle: bytes, interface: int) -> None:
        """Take what was found; the handle is empty if the token is missing, or if there may be more elements."""
        self.elements = elements
        self.chains = chains
        self.handle = handle
        self.interface = interface

    @property
    def ports(self) -> list[tuple[str, bytes | None, int]]:
        """The (protocol, packed host address or ``None`` for any, host port) of its mappings."""
        return [
            (PROTOCOLS[key[-8]], None if name == ANY_ADDRESS else key[:-8], int.from_bytes(key[-4:-2]))
            for name, key in self.elements
            if name in PORT_MAPS
        ]

    @property
    def dynamic_ports(self) -> list[bytes]:
        """The keys of its dynamic host ports, as the kernel has them."""
        return [key for name, key in self.elements if name == DYNAMIC]

    @property
    def pods(self) -> list[bytes]:
        """The packed addresses of its pod."""
        return [key for name, key in self.elements if name in POD_MAPS]


class Lookup:
    """Questions to nf_tables in the network namespace in which this was made.

    The methods raise ``NFTError`` where the kernel refuses an answer: without privileges, or without nf_tables.
    """

    def __init__(self, *, shared: bool = False) -> None:
        """Open a socket; or use the ``shared`` one, for callers that make many lookups."""
        try:
            self._netlink = netlink.shared(NETLINK_NETFILTER) if shared else Netlink(NETLINK_NETFILTER)
        except OSError as error:
            raise _failure(error.errno or 0) from error

    def existing(self, chains: Sequence[Chain]) -> list[Chain]:
        """Return those chains that there are."""
        answers = self.ask(*(nf_tables.get_chain(name, table, family) for family, table, name in chains))
        return [chain for chain, answer in zip(chains, answers, strict=True) if answer]

    def rules_of(self, chain: Chain) -> list[bytes] | None:
        """Return the rules of a chain, none if it is gone; ``None`` if some were changed while they were listed."""
        family, table, name = chain
        return self.dump(nf_tables.get_rules(name, table, family))

    def owner(self, table: str, family: str) -> int | None:
        """Return the netlink port of the program that alone may change a table, ``None`` if everybody may."""
        [answer] = self.ask(nf_tables.get_table(table, family))
        return nf_answers.owner(answer) if answer else None

    def is_dormant(self, table: str, family: str) -> bool:
        """Tell whether the rules of a table are switched off."""
        [answer] = self.ask(nf_tables.get_table(table, family))
        return answer is not None and nf_answers.is_dormant(answer)

    def chain_of(self, name: str, key: str) -> str:
        """Return the chain to which a port leads, empty if to none, by its map and its key as nft prints it."""
        [element] = self.ask(nf_tables.get_element((name, nf_tables.packed_port(key))))
        return nf_answers.target(element) if element else ""

    def label(self, chain: str) -> str:
        """Return the comment on the rules of a chain of the table, empty if they have none."""
        return next(filter(None, map(nf_answers.rule_comment, self.rules(chain))), "")

    def find(self, key: str) -> Held | None:
        """Return what an attachment holds, ``None`` if that is nothing.

        Elements of which no rule tells are not found; ``remove`` then does nothing.
        """
        masq, dnat = names = masq_chain(key), dnat_chain(key)
        needs = nf_tables.localnet_needs(key)
        *chains, needing = self.ask(*map(nf_tables.get_chain, names), nf_tables.get_element(needs))
        found = dict(zip(names, chains, strict=True))
        token = found[dnat]
        if token is None:
            return None if found[masq] is None else Held([], [masq], b"", 0)
        rules = self.rules(dnat)
        elements = [*self.elements(key, rules), *([needs] if needing else [])]
        interface = interface_in(nf_answers.target(needing)) if needing else 0
        # a rule that does not tell its elements does not tell either whether the attachment waits for a port
        handle = nf_answers.handle(token) if all(map(nf_answers.expected_elements, rules)) else b""
        return Held(elements, [name for name in names if found[name]], handle, interface)

    def remove(self, key: str, held: Held) -> bool:
        """Remove an attachment in one transaction; tell whether it was run: not if it is no longer as it was found."""
        if not held.handle:
            return False
        # the token goes by its handle, which a later chain of its name does not have; the other chain goes by its name,
        # since its handle may be that of another chain in a later table
        deletions = nf_tables.delete(held.elements, held.chains[:-1], held.handle)
        return self.commit(*deletions, *nf_tables.deletion_note(key))

    def members(self, name: str) -> set[bytes] | None:
        """Return the keys that a set of one-part keys holds, ``None`` where there is no such set.

        If the ruleset is changed meanwhile, some may be missing.
        """
        error, answers = self._dump(nf_tables.get_elements(name))
        return None if error == errno.ENOENT else {key for answer in answers for key in nf_answers.members(answer)}

    def notes_at_sets(self) -> list[tuple[str, bytes]]:
        """Return all sets and maps that there are, each with what nft noted there; perhaps not those changed now."""
        [(error, answers)] = self._exchange([nf_tables.get_sets()])
        if error not in {0, errno.EINTR}:
            raise _failure(error)
        return [nf_answers.notes_at_set(answer) for answer in answers]

    def is_deleted(self, key: str) -> bool:
        """Tell whether an attachment is among those that were deleted lately."""
        return self.ask(nf_tables.get_deleted(key)) != [None]

    def deleted(self, keys: Sequence[str]) -> set[str]:
        """Return which of these attachments are among those that were deleted lately."""
        answers = self.ask(*map(nf_tables.get_deleted, keys))
        return {key for key, answer in zip(keys, answers, strict=True) if answer}

    def tokens(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the handles of attachments' tokens by the attachments' keys, without those that have none."""
        answers = self.ask(*(nf_tables.get_chain(dnat_chain(key)) for key in keys))
        return {key: nf_answers.handle(answer) for key, answer in zip(keys, answers, strict=True) if answer}

    def note_deletion(self, key: str) -> bool:
        """Put an attachment that has nothing among the deleted ones; tell whether there is a set of them."""
        return self.commit(*nf_tables.deletion_note(key))

    def localnet_left(self, interface: int) -> bool | None:
        """Tell whether this plugin opened an interface that is guarded and that no attachment needs any more.

        ``None`` where one does, or it is not guarded.
        """
        chain, guarded = self._guard(interface)
        if chain is None or guarded is None or nf_answers.uses(chain):
            return None
        return nf_answers.has_comment(guarded)

    def is_guarded(self, interface: int) -> bool:
        """Tell whether an interface is guarded."""
        return None not in self._guard(interface)

    def _guard(self, interface: int) -> list[bytes | None]:
        return self.ask(
            nf_tables.get_chain(localnet_chain(interface)), nf_tables.get_element(nf_tables.localnet(interface))
        )

    def unguard(self, interface: int) -> bool:
        """Take the guard off an interface; tell whether that was done: not if an attachment needs it."""
        return self.commit(*nf_tables.unguard(interface))

    def leave_open(self) -> None:
        """Leave the socket open until the process ends: closing it can take longer than all else."""
        netlink.leave_open(self._netlink)

    def commit(self, *changes: Message) -> bool:
        """Run a transaction; tell whether it was run: not if the ruleset is not as the changes expect it."""
        self.leave_open()
        batch = nf_tables.transaction(*changes)
        beginning, *outcomes = (error for error, _ in self._exchange(batch, are_changes=True)[:-1])
        if beginning not in {0, errno.EIO}:  # the error of a transaction as a whole stands at its beginning
            raise _failure(beginning)
        errors = set(outcomes) - {0}
        if errors and not errors <= {errno.ENOENT, errno.EBUSY}:
            raise _failure(min(errors))
        return not errors

    def guarded_interface(self, key: str) -> int:
        """Return the index of the interface that is guarded since an attachment needs it, 0 where there is none."""
        [needing] = self.ask(nf_tables.get_element(nf_tables.localnet_needs(key)))
        interface = interface_in(nf_answers.target(needing)) if needing else 0
        return interface if self.ask(nf_tables.get_element(nf_tables.localnet(interface))) != [None] else 0

    def elements(self, key: str, rules: Sequence[bytes]) -> dict[ElementKey, bytes]:
        """Return the elements of an attachment of which its rules tell, with their verdicts.

        They lead to its chains, or say that it waits for a port that another attachment has.
        """
        expected = list(dict.fromkeys(element for rule in rules for element in nf_answers.expected_elements(rule)))
        chains = {masq_chain(key), dnat_chain(key)}
        found: dict[ElementKey, bytes] = {}
        waiters: list[ElementKey] = []
        for element, answer in zip(expected, self.ask(*map(nf_tables.get_element, expected)), strict=True):
            if answer and nf_answers.target(answer) in chains:
                found[element] = nf_answers.verdict(answer)
            elif answer and element[0] in PORT_MAPS:
                waiters.append(nf_tables.waiter(key, element))
        answers = zip(waiters, self.ask(*map(nf_tables.get_element, waiters)), strict=True)
        return found | {element: nf_answers.verdict(answer) for element, answer in answers if answer}

    def rules(self, chain: str) -> Sequence[bytes]:
        """Return the rules of a chain of the table, none if it is gone; perhaps not those changed now."""
        return self._dump(nf_tables.get_rules(chain))[1]

    def dump(self, message: Message) -> list[bytes] | None:
        """Return all that a message asks for, none if that is gone; ``None`` if some was changed meanwhile."""
        error, answers = self._dump(message)
        return None if error == errno.EINTR else answers

    def _dump(self, message: Message) -> tuple[int, list[bytes]]:
        [outcome] = self._exchange([message])
        if outcome[0] not in {0, errno.ENOENT, errno.EINTR}:
            raise _failure(outcome[0])
        return outcome

    def ask(self, *messages: Message) -> list[bytes | None]:
        """Return the object that each message asks for, ``None`` for one that does not exist."""
        parts = (messages[start : start + ASKED_AT_ONCE] for start in range(0, len(messages), ASKED_AT_ONCE))
        outcomes = [outcome for part in parts for outcome in self._exchange(part)]
        for error, _ in outcomes:
            if error not in {0, errno.ENOENT, errno.EINVAL}:  # invalid: a key that a map of another type cannot have
                raise _failure(error)
        return [answers[0] if answers else None for _, answers in outcomes]

    def _exchange(self, messages: Sequence[Message], *, are_changes: bool = False) -> list[tuple[int, list[bytes]]]:
        try:
            return self._netlink.ask(messages, are_changes=are_changes)
        except OSError as error:
            raise _failure(error.errno or 0) from error


def _failure(number: int) -> NFTError:
    return NFTError([(os.strerror(number), "netlink")])
