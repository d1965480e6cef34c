"""The server in a container: it answers every connection with ``web``."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from resident import eventually

if TYPE_CHECKING:
    from lab import Namespace

COMMAND = ("/bin/busybox", "nc", "-ll", "-p", "80", "-e", "/bin/busybox", "echo", "web")


def answer(asking: Namespace, address: str, port: int) -> str:
    """Connect, once the container's server listens, and return what it answers."""
    answers: list[str] = []

    def is_answered() -> bool:
        with suppress(ConnectionRefusedError):
            answers.append(asking.ask("tcp", address, port))
        return bool(answers)

    assert eventually(is_answered)
    return answers[0]
