"""Connection tracking: the kernel does not translate a flow that it knows in another way when the rules change.

The kernel knows a flow as long as somebody sends: a client with a fixed source port, even if nobody answers; or the
peer of a pod that spoke first, whose packets match the entry by which the node masquerades the pod. The functions here
have the kernel forget such flows. They do not touch others: flows to the same port number of another host, flows of
another mapping, and the node's own flows.

This helps clients that are already sending: an error is logged, and fails no operation. The kernel is asked without a
library, since a DEL imports none.
"""

from __future__ import annotations

import os
from errno import EIO, ENOENT
from functools import cache

from cni_hostport.kernel.nf_conntrack import (
    TUPLE_ORIG,
    TUPLE_REPLY,
    Flow,
    count,
    entries,
    everything,
    has_port,
    of_protocol,
    with_port,
)
from cni_hostport.netlink import FAMILIES_BY_SIZE, NETLINK_NETFILTER, NETLINK_ROUTE, Netlink, attribute, shared

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from ipaddress import IPv4Network, IPv6Network

    from cni_hostport.kernel.nf_conntrack import End
    from cni_hostport.log import Log
    from cni_hostport.lookup import Held
    from cni_hostport.netlink import Message
    from cni_hostport.ruleset.plan import Plan

    Port = tuple[str, bytes | None, int]  # protocol, packed host address or ``None`` for any, host port

RTM_GETROUTE, RTA_DST, RTN_LOCAL = 26, 1, 2  # linux/rtnetlink.h
RTM_TYPE = 7  # where struct rtmsg has it
# A filtered dump walks the kernel's whole hash table, in 9 ms if it has 262,144 buckets and nothing in them. So many
# entries are read here in that time.
ENTRIES_PER_WALK = 2500
DELETED_AT_ONCE = 64  # flows; the socket's buffer has to hold an acknowledgement of each
SYN_SENT, SYN_RECV, SYN_SENT2 = 1, 2, 9  # linux/netfilter/nf_conntrack_tcp.h
COOKIE_WAIT = 2  # linux/netfilter/nf_conntrack_sctp.h
CLIENTS, PEERS = (TUPLE_ORIG,), (TUPLE_REPLY,)
EVERYBODY = CLIENTS + PEERS
FILTERED_BY_PORT = ("tcp", "udp")  # ctnetlink_filter_match_tuple


