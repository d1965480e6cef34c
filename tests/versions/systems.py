"""The systems whose nftables and Python the tests go through: this machine, and roots of other Debian releases."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab import LAUNCHER

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

    from lab import Node

VERSION = re.compile(r"\d+(?:\.\d+)+")


@dataclass(frozen=True)
class System:
    """``prefix`` runs a command on it, ``launcher`` the plugin."""

    prefix: Sequence[str]
    launcher: Sequence[str]

    @classmethod
    def here(cls) -> System:
        """Return this machine."""
        return cls((), LAUNCHER)

    def nft(self, node: Node, *command: str) -> subprocess.CompletedProcess[str]:
        """Run this system's nft on a node."""
        return node.run(*self.prefix, "nft", *command, check=False)

    def hostport(self, node: Node, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of the operators' commands on a node."""
        return node.run(*self.launcher, *command, check=False)

    def versions(self, node: Node) -> dict[str, str]:
        """Return what the system is called, and the versions of its nftables and Python."""
        release = node.run(*self.prefix, "cat", "/etc/os-release").stdout
        shown = {
            "nftables": node.run(*self.prefix, "nft", "--version").stdout,
            "Python": node.run(*self.prefix, "/usr/bin/python3", "--version").stdout,
        }
        found = {subject: match[0] for subject, text in shown.items() if (match := VERSION.search(text))}
        name = re.search(r'^PRETTY_NAME="?(.*?)"?$', release, re.MULTILINE)
        return {"system": name[1] if name else "", **found}
