"""A tap device by which a packet comes in on another interface of the node, as if somebody outside had sent it.

A traffic control filter redirects what is written to the device. Device and filter are gone when the descriptor is
closed, however this process ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TUN = "/dev/net/tun"
DEVICE = b"hostport%d"  # the kernel counts, so that several can be there at once
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000  # linux/if_tun.h
INGRESS, INGRESS_CLASS, EVERY_PACKET, ETH_P_ALL = 0xFFFF0000, 0x10000, "0x0/0x0+0", 0x0003


@contextmanager
def tap_device(interface: str) -> Iterator[tuple[int, bytes]]:
    """Make a tap device for the block; frames written to it come in on ``interface``.

    Gives its descriptor and its MAC address. Raises ``OSError`` if the kernel refuses the device or the filter.
    """
    descriptor, name = _opened()
    try:
        with suppress(OSError):  # the packets that it would send of its own accord are no harm
            Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1")
        yield descriptor, _redirect(socket.if_nametoindex(name), interface)
    finally:
        os.close(descriptor)


def _opened() -> tuple[int, str]:
    """Return the descriptor and the name of a new tap device."""
    descriptor = None
    try:
        descriptor = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
        request = fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", DEVICE, IFF_TAP | IFF_NO_PI))
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        raise OSError(error.errno, f"{TUN} cannot be used: {error.strerror}") from error
    return descriptor, request[:16].rstrip(b"\0").decode()


def _redirect(index: int, interface: str) -> bytes:
    """Have what comes in on a device come in on ``interface`` instead; return the device's MAC address."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as route:
        target = socket.if_nametoindex(interface)
        redirect = {"kind": "mirred", "direction": "ingress", "action": "redirect", "ifindex": target}
        filter_options = {"parent": INGRESS, "protocol": ETH_P_ALL, "target": INGRESS_CLASS, "keys": [EVERY_PACKET]}
        try:
            route.link("set", index=index, state="up")
            route.tc("add", "ingress", index)
            route.tc("add-filter", "u32", index, **filter_options, action=redirect)
            mac = next(iter(route.link("get", index=index))).get_attr("IFLA_ADDRESS")
        except NetlinkError as error:
            reason = f"tc cannot redirect a packet to {interface}: {os.strerror(error.code)}"
            raise OSError(error.code, reason) from error
    return bytes.fromhex(mac.replace(":", ""))
