"""Text from outside, such as the name of a pod's process or interface, where a person or a log reads it."""

from __future__ import annotations


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
