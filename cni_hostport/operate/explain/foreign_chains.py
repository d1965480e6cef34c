"""The chains of others that see a connection before this plugin translates it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cni_hostport.names import FAMILY, TABLE
from cni_hostport.operate.explain import probe
from cni_hostport.operate.statements import note, ok
from cni_hostport.ruleset.base import NAT_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

LEGACY = {4: Path("/proc/net/ip_tables_names"), 6: Path("/proc/net/ip6_tables_names")}


def statements(nft: Nft, of: PortMapping, client: Client) -> Iterator[Statement]:
    """Name them; raises ``NFTError`` if nftables cannot be asked.

    Chains that translate are meant to come first: what they claim is more specific than a host port.
    """
    hook = "prerouting" if client.interface else "output"
    chains = [item["chain"] for item in nft.listing("chains") if item.get("chain", {}).get("hook")]
    own = next((of["prio"] for of in chains if _place(of)[:2] == (FAMILY, TABLE) and of["hook"] == hook), NAT_PRIORITY)
    found = [
        chain
        for chain in chains
        if (chain["hook"] == hook and chain["prio"] <= own) or (client.interface and chain["hook"] == "ingress")
        if chain["table"] != TABLE
        and not chain["table"].startswith(probe.TABLE)
        and chain["family"] in {"inet", "netdev", "ip" if of.version == 4 else "ip6"}  # noqa: PLR2004 - IP version
        and chain.get("dev", client.interface) == client.interface
    ]
    filters = tuple(_line(chain) for chain in found if chain["type"] != "nat")
    translating = [_line(chain) for chain in found if chain["type"] == "nat"]
    if filters:
        yield note(f"chains of others come before this plugin's at {hook}", details=filters)
    if translating:
        yield ok(f"what others translate at {hook} is theirs, before this plugin's turn", *translating)
    if not found:
        yield ok(f"no chain of others comes before this plugin's at {hook}")
    try:
        tables = LEGACY[of.version].read_text().split()
    except FileNotFoundError:  # not in use
        return
    except OSError as error:
        yield note(f"whether legacy iptables is in use cannot be told: {error.strerror}")
        return
    if tables:
        command = "iptables-legacy-save" if of.version == 4 else "ip6tables-legacy-save"  # noqa: PLR2004
        text = f"legacy iptables is in use ({', '.join(tables)}): what its rules do is not shown here"
        yield note(text, remedy=command)


def _place(chain: dict[str, Any]) -> tuple[str, str, str]:
    return chain["family"], chain["table"], chain["name"]


def _line(chain: dict[str, Any]) -> str:
    return f"{' '.join(_place(chain))} ({chain['type']} at {chain['hook']}, priority {chain['prio']})"
