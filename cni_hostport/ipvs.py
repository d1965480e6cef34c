"""The addresses of Services under kube-proxy's IPVS mode, which are local on the node and still not the node's own.

kube-proxy puts every ClusterIP, and others that Services have, on an interface that it makes for that. A host port
without a host address does not answer there: it would take the connections of a Service of the same number, from all
pods (kubernetes/kubernetes issue 66103). The sets in the ruleset are filled by every ADD.
"""

from __future__ import annotations

from _socket import if_nametoindex
from ipaddress import IPv4Address, IPv6Address
from struct import Struct

from cni_hostport.netlink import NLM_F_DUMP, Netlink, attributes
from cni_hostport.table import FAMILY, IPVS_SETS, TABLE

INTERFACE = "kube-ipvs0"  # kubernetes/kubernetes, pkg/proxy/ipvs (defaultDummyDevice)
NETLINK_ROUTE, RTM_GETADDR, IFA_ADDRESS, IFA_LOCAL = 0, 22, 1, 2  # linux/rtnetlink.h, linux/if_addr.h
IFADDRMSG = Struct("=BBBBL")  # linux/if_addr.h: family, prefix length, flags, scope, interface


def addresses() -> set[IPv4Address | IPv6Address]:
    """Return the addresses of kube-proxy's interface; raises ``OSError`` if the kernel cannot be asked."""
    try:
        index = if_nametoindex(INTERFACE)
    except OSError:
        return set()
    with Netlink(NETLINK_ROUTE) as netlink:
        [(error, answers)] = netlink.ask([(RTM_GETADDR, NLM_F_DUMP, IFADDRMSG.pack(0, 0, 0, 0, index))])
    if error:
        raise OSError(error, "cannot list the addresses of " + INTERFACE)
    found = set()
    for answer in answers:
        if IFADDRMSG.unpack_from(answer)[4] == index:
            values = dict(attributes(answer[IFADDRMSG.size :]))
            packed = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS, b"")
            found.add(IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed))  # noqa: PLR2004 - bytes
    return found


def fill() -> list[str]:
    """Return the commands that make the sets hold these addresses as they are now; raises ``OSError``."""
    commands = [f"flush set {FAMILY} {TABLE} {name}" for name in IPVS_SETS]
    present = addresses()
    for name, version in zip(IPVS_SETS, (4, 6), strict=True):
        members = ", ".join(str(address) for address in present if address.version == version)
        if members:
            commands.append(f"add element {FAMILY} {TABLE} {name} {{ {members} }}")
    return commands
