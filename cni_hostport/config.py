"""The network configuration, parsed and validated once, frozen afterwards.

Keys and meanings are those of the reference ``portmap`` plugin, so that a conflist needs only its type changed. Unknown
keys are ignored at every level, as the CNI conventions ask.
"""

import sys
from collections.abc import Mapping
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from types import ModuleType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from cni_hostport.dynamic_ports import keys, ranges
from cni_hostport.dynamic_ports.request import MAX_PORT, MOST, Block, merged, parse
from cni_hostport.errors import CNIError, Code, quoted

# pydantic looks for plugins of its own in all installed distributions, which takes longer than building these models
_no_plugins = ModuleType("pydantic.plugin._loader")
_no_plugins.__dict__["get_plugins"] = tuple
sys.modules.setdefault(_no_plugins.__name__, _no_plugins)

MAX_MARK_BIT = 31
# seconds; a caller kills who does not get on for the 30 of ``handover.UNTIL_DONE``
MAX_WAIT = 20
MAPPING_KEYS = {key.lower(): key for key in ("hostPort", "containerPort", "protocol", "hostIP")}
JSON_TYPES = {"model_type": "is not a JSON object", "tuple_type": "is not a list"}
FORBIDDEN_IN_CONDITION = frozenset(";#\\$")


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


def _network(value: object) -> IPv4Network | IPv6Network:
    try:
        return ip_network(value if isinstance(value, str) and "/" in value and "%" not in value else "", strict=False)
    except ValueError:
        msg = "is not a CIDR, such as 192.0.2.0/24 or 2001:db8::/64"
        raise ValueError(msg) from None


