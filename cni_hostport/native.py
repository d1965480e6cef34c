"""The native executable: what a C compiler has to be told to make it of ``handover.c``.

The protocol and its constants are those of ``handover``; so are the identities, by which two installations tell their
processes apart.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from cni_hostport import LARGEST_INPUT, LONGEST_IFNAME, __version__, handover

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MARK = "native executable of "


def options(executable: str, socket: str = handover.SOCKET) -> list[str]:
    """Return the options of a C compiler, for the path of a Python executable and of the resident process's socket."""
    texts = {"SOCKET": socket, "INSTALLATION_MARK": f"{MARK}{executable}", "IDENTITY": handover.IDENTITY, "MODULE": ""}
    return _options([executable], {}, texts)


def bundle_options(python: Sequence[str], environment: Mapping[str, str | None], module: str) -> list[str]:
    """Return the options for an executable that starts Python by a command, with variables that are set or unset.

    ``module`` is the path of ``handover``. What begins with ``./`` is below the directory in whose ``bin`` the
    executable will lie.
    """
    texts = {
        "SOCKET": handover.SOCKET,
        "INSTALLATION_MARK": f"{MARK}a bundle",
        "IDENTITY": f"{__version__} ",
        "MODULE": module,
    }
    return _options(python, environment, texts)


def _options(python: Sequence[str], environment: Mapping[str, str | None], texts: Mapping[str, str]) -> list[str]:
    texts = {
        **texts,
        "NATIVE": handover.NATIVE,
        "TAKEN": handover.TAKEN.decode(),
        "AT_WORK": handover.AT_WORK.decode(),
        "CANNOT_START": handover.CANNOT_START,
    }
    definitions = {
        **{name: _literal(text) for name, text in texts.items()},
        "PYTHON": _literals(python),
        "ENVIRONMENT": "".join(
            f"{{{_literal(name)}, {'NULL' if value is None else _literal(value)}}}, "
            for name, value in environment.items()
        ),
        "COMMANDS": _literals(handover.COMMANDS),
        "VARIABLES": _literals(handover.VARIABLES),
        "UNTIL_TAKEN": _milliseconds(handover.UNTIL_TAKEN),
        "UNTIL_DONE": _milliseconds(handover.UNTIL_DONE),
        "LARGEST_INPUT": LARGEST_INPUT,
        "LONGEST_IFNAME": LONGEST_IFNAME,
    }
    return [f"-D{name}={value}" for name, value in definitions.items()]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # C escapes quotes, backslashes and ends of lines as JSON does


def _literals(texts: Sequence[str]) -> str:
    return ", ".join(map(_literal, texts))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


if __name__ == "__main__":
    sys.stdout.write("".join(f"{option}\n" for option in options(*sys.argv[1:])))
