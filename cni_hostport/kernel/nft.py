"""The kernel's nftables through libnftables: run a transaction, list."""

from __future__ import annotations

import json
import re

from cni_hostport.errors import LibraryEndedError, NFTError, NotFoundError
from cni_hostport.kernel.library import HANDLES, JSON, STATELESS, Context
from cni_hostport.kernel.library_process import NoProcessError, Process
from cni_hostport.netlink import LEFT_OPEN, leave_open, report_progress
from cni_hostport.ruleset.base import with_declarations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from cni_hostport.ruleset.installed import Installed

COMMAND_END = "; "
MAX_LEFT_OPEN = 64  # contexts and sockets; each context can be a process, and one process can have many contexts
LONGEST_LINE = 4096  # characters; a command that is longer is broken into lines
ELEMENTS_IN_LINE = 20  # at least, where a command is broken
# libnftables 1.0.6 knows one flag of tables, and prints for others what it finds in memory behind its name (src/json.c)
GARBAGE = r'("table": \{[^{}]*?), "flags": .*?(?=\}\})'


class Nft:
    """A libnftables context, bound for good to the network namespace in which it was made.

    All methods raise ``LibraryEndedError`` where libnftables ends instead of answering. ``crash`` is what it said of
    sets of others on which it crashes, where it could be used without them; empty where there are none.
    """

    context_type: type[Context | Process] = Process

    def __init__(self) -> None:
        """Open the context; raises ``UnavailableError`` where there is no libnftables."""
        self._context: Context | Process
        try:
            self._context = self.context_type()
        except NoProcessError:
            self._context = Context()
        self.crash = ""
        if len(LEFT_OPEN) < MAX_LEFT_OPEN:
            leave_open(self._context)

    def run(self, commands: Sequence[str], *, names_refused: bool = True) -> None:
        """Run commands as one transaction: all of them or, with an ``NFTError``, none.

        With ``names_refused``, the error names the commands that were refused. Of thousands, that takes long.
        """
        if not commands:
            return
        written = _in_columns if names_refused else _in_lines
        if self.crash:
            commands = with_declarations(commands)
        try:
            status, _, error = self._ask(written(commands), JSON, without_sets=bool(self.crash))
        except LibraryEndedError as end:
            if self.crash or not end.is_crash:
                raise
            commands = with_declarations(commands)
            status, _, error = self._ask(written(commands), JSON, without_sets=True)
            self.crash = str(end)
        if status:
            raise _failure(error, commands if names_refused else ())

    def listing(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of ``list NAME`` in libnftables' JSON, an empty list if there is no such thing."""
        command = f"list {name}"
        status, output, error = self._list(command, JSON)
        if not status:
            try:
                return _objects(output)
            except NFTError:
                if not name.startswith("tables"):
                    raise
                return self._tables(command)
        failure = _failure(error, [command])
        if isinstance(failure, NotFoundError):
            return []
        raise failure

    def rules(self, chain: str) -> dict[int, str]:
        """Return the rules of a chain, ``FAMILY TABLE NAME``, as nft prints them, by handle; none if it is gone."""
        _, output, _ = self._list(f"list chain {chain}", HANDLES, STATELESS)
        return {int(handle): rule for rule, handle in re.findall(r"^\t\t(.*) # handle (\d+)$", output, re.MULTILINE)}

    def _tables(self, command: str) -> list[dict[str, Any]]:
        """Return the tables of a listing whose JSON ends at one with flags that libnftables does not know."""
        from cni_hostport.lookup import Lookup

        _, output, _ = self._list(command)
        tables = [line.split() for line in output.splitlines() if line.startswith("table ")]
        lookup = Lookup()
        return [
            {"table": {"family": family, "name": name} | ({"flags": "dormant"} if dormant else {})}
            for _, family, name, *_ in tables
            for dormant in [lookup.is_dormant(name, family)]
        ]

    def _ask(self, command: str, *output: str, without_sets: bool = False) -> tuple[int, str, str]:
        report_progress()
        # what others put in the ruleset need not be UTF-8, which the binding takes for granted when it is given text
        answer = self._context.ask(command.encode(), output, without_sets=without_sets)
        status, printed, error = answer
        return status, printed.decode(errors="replace"), error.decode(errors="replace")

    def _list(self, command: str, *output: str) -> tuple[int, str, str]:
        try:
            return self._ask(command, *output)
        except LibraryEndedError as end:
            # without sets, it lists everything that is not about them, and does not say that something lacks
            if not end.is_crash or not command.startswith("list tables"):
                raise
            return self._ask(command, *output, without_sets=True)

    def state(self, key: str) -> dict[str, list[dict[str, Any]]]:
        """Return the listings of all that one attachment's connections pass through."""
        from cni_hostport.ruleset.differences import TABLES, WHOLE_TABLE, attachment_listings

        # each listing, of whatever, reads all elements of the table: one of everything costs little more than one
        return {TABLES: self.listing(TABLES), **attachment_listings(self.listing(WHOLE_TABLE), key)}

    def pod_name(self, key: str) -> str:
        """Return the ``namespace/name`` with which an attachment's rules are labelled, empty if they are not."""
        from cni_hostport.ruleset.installed import pod_label, token_listing

        return pod_label(self.listing(token_listing(key)))

    def installed(self) -> Installed:
        """Return what the table holds, an empty result where there is no table."""
        from cni_hostport.ruleset.installed import LISTINGS, Installed

        # one call for each: nftables 1.0.6 fails on several lists in one
        return Installed.read(item for name in LISTINGS for item in self.listing(name))


def _objects(output: str) -> list[dict[str, Any]]:
    """Read a listing; raises ``NFTError`` if it is not JSON."""
    if not output:
        return []
    try:
        objects: list[dict[str, Any]] = json.loads(output, strict=False)["nftables"]
    except (ValueError, KeyError, TypeError):
        try:
            objects = json.loads(re.sub(GARBAGE, r"\1", output), strict=False)["nftables"]
        except (ValueError, KeyError, TypeError) as error:
            raise NFTError([(f"libnftables' listing cannot be read: {error}", "")]) from error
    return objects


def _in_lines(commands: Sequence[str]) -> str:
    """Return commands as one text whose first line, which libnftables repeats at each refusal, is empty."""
    return "\n".join(("", *commands))


def _in_columns(commands: Sequence[str]) -> str:
    """Return commands as one text, in which each has columns of its own.

    libnftables says of a refusal in which columns it is, but not in which line, and repeats the first line each time:
    many elements are in lines below.
    """
    parts, column, gap = list[str](), 0, ""
    for command in commands:
        lines = _lines(command)
        parts += [gap, ("\n" + " " * column).join(lines)]
        column += _width(lines) + len(COMMAND_END)
        gap = COMMAND_END + ("\n" + " " * column if len(lines) > 1 else "")
    return "".join(parts)


def _lines(command: str) -> list[str]:
    """Break a long command after commas within braces, where nft takes a new line."""
    if len(command) <= LONGEST_LINE:
        return [command]
    lines, line, depth, in_quotes = list[str](), list[str](), 0, False
    for piece in command.split(", "):
        line.append(piece)
        parts = piece.split('"')
        code = "".join(parts[in_quotes::2])
        depth += code.count("{") - code.count("}")
        in_quotes ^= len(parts) % 2 == 0
        if len(line) >= ELEMENTS_IN_LINE and depth and not in_quotes:
            lines.append(", ".join(line) + ",")
            line = []
    return [*lines, ", ".join(line)]


def _width(lines: Sequence[str]) -> int:
    return max(map(len, lines))


def _failure(error: str, commands: Sequence[str]) -> NFTError:
    """Translate what libnftables says of commands that it ran as one text."""
    from cni_hostport.kernel import refusals

    widths = [_width(_lines(command)) for command in commands]
    return refusals.read(error, lambda column: _command_at(column, commands, widths))


def _command_at(column: int, commands: Sequence[str], widths: Sequence[int]) -> str:
    for command, width in zip(commands, widths, strict=True):
        if 0 <= column < width:
            return command
        column -= width + len(COMMAND_END)
    return ""
