"""The keys that a runtime adds to the network configuration for one container: ``runtimeConfig`` and ``prevResult``.

Source: CNI specification 1.1.0, "Deriving execution configuration from plugin configuration". A result is read as any
CNI version writes it. Unknown keys are ignored at every level, as the CNI conventions ask.
"""

import sys
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator

from cni_hostport.dynamic_ports import keys
from cni_hostport.dynamic_ports.request import MAX_PORT, Block, parse

# pydantic looks for plugins of its own in all installed distributions, which takes longer than building these models
_no_plugins = ModuleType("pydantic.plugin._loader")
_no_plugins.__dict__["get_plugins"] = tuple
sys.modules.setdefault(_no_plugins.__name__, _no_plugins)

MAPPING_KEYS = {key.lower(): key for key in ("hostPort", "containerPort", "protocol", "hostIP")}


def _port(value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_PORT:
        msg = f"is not a whole number from 1 to {MAX_PORT}"
        raise ValueError(msg)
    return value


def _protocol(value: object) -> str:
    protocol = value.lower() if isinstance(value, str) else value
    if protocol is None or protocol == "":
        return "tcp"
    if protocol not in ("tcp", "udp", "sctp"):  # not a set: a list or an object cannot be looked up in one
        msg = "is not tcp, udp or sctp"
        raise ValueError(msg)
    return str(protocol)


def _host_ip(value: object) -> IPv4Address | IPv6Address | None:
    if value is None or value == "":
        return None
    try:
        # ipaddress itself would take an integer, and a zone with any text in it
        address = ip_address(value if isinstance(value, str) and "%" not in value else "")
    except ValueError:
        msg = "is not an IP address"
        raise ValueError(msg) from None
    return getattr(address, "ipv4_mapped", None) or address


def _address(value: object) -> IPv4Interface | IPv6Interface:
    try:
        return ip_interface(value if isinstance(value, str) and "/" in value and "%" not in value else "")
    except ValueError:
        msg = "is not an address with a prefix length"
        raise ValueError(msg) from None


def _requests(value: object) -> tuple[Block, ...]:
    if not isinstance(value, str):
        msg = "is not a text such as '80/tcp, 9000-9002/udp'"
        raise ValueError(msg)  # noqa: TRY004 - pydantic turns a ValueError, not a TypeError, into its own error
    return parse(value)


def _json_object(data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        msg = "is not a JSON object"
        raise ValueError(msg)  # noqa: TRY004 - pydantic turns a ValueError, not a TypeError, into its own error
    return data


class Model(BaseModel):
    """What is read of a JSON object: frozen, without unknown keys."""

    # validators take time to build, and a model that is only part of another needs none of its own
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class PortMapping(Model):
    """One mapping whose host port is specified. ``host_ip`` is ``None`` for every local address of both families."""

    host_port: Annotated[int, BeforeValidator(_port), Field(alias="hostPort")]
    container_port: Annotated[int, BeforeValidator(_port), Field(alias="containerPort")]
    protocol: Annotated[Literal["tcp", "udp", "sctp"], BeforeValidator(_protocol)] = "tcp"
    host_ip: Annotated[IPv4Address | IPv6Address | None, BeforeValidator(_host_ip), Field(alias="hostIP")] = None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        return _in_our_case(_json_object(data))

    @property
    def request(self) -> None:
        """The dynamic request to which it was assigned: none, it was asked for by its number."""
        return None

    def __str__(self) -> str:
        """Name the mapping as a person would: ``8080/tcp``, ``8080/tcp on 192.0.2.1``."""
        address = f" on {self.host_ip}" if self.host_ip else ""
        return f"{self.host_port}/{self.protocol}{address}"


def _in_our_case(mapping: dict[str, Any]) -> dict[str, Any]:
    # containerd's go-cni sends HostPort, other callers hostPort: Go reads keys in any case, and the last one counts
    return {MAPPING_KEYS.get(key.lower(), key): value for key, value in mapping.items()}


def _specified(mapping: object) -> object:
    """Replace a mapping whose host port is 0, null or missing, which means unspecified, by ``None``.

    Source: CRI API, ``PortMapping.host_port`` (kubernetes/kubernetes issue 130460).
    """
    if not isinstance(mapping, dict):
        return mapping
    port = _in_our_case(mapping).get("hostPort")
    return None if port is None or (type(port) is int and port == 0) else mapping


_Requests = Annotated[Any, BeforeValidator(_requests)]  # tuple[Block, ...]


class _Annotations(Model):
    """The annotations of a pod, as far as they are about host ports."""

    dynamic_ports: Annotated[_Requests, Field(alias=keys.REQUEST)] = ()

    @model_validator(mode="before")
    @classmethod
    def _ours(cls, data: object) -> object:
        asked = _json_object(data).get(keys.REQUEST)
        return {} if asked is None else {keys.REQUEST: asked}


class RuntimeConfig(Model):
    """What the runtime asks for: mappings, and dynamic host ports by either capability."""

    port_mappings: Annotated[
        tuple[Annotated[PortMapping | None, BeforeValidator(_specified)], ...] | None, Field(alias="portMappings")
    ] = None
    dynamic_ports: Annotated[_Requests | None, Field(alias=keys.CAPABILITY)] = ()
    annotations: Annotated[_Annotations | None, Field(alias=keys.ANNOTATIONS)] = None


class _Interface(Model):
    name: str | None = None
    sandbox: str | None = None


class _IP(Model):
    """An address of a result: ``address`` since version 0.3.0, ``ip`` in the ``ip4`` and ``ip6`` of those before."""

    address: Annotated[
        IPv4Interface | IPv6Interface, BeforeValidator(_address), Field(validation_alias=AliasChoices("address", "ip"))
    ]
    interface: StrictInt | None = None


class PrevResult(Model):
    """The addresses and interfaces of the plugins before this one, of any CNI version."""

    interfaces: tuple[_Interface, ...] | None = None
    ips: tuple[_IP, ...] | None = None
    ip4: _IP | None = None
    ip6: _IP | None = None

    def addresses(self, ifname: str) -> list[IPv4Interface | IPv6Interface]:
        """Return the addresses of the container's interface ``ifname``, in the order of the result.

        An address that names no interface, or none of the result's, counts as the container's.
        """
        interfaces = self.interfaces or ()
        ips = [ip for ip in (*(self.ips or ()), self.ip4, self.ip6) if ip is not None]
        return [ip.address for ip in ips if self._is_container_side(ip, interfaces, ifname)]

    @staticmethod
    def _is_container_side(ip: _IP, interfaces: tuple[_Interface, ...], ifname: str) -> bool:
        if ip.interface is None or not 0 <= ip.interface < len(interfaces):
            return True
        interface = interfaces[ip.interface]
        return interface.name == ifname and bool(interface.sandbox)
