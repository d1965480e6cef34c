"""The kernel's nftables through libnftables: run a transaction, list. The only importer of ``nftables``."""

from __future__ import annotations

import json
import os
import re
from _socket import AF_NETLINK, SOL_SOCKET, socket
from contextlib import suppress

from cni_hostport.errors import BusyError, ExistsError, NFTError, NotFoundError, UnavailableError
from cni_hostport.netlink import KEPT, NETLINK_NETFILTER, report_progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from cni_hostport.installed import Installed

LIBRARY = "libnftables.so.1"
COMMAND_END = "; "
LONG = 4096  # characters of a command that is not broken into lines
ELEMENTS_IN_LINE = 20
SOL_NETLINK, NETLINK_CAP_ACK = 270, 10  # linux/socket.h, linux/netlink.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
REFUSALS_BUFFER = 4 << 20  # bytes; a refusal takes about one thousand, a message holds hundreds of elements
# libnftables 1.0.6 knows one flag of tables, and prints for others what it finds in memory behind its name (src/json.c)
GARBAGE = re.compile(r'("table": \{[^{}]*?), "flags": .*?(?=\}\})')


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
            from ctypes import CDLL

            import nftables

            CDLL(LIBRARY)  # without it, the binding's destructor would write a traceback to stderr
            unused = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
            os.close(unused)
            self._context = nftables.Nftables()
            _make_room_for_refusals(unused)
        except (ImportError, OSError, AttributeError) as error:
            raise UnavailableError([(f"libnftables cannot be used: {error}", "")]) from error
        self._context.set_json_output(True)
        KEPT.append(self._context)

    def run(self, commands: Sequence[str]) -> None:
        """Run commands as one transaction: all of them or, with an ``NFTError``, none."""
        if not commands:
            return
        status, _, error = self._ask(_in_columns(commands))
        if status:
            raise _failure(error, commands)

    def listing(self, what: str) -> list[dict[str, Any]]:
        """Return the objects of ``list WHAT`` in libnftables' JSON, an empty list if there is no such thing."""
        command = f"list {what}"
        status, output, error = self._ask(command)
        if not status:
            try:
                return _objects(output)
            except NFTError:
                if not what.startswith("tables"):
                    raise
                return self._tables(command)
        failure = _failure(error, [command])
        if isinstance(failure, NotFoundError):
            return []
        raise failure

    def rules(self, chain: str) -> dict[int, str]:
        """Return the rules of a chain, ``FAMILY TABLE NAME``, as nft prints them, by handle; none if it is gone."""
        self._context.set_handle_output(True)
        self._context.set_stateless_output(True)
        try:
            output = self._text(f"list chain {chain}")
        finally:
            self._context.set_stateless_output(False)
            self._context.set_handle_output(False)
        return {int(handle): rule for rule, handle in re.findall(r"^\t\t(.*) # handle (\d+)$", output, re.MULTILINE)}

    def _tables(self, command: str) -> list[dict[str, Any]]:
        """Return the tables of a listing whose JSON ends at one with flags that libnftables does not know."""
        from cni_hostport.lookup import Lookup

        tables = [line.split() for line in self._text(command).splitlines() if line.startswith("table ")]
        lookup = Lookup()
        return [
            {"table": {"family": family, "name": name} | ({"flags": "dormant"} if dormant else {})}
            for _, family, name, *_ in tables
            for dormant in [lookup.is_dormant(name, family)]
        ]

    def _text(self, command: str) -> str:
        self._context.set_json_output(False)
        try:
            _, output, _ = self._ask(command)
        finally:
            self._context.set_json_output(True)
        return output

    def _ask(self, command: str) -> tuple[int, str, str]:
        report_progress()
        # what others put in the ruleset need not be UTF-8, which the binding takes for granted when it is given text
        status, output, error = self._context.cmd(command.encode())
        return status, output.decode(errors="replace"), error.decode(errors="replace")

    def state(self, key: str) -> dict[str, list[dict[str, Any]]]:
        """Return the listings of all that one attachment's connections pass through."""
        from cni_hostport.listings import state_of

        return {what: self.listing(what) for what in state_of(key)}

    def pod_name(self, key: str) -> str:
        """Return the ``namespace/name`` with which an attachment's rules are labelled, empty if they are not."""
        from cni_hostport.installed import label, token_of

        return label(self.listing(token_of(key)))

    def installed(self) -> Installed:
        """Return what the table holds, an empty result where there is no table."""
        from cni_hostport.installed import EVERYBODYS, Installed

        # one call for each: nftables 1.0.6 fails on several lists in one
        return Installed.read(item for what in EVERYBODYS for item in self.listing(what))


def _objects(output: str) -> list[dict[str, Any]]:
    """Read a listing; raises ``NFTError`` if it is not JSON."""
    if not output:
        return []
    try:
        objects: list[dict[str, Any]] = json.loads(output, strict=False)["nftables"]
    except (ValueError, KeyError, TypeError):
        try:
            objects = json.loads(GARBAGE.sub(r"\1", output), strict=False)["nftables"]
        except (ValueError, KeyError, TypeError) as error:
            raise NFTError([(f"libnftables' listing cannot be read: {error}", "")]) from error
    return objects


def _make_room_for_refusals(descriptor: int) -> None:
    """Let libnftables' socket, which has this descriptor, hold what the kernel says of a refused transaction.

    That is an answer for each message that is refused, of up to 64 KiB since it repeats the message; libnftables makes
    room for one KiB a command (mnl_batch_talk of its src/mnl.c) and, where that is too little, knows no reason.
    """
    with suppress(OSError):
        netlink = socket(fileno=descriptor)
        try:
            if (netlink.family, netlink.proto) == (AF_NETLINK, NETLINK_NETFILTER):
                netlink.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
                netlink.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, REFUSALS_BUFFER)
        finally:
            netlink.detach()


def _in_columns(commands: Sequence[str]) -> str:
    """Return commands as one text, in which each has columns of its own.

    libnftables says of a refusal in which columns it is, but not in which line, and repeats the first line each time:
    many elements are in lines below.
    """
    parts, column, gap = list[str](), 0, ""
    for command in commands:
        lines = _lines(command)
        parts += [gap, ("\n" + " " * column).join(lines)]
        column += _width(command) + len(COMMAND_END)
        gap = COMMAND_END + ("\n" + " " * column if len(lines) > 1 else "")
    return "".join(parts)


def _lines(command: str) -> list[str]:
    """Break a long command after commas within braces, where nft takes a new line."""
    if len(command) <= LONG:
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


def _width(command: str) -> int:
    return max(map(len, _lines(command)))


def _failure(error: str, commands: Sequence[str]) -> NFTError:
    """Translate libnftables' messages; each is a line ``Error: reason``, the first line and a line of marks."""
    refusals = dict[tuple[str, str], None]()  # once each: of one command, many messages may be refused
    widths = [_width(command) for command in commands]
    for reason, marks in re.findall(r"^Error: (.*)\n.*\n( *\^+)?", error, re.MULTILINE):
        command = _command_at(marks.find("^"), commands, widths)
        refusals[reason.removeprefix("Could not process rule: "), command] = None
    found = list(refusals) or [(error.strip() or "libnftables failed without a reason", "")]
    kinds = (kind for sign, kind in _KINDS.items() if any(sign in reason for reason, _ in found))
    return next(kinds, NFTError)(found)


def _command_at(column: int, commands: Sequence[str], widths: Sequence[int]) -> str:
    for command, width in zip(commands, widths, strict=True):
        if 0 <= column < width:
            return command
        column -= width + len(COMMAND_END)
    return ""