def forget_elsewhere(
    plans: Sequence[Plan],
    given: Callable[[], set[tuple[str, bytes, int]]],
    log: Log,
    directions: Sequence[int] = EVERYBODY,
) -> None:
    """Delete the flows at the host ports of plans, on the node's own addresses, that do not lead to the plan's pod.

    Such a flow is older than the mapping: a client sent before the pod was there, or another pod spoke first, and the
    node masquerades it with this port. Flows of TCP and SCTP are deleted only while their connection is being opened,
    so that a connection to a service of the node's goes on. Flows are also left alone at the ports that ``given``
    returns, as (protocol, packed host address, port): mappings of one address have those, and win over mappings of any
    address.

    ``directions`` tells which UDP flows are looked for: those of ``CLIENTS``, of ``PEERS`` of pods that spoke first, or
    both.
    """
    from ipaddress import ip_address

    from cni_hostport.kernel import ipvs

    by_port = {
        (
            forward.protocol,
            forward.host_ip.packed if forward.host_ip else len(forward.pod_ip.packed),
            forward.host_port,
        ): ((forward.pod_ip.packed, forward.container_port), plan.host_addresses[forward.version])
        for plan in plans
        for forward in plan.forwards
    }
    given, local, services = cache(given), _LocalAddresses(), cache(ipvs.addresses)

    @cache
    def is_any_address(address: bytes, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
        """Tell whether mappings of any address, limited to these networks if there are some, answer on this one."""
        if address not in local:
            return False
        host_address = ip_address(address)
        is_limited = networks and not any(host_address in network for network in networks)
        return not is_limited and host_address not in services()

    def is_elsewhere(flow: Flow) -> bool:
        return _has_only_begun(flow) and (
            is_stray(flow, flow.destination, flow.reply_source, whole=True)
            or (flow.is_masqueraded and is_stray(flow, flow.reply_destination, flow.source, whole=False))
        )

    def is_stray(flow: Flow, at: End, other: End, *, whole: bool) -> bool:
        """Tell whether a flow at a port of the node has another end than the pod, whose port counts with ``whole``."""
        address, port = at
        exact = by_port.get((flow.protocol, address, port))
        found = exact or by_port.get((flow.protocol, len(address), port))
        if found is None:
            return False
        pod, networks = found
        if other == pod if whole else other[0] == pod[0]:
            return False
        return exact is not None or (
            is_any_address(address, networks) and (flow.protocol, address, port) not in given()
        )

    questions, ports = [], set()
    for protocol, size, port in sorted({(p, a if isinstance(a, int) else len(a), n) for p, a, n in by_port}):
        ports.add(port)
        if protocol == "udp":
            questions += [with_port(size, protocol, direction, port) for direction in directions]
        else:
            questions.append(of_protocol(size, protocol, beginning=True))
    _forget(questions, ports, is_elsewhere, log)


def forget_the_rest(plan: Plan, log: Log) -> None:
    """Delete what ``forget_elsewhere`` deletes, except UDP flows of clients; for a process without streams."""
    from cni_hostport.kernel.nft import Nft
    from cni_hostport.log import announce

    forget_elsewhere([plan], lambda: Nft().installed().given_ports, lambda line: announce(log, line), PEERS)


def forget_to_deleted(held: Held, ports: Iterable[Port], log: Log) -> None:
    """Delete the flows between some host ports of a deleted attachment and its pod; for a process without streams.

    Spared are flows by a port that leads to a pod of the same address again, since they may be new. A pod that has got
    the address, and no host port yet, can lose a connection that it has just opened by way of such a port.
    """
    from cni_hostport import nf_tables
    from cni_hostport.log import announce
    from cni_hostport.lookup import Held, Lookup

    def returned() -> set[tuple[bytes, Port]]:
        answers = Lookup(shared=True).ask(*map(nf_tables.get_element, held.elements))
        again = Held([element for element, answer in zip(held.elements, answers, strict=True) if answer], [], b"", 0)
        return {(pod, port) for pod in again.pods for port in again.ports}

    forget_to(held.pods, ports, lambda line: announce(log, line), returned)


def forget_to(
    pods: Iterable[bytes],
    ports: Iterable[Port],
    log: Log,
    returned: Callable[[], Iterable[tuple[bytes, Port]]] = tuple,
) -> None:
    """Delete the flows between these host ports and these pods, by packed addresses, whichever side spoke first.

    ``returned`` is asked once the flows are known: which pods have which of the ports again.
    """
    pods, mapped, local = set(pods), set(ports), _LocalAddresses()
    spared: set[tuple[bytes, Port]] = set()

    def is_theirs(flow: Flow) -> bool:
        return is_mapped(flow, flow.destination, flow.reply_source) or is_mapped(
            flow, flow.reply_destination, flow.source
        )

    def is_mapped(flow: Flow, at: End, other: End) -> bool:
        address, port = at
        if other[0] not in pods or address in pods:
            return False
        exact, any_address = (flow.protocol, address, port), (flow.protocol, None, port)
        wanted = mapped.difference(port for pod, port in spared if pod == other[0]) if spared else mapped
        return exact in wanted or (any_address in wanted and address in local)

    questions = []
    for protocol, size, port in sorted({(protocol, len(pod), port) for protocol, _, port in mapped for pod in pods}):
        if protocol in FILTERED_BY_PORT:
            questions += [with_port(size, protocol, direction, port) for direction in EVERYBODY]
        else:
            questions.append(of_protocol(size, protocol))
    _forget(questions, {port for _, _, port in mapped}, is_theirs, log, lambda: spared.update(returned()))


def _has_only_begun(flow: Flow) -> bool:
    """Tell whether the flow's connection is only being opened, so that its client tries again without the flow."""
    if flow.protocol == "tcp":
        # what the node itself has answered is a connection to a service of the node's
        return flow.state in {SYN_SENT, SYN_SENT2} or (flow.state == SYN_RECV and flow.is_redirected)
    return flow.protocol == "udp" or (flow.protocol == "sctp" and flow.state == COOKIE_WAIT)


class _LocalAddresses:
    """The addresses that packets are delivered to on this node, as ``fib daddr type local`` sees them."""

    def __init__(self) -> None:
        self._known: dict[bytes, bool] = {}

    def __contains__(self, address: bytes) -> bool:
        if address not in self._known:
            rtmsg = bytes([FAMILIES_BY_SIZE[len(address)], len(address) * 8, *bytes(10)])
            question = RTM_GETROUTE, 0, rtmsg + attribute(RTA_DST, address)
            with Netlink(NETLINK_ROUTE) as netlink:
                [(_, answers)] = netlink.ask([question])
            self._known[address] = any(answer[RTM_TYPE] == RTN_LOCAL for answer in answers)
        return self._known[address]


def _forget(
    questions: Sequence[Message],
    ports: Iterable[int],
    unwanted: Callable[[Flow], bool],
    log: Log,
    look_again: Callable[[], None] = lambda: None,
) -> None:
    """Ask the kernel for flows, and delete those that have one of these ports and are unwanted.

    ``look_again`` is called when they are known, if there are any: fewer may be unwanted by then.
    """
    try:
        packed = {port.to_bytes(2) for port in ports}
        kernel = shared(NETLINK_NETFILTER)
        flows = (Flow(answer) for answer in _answers(kernel, questions) if has_port(answer, packed))
        # the tuple alone, by which entries are deleted, names one of the default zone
        found = [flow for flow in flows if not flow.in_a_zone and unwanted(flow)]
        if found:
            look_again()
            _delete(kernel, list(filter(unwanted, found)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the ports are installed or gone as they should be
        log(f"warning: connection tracking entries were not deleted: {type(error).__name__}: {error}")


def _answers(kernel: Netlink, questions: Sequence[Message]) -> Iterator[bytes]:
    questions = list(dict.fromkeys(questions))
    [(error, answers)] = kernel.ask([count()])
    if not error and answers:
        number = entries(answers[0])
        if number <= ENTRIES_PER_WALK * (len(questions) - 1):
            questions = [everything()] if number else []
    for question in questions:
        [(error, answers)] = kernel.ask([question])
        if error:
            raise OSError(error, os.strerror(error))
        yield from answers


def _delete(kernel: Netlink, flows: Sequence[Flow]) -> None:
    """Delete flows; raises ``OSError`` in the end if the kernel refuses one that has not ended by itself."""
    refused = set()
    for start in range(0, len(flows), DELETED_AT_ONCE):
        outcomes = kernel.ask([flow.deletion for flow in flows[start : start + DELETED_AT_ONCE]])
        refused |= {error for error, _ in outcomes} - {0, ENOENT}
    if refused:
        error = min(refused - {EIO}, default=EIO)
        raise OSError(error, os.strerror(error))
