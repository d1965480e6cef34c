"""The one error type that crosses the plugin's edge, its codes and JSON, and the errors of nftables.

Codes 1 to 99 are the CNI specification's (SPEC.md, section 5 "Error"); 100 and above belong to this plugin.
"""

from __future__ import annotations

from enum import IntEnum

from cni_hostport.text import escaped, escaped_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cni_hostport.ruleset.elements import Element


LONGEST_QUOTE = 250  # characters of a value, or of a refused command, which can hold thousands of mappings

ENOMEM, ENFILE, EMFILE = 12, 23, 24  # asm-generic/errno-base.h
MODULE = "<module>"  # the name of the frame in which a module is being imported


def quoted(value: object) -> str:
    """Return a value from outside as Python writes it, of a long one the beginning."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Return a text from outside, of a long one the beginning."""
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


class Code(IntEnum):
    """What went wrong, as the number a runtime sees.

    The specification's code 3 (unknown container) makes a runtime skip its clean-up and is never used here.
    """

    INCOMPATIBLE_VERSION = 1
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODING_FAILURE = 6
    INVALID_CONFIG = 7
    PLUGIN_NETNS = 8
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50
    PORT_TAKEN = 100
    RULESET_REFUSED = 101
    HOST_SETTING = 102
    CHECK_FAILED = 103
    UNEXPECTED = 999


class CNIError(Exception):
    """An operation failed; ``skel`` prints it as the error JSON.

    ``msg`` is a sentence for the person who reads ``kubectl describe pod``; ``details`` is optional and longer.
    """

    def __init__(self, code: Code, msg: str, details: str = "") -> None:
        """Keep code, sentence and details apart: each is a key of the error JSON."""
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details

    def json(self, version: str) -> dict[str, Any]:
        """Return the error JSON, whose texts runtimes print to terminals and logs, and kubelets write into events."""
        body = {"cniVersion": version, "code": int(self.code), "msg": escaped(self.msg)}
        return {**body, "details": escaped_lines(self.details)} if self.details else body


class PortTakenError(CNIError):
    """Somebody else has a host port, which is given as (protocol, port)."""

    def __init__(self, msg: str, port: tuple[str, int], details: str = "") -> None:
        """Keep the port apart."""
        super().__init__(Code.PORT_TAKEN, msg, details)
        self.port = port


class PortHeldError(PortTakenError):
    """A container that lives holds a host port.

    ``element`` is the port's, as it was found, and ``is_gone`` tells whether the holder no longer lives.
    """

    def __init__(self, msg: str, element: Element, is_gone: Callable[[], bool]) -> None:
        """Keep what tells later whether the port is still taken."""
        super().__init__(msg, element.port)
        self.element = element
        self.is_gone = is_gone


class NFTError(Exception):
    """nftables refused something, and nothing was changed.

    ``refusals`` are (reason, command), which ``kernel.refusals`` tells apart. ``str()`` of the error says the same to a
    person, with no more than the beginning of long commands.
    """

    def __init__(self, refusals: list[tuple[str, str]]) -> None:
        """Keep the refusals apart."""
        quotes = (": ".join(filter(None, (reason, command[:LONGEST_QUOTE]))) for reason, command in refusals)
        super().__init__("; ".join(quotes))
        self.refusals = refusals


class NotFoundError(NFTError):
    """A table, map, element or chain that was to be used or deleted does not exist."""


class ExistsError(NFTError):
    """A chain or a map element that was to be created exists."""


class BusyError(NFTError):
    """A chain that was to be deleted is still led into."""


class UnavailableError(NFTError):
    """libnftables cannot be loaded, or has no netlink socket."""


class LibraryEndedError(UnavailableError):
    """libnftables ended the process that it ran in, and nobody can tell whether what it was to run was run.

    ``is_crash`` tells whether that was a fault in it, and ``knew_sets`` whether it had read those of all tables.
    """

    def __init__(self, reason: str, *, is_crash: bool, knew_sets: bool) -> None:
        """Keep what there is to say of it."""
        super().__init__([(reason, "")])
        self.is_crash = is_crash
        self.knew_sets = knew_sets


def as_cni_error(error: BaseException, command: str) -> CNIError:
    """Return what a runtime is told of the error with which a command ended; only a bug is ``Code.UNEXPECTED``."""
    if isinstance(error, CNIError):
        return error
    if isinstance(error, RecursionError):
        return CNIError(Code.DECODING_FAILURE, "the network configuration is nested too deeply")
    reason = _lack(error)
    if reason:
        code = Code.NOT_AVAILABLE if command == "STATUS" else Code.RULESET_REFUSED
        return CNIError(code, f"{command} cannot be carried out: {reason}")
    return CNIError(Code.UNEXPECTED, f"unexpected {type(error).__name__}: {error}")


def _lack(error: BaseException) -> str:
    """Return what the node or the installation lacks if that is why an operation failed, else an empty string."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == ENOMEM):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.errno in {EMFILE, ENFILE}:
        return f"there are not enough file descriptors: {error.strerror}"
    if isinstance(error, OSError) and error.errno:
        return f"a system call failed: {error}"
    if isinstance(error, SystemError):
        return f"Python itself failed, as it does without memory: {error}"
    place = error.__traceback__
    while place and place.tb_frame.f_code.co_name != MODULE:
        place = place.tb_next
    if isinstance(error, ImportError | SyntaxError) or place:
        return f"a module cannot be loaded: {type(error).__name__}: {error}"
    return ""
