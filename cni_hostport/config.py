"""The network configuration, parsed and validated once, frozen afterwards.

Keys and meanings are those of the reference ``portmap`` plugin, so that a conflist needs only its type changed. Unknown
keys are ignored at every level, as the CNI conventions ask. What a runtime adds for a container is in ``runtime_keys``.
"""

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, StrictStr, ValidationError, field_validator

from cni_hostport.dynamic_ports import ranges
from cni_hostport.dynamic_ports.request import MOST, Block, merged
from cni_hostport.errors import CNIError, Code, quoted
from cni_hostport.runtime_keys import Model, PortMapping, PrevResult, RuntimeConfig

MAX_MARK_BIT = 31
# seconds; a caller kills who does not get on for the 30 of ``handover.UNTIL_DONE``
MAX_WAIT = 20
JSON_TYPES = {"model_type": "is not a JSON object", "tuple_type": "is not a list"}
FORBIDDEN_IN_CONDITION = frozenset(";#\\$")


def _network(value: object) -> IPv4Network | IPv6Network:
    try:
        return ip_network(value if isinstance(value, str) and "/" in value and "%" not in value else "", strict=False)
    except ValueError:
        msg = "is not a CIDR, such as 192.0.2.0/24 or 2001:db8::/64"
        raise ValueError(msg) from None


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


class NetworkConfig(Model):
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
    runtime_config: Annotated[RuntimeConfig, Field(alias="runtimeConfig")] = RuntimeConfig.model_construct()
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
