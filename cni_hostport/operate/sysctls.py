"""The kernel's network settings that host ports depend on: forwarding, reverse path filtering, what bridges do.

A setting is named by its path below ``/proc/sys``, since the name of an interface in it can have dots.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

SYSCTLS = Path("/proc/sys")
INTERFACES = "net/ipv4/conf"
FORWARDING = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}  # by IP version
# br_netfilter: what a bridge passes on meets the rules for routed packets, too; by IP version
BRIDGE_CALLS = {4: "net/bridge/bridge-nf-call-iptables", 6: "net/bridge/bridge-nf-call-ip6tables"}
STRICT = 1  # of rp_filter (ip-sysctl.rst)


def read(name: str) -> int:
    """Return the value of a setting; raises ``OSError`` if it cannot be read, ``ValueError`` if it is not a number."""
    return int(text(name))


def text(name: str) -> str:
    """Return a setting as the kernel writes it; raises ``OSError`` if it cannot be read."""
    with open(f"{SYSCTLS}/{name}") as setting:  # there can be thousands
        return setting.read().strip()


def value(name: str) -> int | None:
    """Return the value of a setting, ``None`` if it is not there or not a number; raises ``OSError``."""
    with suppress(FileNotFoundError, ValueError):
        return read(name)
    return None


def interface_setting(interface: str, name: str) -> str:
    """Return the full name of a setting that each interface has for IPv4."""
    return f"{INTERFACES}/{interface}/{name}"


def interface_values(name: str) -> dict[str, int]:
    """Return the values of such a setting by interface, with ``all`` and ``default``; raises ``OSError``."""
    values = {}
    for interface in sorted(os.listdir(SYSCTLS / INTERFACES)):
        with suppress(FileNotFoundError):  # interfaces come and go
            values[interface] = read(interface_setting(interface, name))
    return values


def is_rp_filter_strict(interface: str) -> bool:
    """Tell whether rp_filter is strict on an interface, where the kernel takes the greater value (ip-sysctl.rst)."""
    return max(value(interface_setting(name, "rp_filter")) or 0 for name in ("all", interface)) == STRICT


def dotted(name: str) -> str:
    """Return a setting's name as sysctl takes it: with dots, unless an interface in it has one."""
    return name if "." in name else name.replace("/", ".")
