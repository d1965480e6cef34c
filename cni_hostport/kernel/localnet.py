"""The node's 127.0.0.0/8 as clients of host ports, which the kernel lets leave on interfaces with ``route_localnet``.

Such an interface also lets its neighbours reach what listens on the node's 127.0.0.1 (CVE-2020-8558): the ruleset
guards each that an attachment needs, and only those. With the last attachment the guard goes, and what this plugin
opened it closes before.
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

    Raises ``CNIError`` with code 102 if that cannot be read.
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
    """Let connections from the node's 127.0.0.0/8 leave on the interface towards the pod, if the plan needs that.

    Without a route of its own to the pod there is no such interface, which is only logged: the plugin that adds it may
    come later. Raises ``CNIError`` with code 102 if the sysctl, not yet set, cannot be written, or the kernel cannot be
    asked.
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
    """Take the guard off an interface that no attachment needs any more, and close it if this plugin opened it.

    One that stays open stays guarded.

    It is closed first. If an ADD comes meanwhile, the kernel does not let the guard go, and it is opened again: here,
    or by the ADD, which looks after its own transaction. Whatever goes wrong leaves the guard there.
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
