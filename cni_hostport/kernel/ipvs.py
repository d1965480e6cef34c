"""The addresses of Services in kube-proxy's IPVS mode: the node has them, but they are not the node's own.

kube-proxy makes an interface, and puts every ClusterIP and other addresses of Services on it. A host port without a
host address must not answer there: it would take all pods' connections to a Service with the same port number
(kubernetes/kubernetes issue 66103). So the ruleset has sets of these addresses. Each ADD updates the sets, and so does
the resident process when the addresses change.
"""

from __future__ import annotations

import os
from _socket import AF_NETLINK, SOCK_RAW, inet_ntop, socket
from contextlib import suppress
from errno import EINTR
from ipaddress import IPv4Address, IPv6Address, ip_address
from struct import Struct

from cni_hostport.errors import CNIError, Code, NFTError
from cni_hostport.kernel import interfaces
from cni_hostport.names import FAMILY, SERVICES, TABLE
from cni_hostport.netlink import FAMILIES_BY_SIZE, NETLINK_ROUTE, NLM_F_DUMP, SOCK_CLOEXEC, Netlink, attributes
from cni_hostport.text import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    import select
    from typing import NoReturn

INTERFACE = "kube-ipvs0"  # kubernetes/kubernetes, pkg/proxy/ipvs (defaultDummyDevice)
SOCK_NONBLOCK = 0o4000
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22  # linux/rtnetlink.h
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100
IFA_ADDRESS, IFA_LOCAL = 1, 2  # linux/if_addr.h
NLMSGHDR = Struct("=LHHLL")  # linux/netlink.h; the second is the type
IFADDRMSG = Struct("=BBBBL")  # linux/if_addr.h: family, prefix length, flags, scope, interface
LARGEST_MESSAGE = 0x4000  # bytes of the kernel's message of a change
ADDRESS_SIZES = {SERVICES[4]: 4, SERVICES[6]: 16}  # bytes, by the name of the set
# each but the last was spoiled by somebody else's change
LISTING_ATTEMPTS = 5
UPDATE_ATTEMPTS = 5
POLLIN = 1  # select.POLLIN
NO_CHILD = -1  # instead of a descriptor


def addresses() -> set[IPv4Address | IPv6Address]:
    """Return the addresses of kube-proxy's interface; raises ``OSError`` if the kernel cannot be asked."""
    return {ip_address(packed) for packed in _present()[0]}


def _present() -> tuple[set[bytes], bool]:
    """Return the packed addresses, of which there can be thousands, and whether these are all.

    Some may be missing while addresses come and go, as when kube-proxy starts. Raises ``OSError``.
    """
    index = interfaces.index(INTERFACE)
    if not index:
        return set(), True
    with Netlink(NETLINK_ROUTE) as netlink:
        for _ in range(LISTING_ATTEMPTS):
            [(error, answers)] = netlink.ask([(RTM_GETADDR, NLM_F_DUMP, IFADDRMSG.pack(0, 0, 0, 0, index))])
            if error != EINTR:  # else some address of the node came or went meanwhile
                break
    if error not in {0, EINTR}:
        raise OSError(error, os.strerror(error))
    found = set()
    for answer in answers:
        if IFADDRMSG.unpack_from(answer)[4] == index:
            for kind, value in attributes(answer[IFADDRMSG.size :]):
                if kind in {IFA_ADDRESS, IFA_LOCAL}:  # the same, but for the peer of a point-to-point link
                    found.add(value)
                    break
    return found, not error


def fill() -> list[str]:
    """Return the commands that make the sets hold these addresses as they are now, none if they do.

    Raises ``CNIError`` with ``HOST_SETTING`` if the kernel does not tell the addresses, and ``NFTError`` if it does
    not tell the sets.
    """
    return _changes({name: members or set() for name, members in _held().items()})


