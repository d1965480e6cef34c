"""A machine to install the plugin on: a copy of what is shipped, and two directories to install it into."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from go_tools import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SHIPPED = ["cni_hostport", "conf", "tests/demo.sh", "install.sh", "pyproject.toml", "README.md", "LICENSE"]


@dataclass
class Machine:
    """Everything it holds is below ``top``."""

    top: Path

    def __post_init__(self) -> None:
        self.source: Path = self.top / "source"
        self.bin: Path = self.top / "bin"
        self.lib: Path = self.top / "lib"
        self.top.chmod(0o755)
        for name in SHIPPED:
            target = self.source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, target)

    @classmethod
    def installed(cls, top: Path) -> Self:
        """Make a machine and install the plugin on it."""
        made = cls(top)
        outcome = made.install()
        assert outcome.returncode == 0, outcome.stderr
        return made

    def install(self, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [self.source / "install.sh", "--bin-dir", self.bin, "--lib-dir", self.lib, *options]
        environment = {**os.environ, **variables}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    @property
    def executable(self) -> Path:
        return self.bin / "hostport"

    def builds(self) -> set[str]:
        return {path.name for path in self.lib.iterdir()}
