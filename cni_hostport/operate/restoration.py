"""Many attachments, restored in as few transactions as it takes: ``operate.restore`` says what has to hold meanwhile.

One that is refused costs the others nothing. Where a transaction fails, its attachments are looked at again, and each
half of them takes a transaction of its own. So the outcomes are those of a restoration one after another.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from cni_hostport import failures, ownership
from cni_hostport.dynamic_ports import allocation, picker
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.kernel import conntrack, localnet, refusals
from cni_hostport.lookup import Lookup
from cni_hostport.migration import removal
from cni_hostport.names import dnat_chain
from cni_hostport.operate.cached_attachments import CacheReader
from cni_hostport.operate.deletion_watch import DELETED, DeletionWatch
from cni_hostport.operate.outcome import Outcome, OutcomeStatus
from cni_hostport.ownership import Reinstatement
from cni_hostport.portmap import Rules
from cni_hostport.ruleset.base import deleted_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.check import Comparison
    from cni_hostport.kernel.nft import Nft
    from cni_hostport.log import Log
    from cni_hostport.operate.cached_attachments import CachedAttachment, Outcomes
    from cni_hostport.operate.deletion_watch import Refusal
    from cni_hostport.ruleset.installed import Installed
    from cni_hostport.ruleset.plan import Plan

AT_ONCE = 500  # attachments in a transaction, at most


class Restoration:
    """The restoration of all attachments that caches have; ``before`` is the ruleset as it was read first."""

    def __init__(self, nft: Nft, before: Installed, comparison: Comparison, log: Log, *, dry_run: bool) -> None:
        """Begin it; where it is a ``dry_run``, nothing is changed."""
        self.watch = DeletionWatch(log)
        self._nft = nft
        self._comparison = comparison
        self._log = log
        self._dry_run = dry_run
        self._before = self._installed = before
        self._claimed = set[tuple[str, str]]()  # what was restored since ``_installed`` was read
        self._lookup = Lookup()
        self._lookup.leave_open()
        self._reader = CacheReader(nft, self._lookup, self.watch)

    def restore(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Outcome]]:
        """Restore the attachments in files; yield the outcomes of those that have mappings, in the order of the files.

        Of two that want the same, the first one gets it. But those for which ports have to be picked come last: what is
        free is known once all others have those that they had.
        """
        yield from self._restore_all(paths)
        self._reader.picks = True
        yield from self._restore_all(self._reader.lacking)

    def _restore_all(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Outcome]]:
        for start in range(0, len(paths), AT_ONCE):
            part = paths[start : start + AT_ONCE]
            outcomes = self._restore(part)
            yield from ((path, outcome) for path in part if (outcome := outcomes[path]))

    def _restore(self, paths: Sequence[Path], attempt: int = 0) -> Outcomes:
        """Restore the attachments in files by one transaction, or by more where one is not enough.

        Always the ruleset is read first, then the cache: the transaction notices what was changed in between.
        """
        wanted, outcomes, unread = self._reader.read(paths)
        ready: list[tuple[CachedAttachment, Reinstatement]] = []
        refused: list[tuple[CachedAttachment, Refusal]] = []
        later: list[CachedAttachment] = []
        claimed, prepare = set(self._claimed), self._preparation(wanted)
        for item in wanted:
            try:
                prepared = prepare(item)
            except (CNIError, NFTError, ValueError) as error:
                refused.append((item, error))
                continue
            if isinstance(prepared, Outcome):
                outcomes[item.entry.path] = prepared
                continue
            if prepared.conflicts.isdisjoint(claimed):
                ready.append((item, prepared))
            else:
                later.append(item)
            claimed |= prepared.claims  # also of one that waits: nobody younger goes before it
        outcomes |= self._install(ready, attempt) if ready else {}
        for item, refusal in refused:
            outcomes |= self._go_on([item], refusal, attempt)
        if later:
            outcomes |= self._restore_after_listing(later)
        for path in unread:
            outcomes |= self._restore([path])
        return outcomes

    def _restore_after_listing(self, items: Sequence[CachedAttachment], attempt: int = 0) -> Outcomes:
        """Restore attachments after another look at the ruleset."""
        try:
            self._installed = self._nft.installed()
        except NFTError as error:
            return {item.entry.path: self.watch.note_refused(item.entry, error) for item in items}
        self._claimed.clear()
        return self._restore(_paths(items), attempt)

    def _preparation(self, wanted: Sequence[CachedAttachment]) -> Callable[[CachedAttachment], Reinstatement | Outcome]:
        """Return what prepares the reinstatement of these attachments one by one, or tells that there is none to do.

        It raises ``CNIError`` and ``NFTError`` if an attachment cannot be restored.
        """
        kept = [item for item in wanted if item.attachment.key in self._installed.holders]
        unchanged = self._comparison.unchanged([(item.attachment, item.plan) for item in kept])
        rules, opened = functools.cache(lambda: Rules(self._lookup)), set[int]()
        base = functools.cache(ownership.base_and_services_commands)

        def is_installed(item: CachedAttachment) -> bool:
            """Tell whether there are no rules to install: they are as they should be, or were added since then."""
            key, token = item.attachment.key, dnat_chain(item.attachment.key)
            if key in unchanged or self._installed.chains.get(token) not in {None, self._before.chains.get(token)}:
                return True
            return key in self._installed.holders and not self._comparison.is_changed(item.attachment, item.plan)

        def prepare(item: CachedAttachment) -> Reinstatement | Outcome:
            attachment, plan = item.attachment, item.plan
            if is_installed(item):
                if not self._dry_run:
                    self._open(plan, opened)  # others may have reset route_localnet
                return item.outcome(OutcomeStatus.PRESENT)
            if self._dry_run:
                removal.claims_of_gone_containers(rules(), attachment, plan)
            elif rules().may_exist():
                removal.make_room(rules(), attachment, plan, self._log)
            reinstatement = Reinstatement(self._nft, attachment, plan, self._installed)
            if not self._dry_run:
                return reinstatement
            commands = [*base(), *reinstatement.commands]
            return item.outcome(OutcomeStatus.MISSING, commands=commands)

        return prepare

    def _install(self, ready: Sequence[tuple[CachedAttachment, Reinstatement]], attempt: int) -> Outcomes:
        """Run one transaction; where it fails, go on with parts."""
        try:
            deleted = self._lookup.deleted([item.attachment.key for item, _ in ready])
            living = [(item, prepared) for item, prepared in ready if item.attachment.key not in deleted]
            if living:
                ownership.reinstate(self._nft, [prepared for _, prepared in living])
        except (CNIError, NFTError) as error:
            return self._go_on([item for item, _ in ready], error, attempt)
        self._claimed.update(*(prepared.claims for _, prepared in living))
        gone = (item for item, _ in ready if item.attachment.key in deleted)
        outcomes: Outcomes = {item.entry.path: item.outcome(OutcomeStatus.GONE, DELETED) for item in gone}
        hidden = self._given_up(living)
        outcomes |= self._follow_up([(item, prepared) for item, prepared in living if item not in hidden])
        return outcomes | (self._restore_after_listing(hidden) if hidden else {})

    def _given_up(self, installed: Sequence[tuple[CachedAttachment, Reinstatement]]) -> list[CachedAttachment]:
        """Remove again, and return, those whose dynamic ports others have mapped meanwhile, for one host address.

        Their transaction could not notice that.
        """
        dynamic = [(item, prepared) for item, prepared in installed if item.plan.assigned]
        if not dynamic:
            return []
        found = []
        try:
            given = picker.given(self._lookup, (4, 6))
            for item, prepared in dynamic:
                if allocation.given_elsewhere(prepared.held, given):
                    prepared.take_over(self._log)  # those that had to leave have left
                    ownership.release(self._nft, item.attachment.key, self._log, is_deleted=False)
                    found.append(item)
        except (CNIError, NFTError) as error:
            self._log(f"warning: whether others have the dynamic host ports that were restored is not known: {error}")
        return found

    def _go_on(self, items: Sequence[CachedAttachment], error: Refusal, attempt: int) -> Outcomes:
        """Go on after a transaction, or what came before it, has failed: with each half; with one alone, once more."""
        is_race = isinstance(error, NFTError) and refusals.may_be_a_race(error)
        if len(items) > 1:
            half = len(items) // 2
            first = self._restore_after_listing(items[:half]) if is_race else self._restore(_paths(items[:half]))
            return first | self._restore(_paths(items[half:]))
        [item] = items
        path = item.entry.path
        if isinstance(error, NFTError):
            note = deleted_command("create", item.attachment.key)
            if any(command == note for _, command in error.refusals):
                return {path: item.outcome(OutcomeStatus.GONE, DELETED)}
            if is_race and attempt < ownership.ATTEMPTS - 1:
                ownership.pause(attempt)
                return self._restore_after_listing(items, attempt + 1)
            error = failures.lost_races(error, ownership.ATTEMPTS) if is_race else failures.refused(error)
        return {path: self.watch.note_refused(item.entry, error)}

    def _follow_up(self, installed: Sequence[tuple[CachedAttachment, Reinstatement]]) -> Outcomes:
        """Do what restored attachments need besides their rules."""
        try:
            self.watch.note_restored({item.attachment.key: item.entry for item, _ in installed})
        except NFTError as error:  # they are restored all the same
            self._log(f"warning: whether attachments that were restored are being deleted cannot be watched: {error}")
        outcomes: Outcomes = {}
        in_force: list[Plan] = []
        opened = set[int]()
        for item, prepared in installed:
            try:
                prepared.take_over(self._log)
                self._open(prepared.held, opened)
                self._reader.write_note(item.attachment, self._log)
            except (CNIError, NFTError) as error:
                outcomes[item.entry.path] = self.watch.note_refused(item.entry, error)
            else:
                outcomes[item.entry.path] = item.outcome(OutcomeStatus.RESTORED)
                in_force.append(prepared.held)
        conntrack.forget_elsewhere(in_force, lambda: self._nft.installed().given_ports, self._log)
        return outcomes

    def _open(self, plan: Plan, opened: set[int]) -> None:
        """Open the interface towards a pod for 127.0.0.0/8, if it is not among those that were just opened."""
        if plan.interface not in opened:
            localnet.open_for(plan, self._log)
            opened |= {plan.interface} if plan.local_route_to and plan.interface else set()


def _paths(items: Sequence[CachedAttachment]) -> list[Path]:
    return [item.entry.path for item in items]
