"""The mappings of a node as a table for people: its columns, and which mappings are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.attachment import COMMENT_BYTES, Attachment, printable, short_id
from cni_hostport.operate import terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cni_hostport.operate.mappings import InstalledMapping

NONE = "-"  # or not known
COLUMNS: dict[str, Callable[[InstalledMapping], str]] = {
    "HOST": lambda mapping: mapping.host,
    "POD ADDRESS": lambda mapping: mapping.target,
    "POD": lambda mapping: mapping.pod or NONE,
    "CONTAINER": lambda mapping: short_id(mapping.container_id) or NONE,
    "INTERFACE": lambda mapping: mapping.ifname or NONE,
    "NETWORK": lambda mapping: mapping.network,
    "DYNAMIC": lambda mapping: mapping.request or NONE,
    "CONNECTIONS": lambda mapping: str(mapping.connections),
    "HOLDER": lambda mapping: mapping.holder,
}
NUMERIC_COLUMNS = ["CONNECTIONS"]


def print_table(mappings: Sequence[InstalledMapping]) -> None:
    """Print a row for each mapping, or that there is none."""
    if not mappings:
        terminal.log("No host ports.")
        return
    rows = [[text(mapping) for text in COLUMNS.values()] for mapping in mappings]
    terminal.print_table(list(COLUMNS), rows, numeric=NUMERIC_COLUMNS)


def select(
    mappings: Iterable[InstalledMapping], port: tuple[int, str] | None, pod: str, network: str
) -> list[InstalledMapping]:
    """Return the mappings of a port, a pod (with or without its namespace) and a network.

    ``port`` comes with a protocol, or an empty string for each of them; ``None`` or an empty string selects all.
    """
    return [
        mapping
        for mapping in mappings
        if (port is None or port in {(mapping.host_port, mapping.protocol), (mapping.host_port, "")})
        and (not pod or is_called(mapping.pod, printable(pod)))
        and (not network or network == mapping.network or mapping.key.startswith(f"{Attachment.network_key(network)}-"))
    ]


def is_called(pod: str, name: str) -> bool:
    """Tell whether a pod, as the ruleset names it, has a printable name: with or without its namespace."""
    names = {pod, pod.rpartition("/")[2]} - {""}
    if len(pod) == COMMENT_BYTES:  # which is where longer ones are cut
        return any(name.startswith(cut) for cut in names)
    return name in names
