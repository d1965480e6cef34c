"""The text of a JSON document, and the places of its values: for changing a few of them and keeping all else.

What Go's encoding/json refuses is refused, since runtimes are written in Go.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from typing import Any, NoReturn

SPACE = " \t\n\r"


def _number(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        msg = f"the number {text[:40]} is too large"
        raise ValueError(msg)
    return number


def _no_number(text: str) -> NoReturn:
    msg = f"{text} is not a number"
    raise ValueError(msg)


# all numbers are floats, of any length: nobody here uses one
_DECODER = json.JSONDecoder(parse_float=_number, parse_int=_number, parse_constant=_no_number)


@dataclass(frozen=True)
class Value:
    """A JSON value, and where it is in the text: from ``start`` to before ``end``."""

    value: Any
    start: int
    end: int


def after_space(text: str, place: int) -> int:
    """Return where the white space that begins at a place ends."""
    while place < len(text) and text[place] in SPACE:
        place += 1
    return place


def value(text: str, place: int) -> Value:
    """Return the value at a place, or behind the white space there; raises ``ValueError``."""
    start = after_space(text, place)
    found, end = _DECODER.raw_decode(text, start)
    return Value(found, start, end)


def items(text: str, place: int) -> list[tuple[str, Value]]:
    """Return the members of the object, or with empty keys the elements of the array, that begins at a place.

    The text must be known to be JSON.
    """
    is_object, found = text[place] == "{", []
    place = after_space(text, place + 1)
    while text[place] not in "]}":
        key = ""
        if is_object:
            name = value(text, place)
            key, place = name.value, after_space(text, name.end) + 1
        item = value(text, place)
        found.append((key, item))
        place = after_space(text, item.end)
        place = after_space(text, place + 1) if text[place] == "," else place
    return found


def folded(document: dict[str, Any], key: str) -> Any:
    """Return the value of a key, given in lower case, that Go takes in any case; the last one counts."""
    values = [found for name, found in document.items() if name.lower() == key]
    return values[-1] if values else None


def parse(data: bytes) -> tuple[str, dict[str, Any]]:
    """Return the text of a file and the one object in it.

    Bytes that are not UTF-8, which Go allows, become lone surrogates. Raises ``ValueError`` with the rest of a sentence
    that begins with the file's name.
    """
    text = data.decode(errors="surrogateescape")
    if after_space(text, 0) == len(text):
        msg = "is empty"
        raise ValueError(msg)
    try:
        whole = value(text, 0)
    except (RecursionError, ValueError) as error:
        msg = f"is not JSON: {error}" if isinstance(error, ValueError) else "is nested too deeply"
        raise ValueError(msg) from None
    if after_space(text, whole.end) != len(text):
        msg = f"is not JSON: something follows its end: {text[whole.end :].strip()[:40]!r}"
        raise ValueError(msg)
    if not isinstance(whole.value, dict):
        msg = "is not a JSON object"
        raise ValueError(msg)  # noqa: TRY004 - one kind of error for all that a file can have wrong
    return text, whole.value
