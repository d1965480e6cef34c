"""What is seen in a pod's network namespace: its interface and address, and who listens there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute

from cni_hostport.kernel import files, interfaces, namespaces, netns
from cni_hostport.operate.explain.packet import PROTOCOLS
from cni_hostport.operate.sockets import listeners
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cni_hostport.kernel.namespaces import Address
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.sockets import Listener
    from cni_hostport.operate.statements import Statement

IFF_RUNNING = 0x40  # linux/if.h
PACKET_SOCKETS, THEIR_INTERFACE = Path("/proc/thread-self/net/packet"), 4  # the column
ELSEWHERE = "Its sandbox has a network stack of its own, as those of gVisor and Kata Containers do."


@dataclass(frozen=True)
class Seen:
    """A pod's interface, its addresses, and the sockets on the port, ``None`` if those cannot be seen.

    ``hidden`` is whether the pod has its network stack elsewhere: the namespace holds neither its sockets nor its
    routes.
    """

    is_there: bool
    is_up: bool
    addresses: Collection[Address]
    listening: list[Listener] | None
    hidden: bool


def look(of: PortMapping) -> Seen:
    """Look into a pod's network namespace; raises ``OSError`` if that is not possible."""
    with netns.inside(of.netns):
        index, is_up = _interface(of.ifname)
        addresses = [address for address in namespaces.addresses() if address.interface == index]
        listening = listeners(of.protocol, of.pod_port or 0, of.version) if of.protocol in PROTOCOLS else None
        hidden = bool(index) and (_is_taken_over(index, addresses) or _is_redirected(index))
    return Seen(bool(index), is_up, addresses, listening, hidden)


def _interface(name: str) -> tuple[int, bool]:
    """Return an interface's index, 0 if there is none, and whether it is up and has a carrier."""
    index = interfaces.index(name)
    if not index:
        return 0, False
    with IPRoute() as route:
        return index, any(link["flags"] & IFF_RUNNING for link in route.get_links(index))


def _is_taken_over(index: int, addresses: Collection[Address]) -> bool:
    """Tell whether a program has an interface's packets, and has taken its addresses away.

    gVisor does that (google/gvisor, runsc/sandbox/network.go), and so does Kata Containers, whose program is a virtual
    machine, with its model 'macvtap' (kata-containers, virtcontainers/network_linux.go).
    """
    if any(address.is_global for address in addresses):
        return False
    with IPRoute() as route:
        if any(link.get_attr("IFLA_LINK") == index and _kind(link) == "macvtap" for link in route.get_links()):
            return True
    lines = files.text(PACKET_SOCKETS).splitlines()[1:]
    return any(line.split()[THEIR_INTERFACE] == str(index) for line in lines)


def _is_redirected(index: int) -> bool:
    """Tell whether all that comes in on an interface goes on to a tap device.

    Kata Containers does that with its model 'tcfilter', the default one, and leaves the addresses where they are
    (kata-containers, virtcontainers/network_linux.go, setupTCFiltering).
    """
    with IPRoute() as route:
        taps = {link["index"] for link in route.get_links() if _kind(link) == "tun"}
        ingress = {qdisc["index"] for qdisc in route.get_qdiscs() if qdisc.get_attr("TCA_KIND") == "ingress"}
    return index in ingress and bool(taps & ingress)


def _kind(link: Any) -> str:
    return link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or ""


def statements(of: PortMapping, seen: Seen) -> Iterator[Statement]:
    """Say what is as it should be, and what is not."""
    has_address = of.pod_ip in {address.ip.ip for address in seen.addresses}
    if not seen.is_up:
        yield problem(
            f"{of.ifname} of {of.who} is {'down' if seen.is_there else 'missing'}", "Nothing reaches the pod."
        )
    elif seen.hidden and not has_address:
        yield note(f"whether {of.who} has {of.pod_ip} cannot be seen: {of.ifname} has no addresses", ELSEWHERE)
    elif not has_address:
        yield problem(f"{of.ifname} of {of.who} does not have the address {of.pod_ip}", "Nothing reaches the pod.")
    else:
        yield ok(f"{of.ifname} of {of.who} is up and has {of.pod_ip}")
    yield _listening(of, seen)


def _listening(of: PortMapping, seen: Seen) -> Statement:
    if seen.listening is None:
        return note(f"whether anything listens on {of.target}/{of.protocol} cannot be seen")
    serving = [listener for listener in seen.listening if of.pod_ip and listener.serves(of.pod_ip)]
    if serving:
        return ok(f"{serving[0].process} listens there on {of.pod_port}/{of.protocol}")
    if seen.hidden:
        return note(f"whether anything listens on {of.target}/{of.protocol} cannot be seen", ELSEWHERE)
    elsewhere = ", ".join(f"{listener.process} at {listener.address}" for listener in seen.listening)
    return problem(
        f"nothing listens on {of.target}/{of.protocol} in the pod",
        f"Only {elsewhere}, where connections from outside of the pod do not come." if elsewhere else "",
        "let it listen on 0.0.0.0 or ::" if elsewhere else "see that the container's process runs, and on which port",
    )
