from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from go_tools import ROOT, unavailable
from lab import require

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.usefixtures("_kernel")
def test_the_benchmark_compares_all_contenders_and_draws_them(tmp_path: Path) -> None:
    require(not (need := unavailable("plugins", "portmap")), f"needs {need}")
    small = ["--rounds", "1", "--sizes", "0", "3", "--connections", "20", "--entries", "100"]
    command = [sys.executable, "tests/bench", *small, "--plot", str(tmp_path / "plot.svg")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    headings = [line for line in ran.stdout.splitlines() if line.startswith(("| call |", "| mappings |", "| memory |"))]
    assert headings == [
        "| call | pods on the node | hostport warm | hostport cold | portmap nftables | portmap iptables |",
        "| mappings | 0 | 20 |",
        "| memory | MiB |",
        "| call | without | with | difference |",
    ]
    assert "nan" not in ran.stdout
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(name in drawn for name in ("hostport warm", "portmap iptables", "new connections/s"))
