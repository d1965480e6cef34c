from __future__ import annotations

import itertools
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from bench.contenders import interval
from go_tools import ROOT, unavailable
from lab import require

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "rounds": (1,),
    "sizes": (0,),
    "most": (3,),
    "burst": (3,),
    "connections": (20,),
    "turns": (5,),
    "flood": (100,),
    "attachments": (2, 5),
    "entries": (100,),
    "range": (20,),
    "together": (3,),
}


OURS = "hostport warm | hostport warm, in Python | hostport cold"


@pytest.mark.usefixtures("_kernel")
def test_the_benchmark_measures_every_part_and_draws_it(tmp_path: Path) -> None:
    require(not (need := unavailable("plugins", "portmap")), f"needs {need}")
    small = [word for name, numbers in SMALL.items() for word in (f"--{name}", *map(str, numbers))]
    command = [sys.executable, "tests/bench", *small, "--plot", str(tmp_path / "plot.svg")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert [above for above, line in itertools.pairwise(lines) if line.startswith("| --- |")] == [
        f"| call | pods on the node | {OURS} | portmap nftables | portmap iptables |",
        f"| growth | {OURS} |",
        "| at once | pods | ADDs | DELs | failed calls |",
        "| mappings | 0 | 20 |",
        "| flood | attempted | answered | slowest answer, s | SYNs sent again | ADDs and DELs meanwhile |",
        "| command | 2 | 5 |",
        "| cold | ADD | CHECK | DEL |",
        "| memory | MiB |",
        "| call | without | with | difference |",
        "| one port | warm, by its number | warm, dynamic | cold, by its number | cold, dynamic |",
    ]
    assert "nan" not in ran.stdout
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(name in drawn for name in ("hostport warm", "portmap iptables", "new connections/s"))
    assert ran.stdout.count("| 100 | 100 (100.00%) |") == 5
    assert "3 ADDs at once in a range of as many ports:" in ran.stdout
    assert ran.stdout.rstrip().endswith("failed calls: 0.")
    bursts = [line for line in lines if re.match(r"\| (hostport|portmap) [\w, ]+ \| 3 \|", line)]
    assert len(bursts) == 5
    assert all(line.endswith(" | 0 |") for line in bursts if line.startswith("| hostport"))  # portmap's may fail
    cold = _column(lines, "| cold |")
    whole, _ = cold.pop("**whole, with stopwatches**"), cold.pop("**whole, without**")
    assert sum(cold.values()) == pytest.approx(whole, abs=0.05 * (len(cold) + 1))


def _column(lines: list[str], heading: str) -> dict[str, float]:
    """Return the numbers in the first column after the names in a table."""
    start = next(number for number, line in enumerate(lines) if line.startswith(heading)) + 2
    rows = (line.split("|") for line in lines[start : lines.index("", start)])
    return {row[1].strip(): float(row[2].split()[0]) for row in rows}


def test_the_interval_of_a_median_is_made_of_ranks() -> None:
    assert interval([float(number) for number in range(100, 0, -1)]) == (40, 61)
    assert interval([3.0, 1.0]) == (1, 3)
