"""What a case may find wanting, in words short enough for a cell of the table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lab import Namespace, Outcome

LONGEST = 90  # characters of a plugin's own words


class ShortcomingError(AssertionError):
    """A plugin does otherwise than the case asks."""


def fall_short(in_what: str) -> NoReturn:
    raise ShortcomingError(in_what)


def words(outcome: Outcome) -> str:
    """Return what a plugin says of its failure, shortened."""
    try:
        output = outcome.msg
    except (ValueError, KeyError):
        output = outcome.stderr.strip().splitlines()[0] if outcome.stderr.strip() else f"status {outcome.status}"
    output = " ".join(output.split())
    return output if len(output) <= LONGEST else f"{output[:LONGEST]}…"


def named(families: Iterable[int]) -> str:
    return " and ".join(f"IPv{family}" for family in families)


def _is_one_error(stdout: str) -> bool:
    try:
        return "code" in json.loads(stdout)
    except ValueError:
        return False


def succeeded(outcome: Outcome, command: str) -> Outcome:
    if outcome.status:
        fall_short(f"{command} fails: {words(outcome)}")
    return outcome


def refused(outcome: Outcome, command: str, *naming: str, code: int | None = None) -> None:
    """See an error that names all that is to be named."""
    if not outcome.status:
        fall_short(f"{command} succeeds")
    if not _is_one_error(outcome.stdout):
        fall_short("stdout is not one JSON object with an error")
    for name in naming:
        if name not in outcome.stdout:
            fall_short(f"the error does not name {name}: {words(outcome)}")
    if code is not None and outcome.code != code:
        fall_short(f"code {outcome.code}, not {code}: {words(outcome)}")


def reached(
    asking: Namespace, address: str, port: int = 8080, *, by: str = "web", seen_as: str = "", **options: Any
) -> None:
    """See an answer from the server ``by``, which sees its client as ``seen_as``."""
    protocol = options.pop("protocol", "tcp")
    where = f"{address} port {port}/{protocol}"
    try:
        name, found = asking.ask(protocol, address, port, timeout=3, **options).split()
    except TimeoutError:
        fall_short(f"no answer from {where}")
    except ConnectionRefusedError:
        fall_short(f"refused by {where}")
    except OSError as error:
        fall_short(f"{where}: {error.strerror}")
    if name != by:
        fall_short(f"{where} leads to '{name}', not '{by}'")
    if seen_as and found != seen_as:
        fall_short(f"on {where} the client is seen as {found}, not {seen_as}")


def silent(asking: Namespace, address: str, port: int = 8080, *, protocol: str = "tcp", **options: Any) -> None:
    if not asking.is_silent(protocol, address, port, **options):
        fall_short(f"{address} port {port}/{protocol} answers")
