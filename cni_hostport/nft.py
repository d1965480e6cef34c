"""The kernel's nftables through libnftables: run a transaction, list. The only importer of ``nftables``."""

import json
import re
from collections.abc import Sequence
from ctypes import CDLL
from typing import Any

from cni_hostport import installed, ruleset

LIBRARY = "libnftables.so.1"
COMMAND_END = "; "


class NFTError(Exception):
    """nftables refused something, and nothing was changed.

    ``refusals`` are (reason, command), ``str()`` of the error the same for a person.
    """

    def __init__(self, refusals: list[tuple[str, str]]) -> None:
        """Keep the refusals apart."""
        super().__init__("; ".join(": ".join(filter(None, refusal)) for refusal in refusals))
        self.refusals = refusals

    @property
    def may_be_a_race(self) -> bool:
        """Tell whether somebody else's change can be the reason: something to create exists, or to delete does not."""
        return isinstance(self, ExistsError | NotFoundError | BusyError) and all(
            command.partition(" ")[0] in {"create", "delete", ""} for _, command in self.refusals
        )


class NotFoundError(NFTError):
    """A table, map, element or chain that was to be used or deleted does not exist."""


class ExistsError(NFTError):
    """A chain or a map element that was to be created exists."""


class BusyError(NFTError):
    """A chain that was to be deleted is still led into."""


class UnavailableError(NFTError):
    """libnftables cannot be loaded, or has no netlink socket."""


# in this order: a batch can fail for several reasons at once, and a key that has a holder is the one to look at first
_KINDS = {
    "File exists": ExistsError,
    "No such file or directory": NotFoundError,
    "Device or resource busy": BusyError,
}


class Nft:
    """A libnftables context, bound for good to the network namespace in which it was made."""

    def __init__(self) -> None:
        """Open the context; raises ``UnavailableError`` where there is no libnftables."""
        try:
            import nftables

            CDLL(LIBRARY)  # without it, the binding's destructor would write a traceback to stderr
            self._context = nftables.Nftables()
        except (ImportError, OSError, AttributeError) as error:
            raise UnavailableError([(f"libnftables cannot be used: {error}", "")]) from error
        self._context.set_json_output(True)

    def run(self, commands: Sequence[str]) -> None:
        """Run commands as one transaction: all of them or, with an ``NFTError``, none."""
        if not commands:
            return
        # on one line: libnftables marks the column of what was refused, but shows the first line whatever line it is
        status, _, error = self._context.cmd(COMMAND_END.join(commands))
        if status:
            raise _failure(error, commands)

    def listing(self, what: str) -> list[dict[str, Any]]:
        """Return the objects of ``list WHAT`` in libnftables' JSON, an empty list if there is no such thing."""
        command = f"list {what}"
        status, output, error = self._context.cmd(command)
        if not status:
            objects: list[dict[str, Any]] = json.loads(output)["nftables"] if output else []
            return objects
        failure = _failure(error, [command])
        if isinstance(failure, NotFoundError):
            return []
        raise failure

    def state(self, key: str) -> dict[str, list[dict[str, Any]]]:
        """Return the listings of all that one attachment's connections pass through."""
        return {what: self.listing(what) for what in installed.state_of(key)}

    def pod_name(self, key: str) -> str:
        """Return the ``namespace/name`` with which an attachment's rules are labelled, empty if they are not."""
        return installed.label(self.listing(f"chain {ruleset.FAMILY} {ruleset.TABLE} {ruleset.dnat_chain(key)}"))

    def installed(self) -> installed.Installed:
        """Return what the table holds, an empty result where there is no table."""
        # one call for each: nftables 1.0.6 fails on several lists in one
        return installed.Installed.read(item for what in installed.EVERYBODYS for item in self.listing(what))


def _failure(error: str, commands: Sequence[str]) -> NFTError:
    """Translate libnftables' messages; each is a line ``Error: reason``, the commands' line and a line of marks."""
    refusals = []
    for reason, marks in re.findall(r"^Error: (.*)\n.*\n( *\^+)?", error, re.MULTILINE):
        refusals.append((reason.removeprefix("Could not process rule: "), _command_at(marks.find("^"), commands)))
    refusals = refusals or [(error.strip() or "libnftables failed without a reason", "")]
    kinds = (kind for sign, kind in _KINDS.items() if any(sign in reason for reason, _ in refusals))
    return next(kinds, NFTError)(refusals)


def _command_at(column: int, commands: Sequence[str]) -> str:
    for command in commands:
        if 0 <= column < len(command):
            return command
        column -= len(command) + len(COMMAND_END)
    return ""
