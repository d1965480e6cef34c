"""The figures as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from bench.contenders import COLD, COMMANDS, IPTABLES, NFTABLES, WARM, WARM_PYTHON
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from bench import calls, connections

COLOURS = {WARM: "#c0392b", WARM_PYTHON: "#d98880", COLD: "#e59866", NFTABLES: "#2e6da4", IPTABLES: "#7f8c8d"}
CONNECTION_COLOURS = {"hostport, of other pods": "#c0392b", "hostport, of the same pod": "#e59866"}


def draw(path: Path, times: calls.Times, ratios: connections.Ratios) -> None:
    """Write the picture, in the format that the file's name tells."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "hostport", "font.size": 8, "axes.titlesize": 9})
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    *panels, last = figure.subplots(1, 4)
    for panel, command in zip(panels, COMMANDS, strict=True):
        for name, colour in COLOURS.items():
            known = sorted((size, took) for (size, *which), took in times.items() if which == [command, name])
            panel.plot(*zip(*known, strict=True) if known else ([], []), "o-", color=colour, label=name, markersize=3)
        panel.set(title=f"{command}, ms", xlabel="pods on the node", ylim=(0, None))
    for name in dict.fromkeys(name for name, _ in ratios):
        known = sorted((size, ratio) for (kind, size), (ratio, *_) in ratios.items() if kind == name)
        colour = CONNECTION_COLOURS.get(name, COLOURS[NFTABLES])
        last.plot(*zip(*known, strict=True), "o-", color=colour, label=name, markersize=3)
    last.set(title="new connections/s, ratio", xlabel="mappings on the node", ylim=(0, 1.1))
    if ratios:
        last.legend(fontsize=6, frameon=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
