"""Others' rules that redirect what comes to a host port: whose they are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cni_hostport import foreign_rules, nf_tables
from cni_hostport.names import FAMILY, TABLE
from cni_hostport.netlink import NETLINK_NETFILTER, Netlink

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cni_hostport.operate.explain.rules import Rules
    from cni_hostport.operate.explain.trace import Hop

REDIRECTION = re.compile(r"\b(dnat|redirect|tproxy)\b", re.IGNORECASE)
# a Service's chains, as in service-NWBZK7IH-shop/web/tcp/http (kubernetes/kubernetes, pkg/proxy/nftables/proxier.go)
SERVICE = re.compile(r"^[a-z]+-[0-9A-Z]+-(?P<service>[^/]+/[^/]+)/(?:tcp|udp|sctp)/(?P<port>[^_]*)")
# the comment of a Service's rules in iptables mode, as in shop/web:http (pkg/proxy/iptables/proxier.go)
COMMENT = re.compile(r"^(?P<service>[a-z0-9-]+/[a-z0-9-]+)(?::(?P<port>[a-z0-9-]+))?$")
WHOSE = {
    "kube-proxy": re.compile(r"^\w+ kube-proxy | KUBE-"),
    "docker": re.compile(r"^\w+ docker-| DOCKER"),
    "podman (netavark)": re.compile(r"netavark", re.IGNORECASE),
    "portmap": re.compile(r"^\w+ cni_hostport | CNI-(?:DN-|HOSTPORT-)"),
    "firewalld": re.compile(r"^\w+ firewalld "),
}


def of(hops: Iterable[Hop], rules: Rules) -> Hop | None:
    """Return the rule of others that gave a packet another destination, ``None`` if none did."""
    for hop in hops:
        own = (hop.family, hop.table) == (FAMILY, TABLE)
        if not own and hop.verdict == "accept" and REDIRECTION.search(rules.text(hop)):
            return hop
    return None


def whose(redirected: Hop, hops: Sequence[Hop]) -> str:
    """Name who redirected a packet and for what, as a sentence does; empty if that cannot be told.

    ``hops`` are all that the packet met.
    """
    before = hops[: hops.index(redirected) + 1]
    program = next((name for name, of in WHOSE.items() if any(of.search(hop.place) for hop in before)), "")
    if program != "kube-proxy":
        return program
    names = [SERVICE.match(hop.chain) for hop in reversed(before)] + [COMMENT.match(_comment(redirected))]
    found = next((match for match in names if match), None)
    if not found:
        return program
    port = f":{found['port']}" if found["port"] else ""
    return f"{program}, for Service {found['service']}{port},"


def _comment(hop: Hop) -> str:
    """Return the comment that iptables gave a rule, of which nft 1.0.6 prints nothing."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        [(_, rules)] = netlink.ask([nf_tables.get_rules(hop.chain, hop.table, hop.family)])
    return next(
        (foreign_rules.comment_of_iptables(rule) for rule in rules if foreign_rules.number(rule) == hop.handle), ""
    )
