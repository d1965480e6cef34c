"""What nftables says when it refuses commands: its messages, in the words by which they are told apart. Pure.

The kernel's reasons are the C library's words for error numbers. The types of errors are in ``errors``.
"""

from __future__ import annotations

import re

from cni_hostport.errors import BusyError, ExistsError, NFTError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

EXISTS, MISSING, BUSY = "File exists", "No such file or directory", "Device or resource busy"
NOT_SUPPORTED = "Operation not supported"
# in this order: a batch can fail for several reasons at once, and a key that has a holder is the one to look at first
ERROR_TYPES = {EXISTS: ExistsError, MISSING: NotFoundError, BUSY: BusyError}
PREFIX = "Could not process rule: "  # before the kernel's reasons
MESSAGE = r"^Error: (.*)\n.*\n( *\^+)?"  # the reason; then the first line of the commands; then marks below a command
# Newer kernels say of a base chain with another priority that this is not supported (nft_chain_parse_hook of
# net/netfilter/nf_tables_api.c).
REFUSED_DECLARATIONS = {EXISTS: ("add chain ", "add map ", "add set "), NOT_SUPPORTED: ("add chain ",)}
# Newer versions of nftables see themselves what differs from what there is (chain_evaluate and set_evaluate of
# src/evaluate.c), and say it in a sentence with these words.
WORDS_OF_A_DIFFERENCE = {"already", "exists", "different"}
# The verbs of commands that others can make fail, and of a refusal that belongs to no command.
RACING_VERBS = {"create", "delete", ""}


def read(messages: str, command_at: Callable[[int], str]) -> NFTError:
    """Return the error that nftables' messages make; ``command_at`` knows the command at a column that is marked."""
    refusals = dict[tuple[str, str], None]()  # once each: of one command, many messages may be refused
    for reason, marks in re.findall(MESSAGE, messages, re.MULTILINE):
        refusals[reason.removeprefix(PREFIX), command_at(marks.find("^"))] = None
    found = list(refusals) or [(messages.strip() or "libnftables failed without a reason", "")]
    types = (kind for words, kind in ERROR_TYPES.items() if any(words in reason for reason, _ in found))
    return next(types, NFTError)(found)


def refused_declarations(error: NFTError) -> list[tuple[str, str]]:
    """Return the refusals of chains, maps and sets that another version of this plugin declared in another form."""
    return [refusal for refusal in error.refusals if refusal[1].startswith(_declarations_refused_for(refusal[0]))]


def may_be_a_race(error: NFTError) -> bool:
    """Tell whether somebody else's change can be the reason: something to create exists, or to delete does not."""
    return isinstance(error, tuple(ERROR_TYPES.values())) and all(
        command.partition(" ")[0] in RACING_VERBS for _, command in error.refusals
    )


def is_only_missing(error: NFTError, command: str) -> bool:
    """Tell whether nothing is refused but one command, and that because something which it names does not exist.

    Refused declarations do not count.
    """
    declarations = refused_declarations(error)
    return [refusal for refusal in error.refusals if refusal not in declarations] == [(MISSING, command)]


def _declarations_refused_for(reason: str) -> tuple[str, ...]:
    """Return how those commands begin of which a reason says that what they declare is there in another form."""
    if {*reason.split()} >= WORDS_OF_A_DIFFERENCE:
        reason = EXISTS
    return REFUSED_DECLARATIONS.get(reason, ())
