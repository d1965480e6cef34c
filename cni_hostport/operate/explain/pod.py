"""The pod, as its network namespace shows it: its interface and address, and the sockets that listen there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyroute2 import IPRoute

from cni_hostport.kernel import files, interfaces, namespaces, netns
from cni_hostport.operate import sockets
from cni_hostport.operate.explain.pod_link import kind
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cni_hostport.kernel.addresses import Address
    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.sockets import Listener
    from cni_hostport.operate.statements import Statement

IFF_RUNNING = 0x40  # linux/if.h
PACKET_SOCKETS, INTERFACE_COLUMN = Path("/proc/thread-self/net/packet"), 4
STACK_OF_ITS_OWN = "Its sandbox has a network stack of its own, as those of gVisor and Kata Containers do."


@dataclass(frozen=True)
class PodState:
    """A pod's interface, its addresses, and the sockets on the port, ``None`` if those cannot be seen.

    ``has_own_stack`` is whether the pod has its network stack elsewhere: the namespace then holds neither its sockets
    nor its routes.
    """

    has_interface: bool
    is_up: bool
    addresses: Collection[Address]
    listeners: list[Listener] | None
    has_own_stack: bool


def inspect(mapping: InstalledMapping) -> PodState:
    """Look into a pod's network namespace; raises ``OSError`` if that is not possible."""
    with netns.inside(mapping.netns):
        index, is_up = _interface(mapping.ifname)
        addresses = [address for address in namespaces.addresses() if address.interface == index]
        listeners = None
        if mapping.protocol in sockets.LISTENING_STATES:
            listeners = sockets.listeners(mapping.protocol, mapping.pod_port or 0, mapping.version)
        has_own_stack = bool(index) and (_is_taken_over(index, addresses) or _is_redirected(index))
    return PodState(bool(index), is_up, addresses, listeners, has_own_stack)


def _interface(name: str) -> tuple[int, bool]:
    """Return an interface's index, 0 if there is none, and whether it is up and has a carrier."""
    index = interfaces.index(name)
    if not index:
        return 0, False
    with IPRoute() as netlink:
        return index, any(link["flags"] & IFF_RUNNING for link in netlink.get_links(index))


def _is_taken_over(index: int, addresses: Collection[Address]) -> bool:
    """Tell whether a program has an interface's packets, and has taken its addresses away.

    gVisor does that (google/gvisor, runsc/sandbox/network.go), and so does Kata Containers, whose program is a virtual
    machine, with its model 'macvtap' (kata-containers, virtcontainers/network_linux.go).
    """
    if any(address.is_global for address in addresses):
        return False
    with IPRoute() as netlink:
        if any(link.get_attr("IFLA_LINK") == index and kind(link) == "macvtap" for link in netlink.get_links()):
            return True
    lines = files.text(PACKET_SOCKETS).splitlines()[1:]
    return any(line.split()[INTERFACE_COLUMN] == str(index) for line in lines)


def _is_redirected(index: int) -> bool:
    """Tell whether all that comes in on an interface goes on to a tap device.

    Kata Containers does that with its model 'tcfilter', the default one, and leaves the addresses where they are
    (kata-containers, virtcontainers/network_linux.go, setupTCFiltering).
    """
    with IPRoute() as netlink:
        taps = {link["index"] for link in netlink.get_links() if kind(link) == "tun"}
        ingress = {qdisc["index"] for qdisc in netlink.get_qdiscs() if qdisc.get_attr("TCA_KIND") == "ingress"}
    return index in ingress and bool(taps & ingress)


def statements(mapping: InstalledMapping, state: PodState) -> Iterator[Statement]:
    """Say of a pod's interface, its address and its sockets whether they are as they should be."""
    ifname, pod, pod_ip = mapping.ifname, mapping.container, mapping.pod_ip
    has_address = pod_ip in {address.ip.ip for address in state.addresses}
    if not state.is_up:
        yield problem(
            f"{ifname} of {pod} is {'down' if state.has_interface else 'missing'}", "Nothing reaches the pod."
        )
    elif state.has_own_stack and not has_address:
        yield note(f"whether {pod} has {pod_ip} cannot be seen: {ifname} has no addresses", STACK_OF_ITS_OWN)
    elif not has_address:
        yield problem(f"{ifname} of {pod} does not have the address {pod_ip}", "Nothing reaches the pod.")
    else:
        yield ok(f"{ifname} of {pod} is up and has {pod_ip}")
    yield _listener_statement(mapping, state)


def _listener_statement(mapping: InstalledMapping, state: PodState) -> Statement:
    if state.listeners is None:
        return note(f"whether anything listens on {mapping.target}/{mapping.protocol} cannot be seen")
    serving = [listener for listener in state.listeners if mapping.pod_ip and listener.serves(mapping.pod_ip)]
    if serving:
        return ok(f"{serving[0].process} listens there on {mapping.pod_port}/{mapping.protocol}")
    if state.has_own_stack:
        return note(f"whether anything listens on {mapping.target}/{mapping.protocol} cannot be seen", STACK_OF_ITS_OWN)
    others = ", ".join(f"{listener.process} at {listener.address}" for listener in state.listeners)
    return problem(
        f"nothing listens on {mapping.target}/{mapping.protocol} in the pod",
        f"Only {others}, where connections from outside of the pod do not come." if others else "",
        "let it listen on 0.0.0.0 or ::" if others else "see that the container's process runs, and on which port",
    )
