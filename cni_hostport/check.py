"""Is an attachment installed as ADD would install it now?

The same commands are run in an empty network namespace, so that nftables itself tells how the result should look.
Nothing of one comparison is left when the next begins: their number costs neither memory nor descriptors.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain

from cni_hostport import names
from cni_hostport.errors import CNIError, Code, NFTError
from cni_hostport.kernel import netns
from cni_hostport.kernel.nft import Nft
from cni_hostport.kernel.snapshot import base_snapshot, snapshot, snapshots
from cni_hostport.lookup import Lookup
from cni_hostport.ruleset import base
from cni_hostport.ruleset.commands import attach_commands, claims, guard_commands

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from cni_hostport.attachment import Attachment
    from cni_hostport.ruleset.plan import Forward, Plan

    Wanted = tuple[Attachment, Plan]

SNAPSHOT_ATTEMPTS = 3  # each but the last was spoiled by somebody else's change


class Comparison:
    """Compares what is installed in this network namespace with what is run in an empty one, as often as asked."""

    def __init__(self, nft: Nft | None = None) -> None:
        """Take the access to nftables here, where there is one already."""
        self._given, self._is_empty = nft, True

    @cached_property
    def _node(self) -> Lookup:
        return Lookup()

    @cached_property
    def _nft(self) -> Nft:
        return self._given or Nft()

    @cached_property
    def _scratch(self) -> tuple[Lookup, Nft]:
        """The ways to look at what is in the empty network namespace."""
        try:
            with netns.scratch_namespace():
                return Lookup(), Nft()
        except OSError as error:
            raise CNIError(Code.HOST_SETTING, f"cannot compare the installed rules: {error}") from error

    def differences(self, attachment: Attachment, plan: Plan) -> list[str]:
        """Return, one sentence each, in what the attachment and the base below it are not as they should be.

        Raises ``CNIError`` with ``Code.HOST_SETTING`` if there is nowhere to compare with, and ``NFTError`` if nftables
        refuses the plan or cannot be asked.
        """
        expected = snapshot(self._run_in_scratch(_commands(attachment, plan))[0], attachment.key)
        if expected is not None and expected == snapshot(self._node, attachment.key):
            return []
        return self._differences_of_listings(attachment, plan)

    def is_changed(self, attachment: Attachment, plan: Plan) -> bool:
        """Tell whether chains or elements of an attachment, the base aside, are not as they should be.

        Raises what ``differences`` does.
        """
        return any(attachment.key in line for line in self.differences(attachment, plan))

    def unchanged(self, wanted: Sequence[Wanted]) -> set[str]:
        """Return the keys of those of many attachments that certainly are as they should be, the base aside.

        They are compared all at once. Of the others, ``is_changed`` tells.
        """
        found = set[str]()
        while wanted:
            apart, wanted = _apart(wanted)
            found |= self._unchanged(apart)
        return found

    def _unchanged(self, apart: Sequence[Wanted]) -> set[str]:
        """Return what ``unchanged`` does of attachments that can be in one ruleset."""
        commands = [command for attachment, plan in apart for command in _commands(attachment, plan)]
        try:
            lookup, _ = self._run_in_scratch(commands, names_refused=False)
            expected = snapshots(lookup) or {}
            actual = next(filter(None, (snapshots(self._node) for _ in range(SNAPSHOT_ATTEMPTS))), {})
        except (CNIError, NFTError):
            half = len(apart) // 2
            return self._unchanged(apart[:half]) | self._unchanged(apart[half:]) if half else set()
        return {key for key, held in expected.items() if actual.get(key) == held}

    def damaged_base_chains(self, chains: Sequence[str] = tuple(base.BASE_CHAINS)) -> list[str]:
        """Return which of the base's chains, as in ``chain inet hostport dispatch``, are not as ADD makes them.

        Raises what ``differences`` does.
        """
        lookup, scratch = self._run_in_scratch([])
        whole = base_snapshot(lookup)
        if whole is not None and whole == base_snapshot(self._node):
            return []
        from cni_hostport.ruleset import differences

        objects = [f"chain {names.FAMILY} {names.TABLE} {name}" for name in chains]
        expected, actual = (
            {listed: nft.listing(listed) for listed in (differences.TABLES, *objects)} for nft in (scratch, self._nft)
        )
        found = differences.differences("", expected=expected, actual=actual)
        return [chain for chain in objects if any(line.startswith(f"{chain} ") for line in found)] or found

    def declared_by_type(self, table: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the maps and sets that an older version of this plugin declared so that older nft crash.

        ``table`` is nft's listing of the table.

        The list is empty where nftables is too old for that: such a version does not list how keys were declared.
        Raises what ``differences`` does.
        """
        _, scratch = self._run_in_scratch([])
        expected, actual = _declared(scratch.listing(f"table {names.FAMILY} {names.TABLE}")), _declared(table)
        by_type = {name for name, key in actual.items() if not isinstance(key, dict)}
        return [name for name, key in expected.items() if isinstance(key, dict) and name in by_type]

    def _differences_of_listings(self, attachment: Attachment, plan: Plan) -> list[str]:
        from cni_hostport import precedence
        from cni_hostport.ruleset import differences

        key = attachment.key
        holders = precedence.shared_ports(self._nft.installed(), attachment, plan)
        lookup, scratch = self._run_in_scratch(_commands(attachment, plan, holders))
        found = differences.differences(key, expected=scratch.state(key), actual=self._nft.state(key))
        interface = lookup.guarded_interface(key)
        if interface and interface != self._node.guarded_interface(key):
            found.append(f"set {names.FAMILY} {names.TABLE} {names.LOCALNET} lacks interface {interface} for {key}")
        return found

    def _run_in_scratch(self, commands: Sequence[str], *, names_refused: bool = True) -> tuple[Lookup, Nft]:
        """Have the base and what these commands make in the empty network namespace, and return the ways to look."""
        emptied = [] if self._is_empty else [base.table_command(), f"delete table {names.FAMILY} {names.TABLE}"]
        self._is_empty = False
        self._scratch[1].run([*emptied, *base.base_commands(), *commands], names_refused=names_refused)
        return self._scratch


def _apart(wanted: Sequence[Wanted]) -> tuple[list[Wanted], list[Wanted]]:
    """Part attachments: the first that want a port or have an address can be in one ruleset, the others not beside."""
    apart: list[Wanted] = []
    others: list[Wanted] = []
    claimed = set[object]()
    for attachment, plan in wanted:
        ports = chain.from_iterable(map(claims, plan.forwards))
        claiming = {attachment.key, *plan.masquerade, *ports}
        (others if claiming & claimed else apart).append((attachment, plan))
        claimed |= claiming
    return apart, others


def _declared(listed: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    return {
        f"{kind} {names.FAMILY} {names.TABLE} {item[kind]['name']}": item[kind]["type"]
        for item in listed
        for kind in ("map", "set")
        if kind in item
    }


def _commands(attachment: Attachment, plan: Plan, holders: Mapping[Forward, str] | None = None) -> list[str]:
    """Return the commands that install an attachment where there is no other."""
    chains = [names.dnat_chain(key) for key in dict.fromkeys((holders or {}).values())]
    commands = [f"add chain {names.FAMILY} {names.TABLE} {chain}" for chain in chains]
    if plan.local_route_to and plan.interface:
        commands += guard_commands(plan.interface, opens=True, needed_by=attachment.key)
    return commands + attach_commands(attachment, plan, holders)
