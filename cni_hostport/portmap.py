"""What the reference plugin ``portmap`` left behind of a container that it mapped and this plugin is asked to delete.

After its type was changed in a conflist, the DEL of older pods comes here, and their rules stay. They are in tables of
portmap's, which this plugin never changes: it says what to run.
"""

from __future__ import annotations

import json
from hashlib import sha512

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.lookup import Lookup
    from cni_hostport.skel import Call

CHAIN_CHARACTERS = 28  # portmap's limit for the name of an iptables chain


def backends_with_leftovers(lookup: Lookup, call: Call) -> list[str]:
    """Return those of portmap's back ends that still have rules of the container."""
    name = chain_name(call.network, call.container_id)
    iptables = any(lookup.has_chain(name, "nat", family) for family in ("ip", "ip6"))
    tables = [family for family in ("ip", "ip6") if lookup.has_chain("hostports", "cni_hostport", family)]
    nftables = bool(tables) and _have_rules_of(call.container_id, tables)
    return [name for name, found in (("iptables", iptables), ("nftables", nftables)) if found]


def chain_name(network: str, container_id: str) -> str:
    """Return the name of the iptables chain that translates a container's connections.

    Source: containernetworking/plugins, pkg/utils/utils.go (``MustFormatChainNameWithPrefix``).
    """
    return f"CNI-DN-{sha512((network + container_id).encode()).hexdigest()}"[:CHAIN_CHARACTERS]


def _have_rules_of(container_id: str, families: Sequence[str]) -> bool:
    from cni_hostport.nft import Nft

    nft = Nft()
    rules = (item for family in families for item in nft.listing(f"chain {family} cni_hostport hostports"))
    return any(item.get("rule", {}).get("comment") == container_id for item in rules)


def advice(call: Call, backends: Sequence[str]) -> str:
    """Return the line that tells an operator how to remove these leftovers with portmap's own DEL."""
    commands = []
    for backend in backends:
        config = {
            "cniVersion": "1.0.0",
            "name": call.network,
            "type": "portmap",
            "backend": backend,
            "runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "tcp"}]},
        }
        commands.append(
            f"echo '{json.dumps(config)}' | CNI_COMMAND=DEL CNI_CONTAINERID={call.container_id}"
            f" CNI_IFNAME={call.ifname} CNI_PATH=/opt/cni/bin /opt/cni/bin/portmap"
        )
    return f"portmap's host port rules of {call.container_id} are still there; to remove them: {'; '.join(commands)}"
