"""A machine to install the plugin on: a copy of what is shipped, and two directories to install it into."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from go_tools import ROOT

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

    @property
    def python_executable(self) -> Path:
        """The one that the native executable becomes, in the installation that the installed executable belongs to."""
        found = re.search(rb"^(?:#!|native executable of )(/.*)/bin/", self.executable.read_bytes(), re.MULTILINE)
        assert found
        return Path(found[1].decode()) / "bin" / "hostport"

    def executables(self, socket: Path) -> dict[str, Path]:
        """Make executables as they are installed, but for another socket of the resident process, by their kind."""
        installed = self.python_executable
        python, native = (self.top / f"{kind}-{socket.name}" / "hostport" for kind in ("Python", "native"))
        for path in (python, native):
            path.parent.mkdir()
        python.write_text(installed.read_text().replace("main()", f'main("{socket}")'))
        python.chmod(0o755)
        asks: list[str | Path] = [installed.with_name("python"), "-I", "-m", "cni_hostport.native", installed, socket]
        options = subprocess.run(asks, capture_output=True, text=True, check=True).stdout.splitlines()
        source = self.source / "cni_hostport" / "handover.c"
        subprocess.run(["cc", "-O2", "-static", *options, "-o", native, source], check=True)
        return {"Python": python, "native": native}

    def builds(self) -> set[str]:
        return {path.name for path in self.lib.iterdir()}
