"""The chains of other programs that see a connection before this plugin translates it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cni_hostport.kernel import xtables
from cni_hostport.migration.iptables import PROGRAMS
from cni_hostport.names import FAMILY, TABLE
from cni_hostport.operate.explain.probe import TABLE_PREFIX
from cni_hostport.operate.statements import note, ok
from cni_hostport.ruleset.base import NAT_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.explain.clients import Client
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

IP_FAMILIES = {4: "ip", 6: "ip6"}  # of tables, by IP version


def statements(nft: Nft, mapping: PortMapping, client: Client) -> Iterator[Statement]:
    """Name the chains, those of legacy iptables too; raises ``NFTError`` if nftables cannot be asked.

    Chains that translate are meant to come first: what they claim is more specific than a host port.
    """
    hook = "prerouting" if client.interface else "output"
    family = IP_FAMILIES[mapping.version]
    found = _earlier_chains(nft, hook, family, client.interface)
    filters = tuple(_line(chain) for chain in found if chain["type"] != "nat")
    translating = [_line(chain) for chain in found if chain["type"] == "nat"]
    if filters:
        yield note(f"chains of others come before this plugin's at {hook}", details=filters)
    if translating:
        yield ok(f"what others translate at {hook} is theirs, before this plugin's turn", *translating)
    if not found:
        yield ok(f"no chain of others comes before this plugin's at {hook}")
    try:
        tables = xtables.table_names(family)
    except OSError as error:
        yield note(f"whether legacy iptables is in use cannot be told: {error.strerror}")
        return
    if tables:
        text = f"legacy iptables is in use ({', '.join(tables)}): what its rules do is not shown here"
        yield note(text, remedy=f"{PROGRAMS[family]}-legacy-save")


def _earlier_chains(nft: Nft, hook: str, family: str, interface: str) -> list[dict[str, Any]]:
    """Return the chains that see a packet of an IP family before this plugin's chain at a hook.

    Those of the ingress hook of ``interface`` are among them, unless it is empty.
    """
    chains = [item["chain"] for item in nft.listing("chains") if item.get("chain", {}).get("hook")]
    priorities = (chain["prio"] for chain in chains if _place(chain)[:2] == (FAMILY, TABLE) and chain["hook"] == hook)
    priority = next(priorities, NAT_PRIORITY)
    return [
        chain
        for chain in chains
        if (chain["hook"] == hook and chain["prio"] <= priority) or (interface and chain["hook"] == "ingress")
        if chain["table"] != TABLE
        and not chain["table"].startswith(TABLE_PREFIX)
        and chain["family"] in {"inet", "netdev", family}
        and chain.get("dev", interface) == interface
    ]


def _place(chain: dict[str, Any]) -> tuple[str, str, str]:
    return chain["family"], chain["table"], chain["name"]


def _line(chain: dict[str, Any]) -> str:
    return f"{' '.join(_place(chain))} ({chain['type']} at {chain['hook']}, priority {chain['prio']})"