def _json_object(data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        msg = "is not a JSON object"
        raise ValueError(msg)  # noqa: TRY004 - pydantic turns a ValueError, not a TypeError, into its own error
    return data


class _Model(BaseModel):
    # validators take time to build, and a model that is only part of another needs none of its own
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class PortMapping(_Model):
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


class _Annotations(_Model):
    """The annotations of a pod, as far as they are about host ports."""

    dynamic_ports: Annotated[_Requests, Field(alias=keys.REQUEST)] = ()

    @model_validator(mode="before")
    @classmethod
    def _ours(cls, data: object) -> object:
        asked = _json_object(data).get(keys.REQUEST)
        return {} if asked is None else {keys.REQUEST: asked}


class _RuntimeConfig(_Model):
    port_mappings: Annotated[
        tuple[Annotated[PortMapping | None, BeforeValidator(_specified)], ...] | None, Field(alias="portMappings")
    ] = None
    dynamic_ports: Annotated[_Requests | None, Field(alias=keys.CAPABILITY)] = ()
    annotations: Annotated[_Annotations | None, Field(alias=keys.ANNOTATIONS)] = None


class _Interface(_Model):
    name: str | None = None
    sandbox: str | None = None


class _IP(_Model):
    """An address of a result: ``address`` since version 0.3.0, ``ip`` in the ``ip4`` and ``ip6`` of those before."""

    address: Annotated[
        IPv4Interface | IPv6Interface, BeforeValidator(_address), Field(validation_alias=AliasChoices("address", "ip"))
    ]
    interface: StrictInt | None = None


class PrevResult(_Model):
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


def _condition(tokens: object) -> object:
    """Refuse tokens that would not stay within their rule, and the iptables arguments that portmap takes as well."""
    if tokens is None:
        return ()
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        msg = "is not a list of strings"
        raise ValueError(msg)
    text = " ".join(tokens)
    if text.strip().startswith(("-", "!")):
        msg = "are iptables arguments; write nftables matches, such as 'ip', 'saddr', '192.0.2.0/24'"
        raise ValueError(msg)
    if not text.isascii() or not text.isprintable() or FORBIDDEN_IN_CONDITION & set(text) or text.count('"') % 2:
        msg = "hold a character that does not belong into an nftables match"
        raise ValueError(msg)
    return tuple(tokens)


_Condition = Annotated[tuple[StrictStr, ...], BeforeValidator(_condition)]


class NetworkConfig(_Model):
    """The plugin's own keys of the network configuration, and the mappings the runtime asks for."""

    snat: StrictBool = True
    masq_all: Annotated[StrictBool, Field(alias="masqAll")] = False
    conditions_v4: Annotated[_Condition, Field(alias="conditionsV4")] = ()
    conditions_v6: Annotated[_Condition, Field(alias="conditionsV6")] = ()
    wait_for_holder: Annotated[int, Field(alias="waitForHolder", ge=0, le=MAX_WAIT, strict=True)] = 5
    # the node's addresses on which mappings without a host address answer; none given: all
    host_addresses: Annotated[
        tuple[Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)], ...], Field(alias="hostAddresses")
    ] = ()
    # tuple[PortRange, ...]: dynamic host ports are given from these; none given: pods get none
    dynamic_ports: Annotated[Any, BeforeValidator(ranges.parse), Field(alias="dynamicPorts")] = ()
    dynamic_ports_per_pod: Annotated[int, Field(alias="dynamicPortsPerPod", ge=0, le=MOST, strict=True)] = 16
    runtime_config: Annotated[_RuntimeConfig, Field(alias="runtimeConfig")] = _RuntimeConfig.model_construct()
    prev_result: Annotated[PrevResult, Field(alias="prevResult")] = PrevResult.model_construct()
    # accepted or refused for portmap's sake, and not used
    backend: Literal["nftables"] = "nftables"
    mark_masq_bit: Annotated[int | None, Field(alias="markMasqBit", ge=0, le=MAX_MARK_BIT, strict=True)] = None
    external_set_mark_chain: Annotated[None, Field(alias="externalSetMarkChain")] = None

    @field_validator("backend", mode="before")
    @classmethod
    def _nftables_only(cls, backend: object) -> object:
        if backend != "nftables":
            msg = "is not supported: this plugin has one back end, nftables"
            raise ValueError(msg)
        return backend

    @field_validator("external_set_mark_chain", mode="before")
    @classmethod
    def _no_mark_chain(cls, chain: object) -> object:
        if chain is not None:
            msg = "is an iptables chain, which nftables rules cannot use: remove the key"
            raise ValueError(msg)
        return chain

    @property
    def conditions(self) -> dict[int, tuple[str, ...]]:
        """The conditions by IP version."""
        return {4: self.conditions_v4, 6: self.conditions_v6}

    @property
    def mappings(self) -> tuple[PortMapping, ...]:
        """The mappings to install: those with a host port."""
        return tuple(mapping for mapping in self.runtime_config.port_mappings or () if mapping is not None)

    @property
    def requests(self) -> tuple[Block, ...]:
        """The container ports for which a host port is asked for, in blocks of neighbours, each once."""
        annotations = self.runtime_config.annotations
        return merged([*(self.runtime_config.dynamic_ports or ()), *(annotations.dynamic_ports if annotations else ())])

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        """Validate the JSON object of stdin.

        Raises ``CNIError`` with ``Code.INVALID_CONFIG`` and a sentence that names every wrong key and its value.
        """
        try:
            # Go treats a null as absent
            parsed = cls.model_validate({key: value for key, value in config.items() if value is not None})
            _ = parsed.requests  # each may be right, and both together not
        except ValidationError as error:
            raise CNIError(Code.INVALID_CONFIG, "; ".join(_sentence(item) for item in error.errors())) from error
        except ValueError as error:
            raise CNIError(Code.INVALID_CONFIG, f"the container {error}") from error
        return parsed


def _sentence(error: Any) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] != "value_error":
        reason = JSON_TYPES.get(error["type"]) or f"is invalid: {reason}"
    return f"{path} {quoted(error['input'])} {reason}"
