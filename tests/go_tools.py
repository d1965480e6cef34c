"""The Go programs that the tests use, and their building by ``build-tools.sh``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = Path(os.environ.get("HOSTPORT_TOOLS", ROOT / ".cache" / "bin"))


def unavailable(group: str, *programs: str) -> str:
    """Return why these programs of a group of ``build-tools.sh`` are not to be had, after trying to build them.

    Empty if they are there.
    """
    if all((TOOLS / program).exists() for program in programs):
        return ""
    wanted = " and ".join(programs)
    if not shutil.which("go"):
        return f"{wanted} in {TOOLS}, which needs a Go toolchain to be built"
    build = [str(ROOT / "tests" / "build-tools.sh"), group]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    return f"{wanted}, which cannot be built: {built.stderr}" if built.returncode else ""