def sync() -> None:
    """Bring the sets up to date, where they are; raises what ``fill`` does."""
    from cni_hostport.kernel.nft import Nft

    for attempt in range(UPDATE_ATTEMPTS):
        held = _held()
        commands = _changes({name: members for name, members in held.items() if members is not None})
        try:
            Nft().run(commands)
            break
        except NFTError as error:
            from cni_hostport.kernel import refusals

            if not refusals.may_be_a_race(error) or attempt == UPDATE_ATTEMPTS - 1:
                raise


def _held() -> dict[str, set[bytes] | None]:
    """Return what the sets hold, by name; ``None`` for one that is not there."""
    from cni_hostport.lookup import Lookup

    lookup = Lookup(shared=True)
    return {name: lookup.members(name) for name in ADDRESS_SIZES}


def _changes(held: dict[str, set[bytes]]) -> list[str]:
    # asked after the sets: what comes in between, and was put into them by others, is not taken out
    try:
        present, is_all = _present() if held else (set[bytes](), True)
    except OSError as error:
        raise CNIError(Code.HOST_SETTING, f"cannot list the addresses of {INTERFACE}: {error.strerror}") from error
    commands = []
    for name, members in held.items():
        size = ADDRESS_SIZES[name]
        wanted = {address for address in present if len(address) == size}
        outdated = members - wanted if is_all else set()
        for verb, changed in (("add", wanted - members), ("delete", outdated)):
            if changed:
                elements = ", ".join(inet_ntop(FAMILIES_BY_SIZE[size], address) for address in changed)
                commands.append(f"{verb} element {FAMILY} {TABLE} {name} {{ {elements} }}")
    return commands


class Watch:
    """Keeps the sets up to date in the network namespace in which it was made, from a poll loop.

    A child does that, since it can take long where there are many addresses. kube-proxy adds them by the thousand: so
    there is one child at a time, and the next one deals with all that has changed since.
    """

    def __init__(self, events: select.poll) -> None:
        """Begin to listen; raises ``OSError`` if the kernel refuses that."""
        self._news = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE)
        self._news.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
        self._events = events
        self._events.register(self._news, POLLIN)
        self._is_due = True
        self._child = NO_CHILD  # the descriptor that ends with it

    def work(self) -> None:
        """Start a child if there is something to do, and none at work."""
        if not self._is_due or self._child != NO_CHILD:
            return
        self._child, child_end = os.pipe()
        try:
            if not os.fork():
                _sync_and_end()
        except OSError:
            os.close(self._child)
            self._child = NO_CHILD
            return  # it stays due
        finally:
            os.close(child_end)
        self._is_due = False
        self._events.register(self._child, POLLIN)

    def takes(self, descriptor: int) -> bool:
        """Handle a descriptor on which the poll loop has found something; tell whether it is one of this watch."""
        if descriptor == self._news.fileno():
            self._is_due |= self._hears_a_change()
        elif descriptor == self._child:
            self._events.unregister(descriptor)
            os.close(descriptor)
            self._child = NO_CHILD
        else:
            return False
        return True

    def _hears_a_change(self) -> bool:
        is_changed = False
        while True:
            try:
                is_changed |= _is_a_change(self._news.recv(LARGEST_MESSAGE))
            except BlockingIOError:
                return is_changed
            except OSError:
                return True  # ENOBUFS: the kernel had more to say than it could keep


def _is_a_change(message: bytes) -> bool:
    """Tell whether a message of the kernel's is about kube-proxy's interface or its addresses."""
    kind = NLMSGHDR.unpack_from(message)[1]
    if kind not in {RTM_NEWADDR, RTM_DELADDR}:
        return INTERFACE.encode() + b"\0" in message
    try:
        return bool(IFADDRMSG.unpack_from(message, NLMSGHDR.size)[4] == interfaces.index(INTERFACE))
    except OSError:
        return True  # it may be one


def _sync_and_end() -> NoReturn:
    try:
        sync()
    except BaseException as error:  # noqa: BLE001 - whatever it is, this process ends here
        with suppress(OSError):
            reason = escaped(f"{type(error).__name__}: {error}")
            os.write(2, f"hostport: addresses of Services: {reason}\n".encode())
    finally:
        os._exit(0)
