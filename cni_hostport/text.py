"""Text for people, and how it is written: parts of it come from outside, such as the name of a pod's process."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from cni_hostport.log import Log

    class Writable(Protocol):
        """A stream for results or messages."""

        def write(self, text: str, /) -> object:
            """Write all of it, or raise ``OSError``."""
            ...


def escaped(text: str) -> str:
    r"""Return a text as one line that a terminal only shows: what is not printable becomes what Python writes for it.

    Those are line breaks and escape sequences (``\n``, ``\x1b``), C1 controls, marks that reorder what is shown
    (``\u202e``), and the lone surrogates that stand for bytes which are not UTF-8 (``\udcff``). Every outlet for people
    does this, none of them twice; results of CNI and output in JSON are data, and have JSON's own escapes.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def escaped_lines(text: str) -> str:
    """Return a text of several lines, each of them as ``escaped``."""
    return "\n".join(map(escaped, text.split("\n")))


def log_to(stderr: Writable) -> Log:
    """Return what writes a line to a stream, escaped and with the plugin's name."""
    return lambda line: write_message(stderr, f"hostport: {escaped(line)}\n")


def write_message(stderr: Writable, text: str) -> None:
    """Write a text to a stream, or lose it where that is not possible."""
    try:  # noqa: SIM105 - contextlib would be another import
        stderr.write(text)
    except OSError:
        pass  # no operation fails because nobody listens


def print_traceback(error: BaseException, stderr: Writable) -> None:
    """Write a traceback to a stream, escaped, where the module for that can be imported."""
    try:
        import traceback
    except (ImportError, OSError, MemoryError):
        return  # the error itself is told all the same

    for part in traceback.format_exception(error):
        is_place = part.startswith("  ")  # else it holds the error's text, whatever that is
        write_message(stderr, part if is_place else f"{escaped(part.strip())}\n")
