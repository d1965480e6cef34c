"""The sysctl ``route_localnet``: it lets clients on the node's 127.0.0.0/8 reach pods through an interface.

With the sysctl, neighbours on that interface also reach what listens on the node's 127.0.0.1 (CVE-2020-8558). So the
ruleset guards each interface that an attachment needs, and only those. The last attachment takes the guard with it.
Before that, this plugin sets the sysctl to 0 if it was this plugin that set it to 1.
"""

from __future__ import annotations

from errno import ENOENT

from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel import interfaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Address

    from cni_hostport.lookup import Lookup
    from cni_hostport.ruleset.plan import Plan


def is_open(interface: int) -> bool:
    """Tell whether 127.0.0.0/8 is routed on an interface, by its index; not on one that is not there.

    Raises ``CNIError`` with ``HOST_SETTING`` if that cannot be read.
    """
    setting = f"route_localnet of interface {interface}"
    try:
        setting = _setting(interface)
        return _read(setting)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CNIError(Code.HOST_SETTING, f"cannot read {setting}: {error.strerror}") from error


def open_for(plan: Plan, log: Callable[[str], None]) -> None:
    """Set ``route_localnet`` on the interface towards the pod, if the plan needs connections from 127.0.0.0/8.

    Where the node has no route to the pod but the default one, there is no such interface. That is only logged, since
    a later plugin may add the route. Raises ``CNIError`` with ``HOST_SETTING`` if the sysctl is not set and cannot be
    written, or the kernel cannot be asked.
    """
    if plan.local_route_to and not plan.interface:
        log(
            "host ports on 127.0.0.1 may not work: there is no route to the pod's address"
            f" {plan.local_route_to}: {_lack_of_route(plan.local_route_to)}"
        )
    elif plan.local_route_to:
        setting = f"route_localnet of interface {plan.interface}"
        try:
            setting = _setting(plan.interface)
            if not _read(setting):
                _write(setting, "1")
        except OSError as error:
            raise CNIError(
                Code.HOST_SETTING,
                f"cannot set {setting} to 1, which host ports on 127.0.0.1 need"
                f' (with "snat": false they are not offered): {error.strerror}',
            ) from error


def _lack_of_route(address: IPv4Address) -> str:
    from cni_hostport.kernel import routes

    try:
        routes.route_to(address)
    except routes.NoRouteError as error:
        return error.strerror or str(error)
    except OSError as error:
        reason = f"cannot tell how the node reaches {address}: {error.strerror}"
        raise CNIError(Code.HOST_SETTING, reason) from error
    return "only the default route leads there"


def close(lookup: Lookup, interface: int, log: Callable[[str], None]) -> None:
    """Close an interface that no attachment needs any more, if this plugin opened it, and then remove its guard.

    An interface that stays open stays guarded. If an ADD comes between the two steps, the kernel refuses to remove the
    guard. Then the interface is opened again: here, or by that ADD, which looks once more after its transaction. After
    any error, the guard is still there.
    """
    is_opened_here = lookup.localnet_left(interface)
    if is_opened_here is None:
        return
    setting = f"route_localnet of interface {interface}"
    try:
        setting = _setting(interface)
        if is_opened_here:
            _write(setting, "0")
        elif _read(setting):
            return  # by somebody else, or by this plugin before the ruleset was flushed
    except FileNotFoundError:
        is_opened_here = False  # the interface is gone
    except OSError as error:
        log(f"warning: {setting} stays 1, and the interface guarded: {error.strerror}")
        return
    if lookup.unguard(interface) or not is_opened_here:
        return
    try:
        _write(setting, "1")  # for who came meanwhile
    except OSError as error:
        if error.errno != ENOENT:  # else the interface is gone
            log(f"warning: {setting} is 0, though another attachment needs it: {error.strerror}")


def _setting(interface: int) -> str:
    """Return the path of the sysctl; raises ``FileNotFoundError`` where there is no such interface."""
    name = interfaces.name(interface)
    if not name:
        raise FileNotFoundError(ENOENT, f"there is no interface {interface}")
    return f"/proc/sys/net/ipv4/conf/{name}/route_localnet"


def _read(setting: str) -> bool:
    with open(setting) as file:
        return file.read().strip() == "1"


def _write(setting: str, value: str) -> None:
    with open(setting, "w") as file:
        file.write(value)
