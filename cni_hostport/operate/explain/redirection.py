"""The rules of other programs that redirect connections to a host port: which one did, and whose it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cni_hostport import foreign_rules, nf_tables
from cni_hostport.names import FAMILY, TABLE
from cni_hostport.netlink import NETLINK_NETFILTER, Netlink

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cni_hostport.operate.explain.rule_listing import RuleListing
    from cni_hostport.operate.explain.trace import Hop

REDIRECTION = re.compile(r"\b(dnat|redirect|tproxy)\b", re.IGNORECASE)
# a Service's chains, as in service-NWBZK7IH-shop/web/tcp/http (kubernetes/kubernetes, pkg/proxy/nftables/proxier.go)
SERVICE_CHAIN = re.compile(r"^[a-z]+-[0-9A-Z]+-(?P<service>[^/]+/[^/]+)/(?:tcp|udp|sctp)/(?P<port>[^_]*)")
# the comment of a Service's rules in iptables mode, as in shop/web:http (pkg/proxy/iptables/proxier.go)
SERVICE_COMMENT = re.compile(r"^(?P<service>[a-z0-9-]+/[a-z0-9-]+)(?::(?P<port>[a-z0-9-]+))?$")
# by program: what its chains are called, as FAMILY TABLE NAME
PROGRAM_CHAINS = {
    "CRI-O": re.compile(r"^\w+ crio-hostports | KUBE-HP-"),
    "kube-proxy": re.compile(r"^\w+ kube-proxy | KUBE-"),
    "docker": re.compile(r"^\w+ docker-| DOCKER"),
    "podman (netavark)": re.compile(r"netavark", re.IGNORECASE),
    "portmap": re.compile(r"^\w+ cni_hostport | CNI-(?:DN-|HOSTPORT-)"),
    "firewalld": re.compile(r"^\w+ firewalld "),
}


def redirecting_hop(hops: Iterable[Hop], listing: RuleListing) -> Hop | None:
    """Return the rule of another program that gave a packet another destination, ``None`` if no such rule did."""
    for hop in hops:
        is_foreign = (hop.family, hop.table) != (FAMILY, TABLE)
        if is_foreign and hop.verdict == "accept" and REDIRECTION.search(listing.text(hop)):
            return hop
    return None


def program(redirecting: Hop, hops: Sequence[Hop]) -> str:
    """Name the program whose rule redirected a packet, and the Service for which it did, as a sentence has them.

    ``hops`` are all that the packet met, ``redirecting`` is one of them. Empty if the program cannot be told.
    """
    path = hops[: hops.index(redirecting) + 1]
    name = next((name for name, chains in PROGRAM_CHAINS.items() if any(chains.search(hop.place) for hop in path)), "")
    if name != "kube-proxy":
        return name
    matches = [SERVICE_CHAIN.match(hop.chain) for hop in reversed(path)]
    matches.append(SERVICE_COMMENT.match(_iptables_comment(redirecting)))
    match = next((match for match in matches if match), None)
    if not match:
        return name
    port = f":{match['port']}" if match["port"] else ""
    return f"{name}, for Service {match['service']}{port},"


def _iptables_comment(hop: Hop) -> str:
    """Return the comment that iptables gave a rule, of which nft 1.0.6 prints nothing."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        [(_, rules)] = netlink.ask([nf_tables.get_rules(hop.chain, hop.table, hop.family)])
    return next(
        (foreign_rules.comment_of_iptables(rule) for rule in rules if foreign_rules.number(rule) == hop.handle), ""
    )
