"""libcni's cache: what runtimes asked for each attachment, kept from the end of its ADD to the end of its DEL.

Source: containernetworking/cni, libcni/api.go (``cachedInfo``). It is read, and never written.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, Base64Bytes, BaseModel, ConfigDict, Field

from cni_hostport.kernel import files
from cni_hostport.libcni.conflist import Conflist, sentence
from cni_hostport.runtime_keys import PrevResult
from cni_hostport.skel import NAME, Call, is_ifname

if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Address, IPv6Address
    from pathlib import Path

T = TypeVar("T")

KIND = "cniCacheV1"
# libcni does not write a file at once
READ_ATTEMPTS = 5
READ_PAUSE = 0.05  # seconds


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        msg = f"{name!r} is not a name that CNI allows"
        raise ValueError(msg)
    return name


def _ifname(name: str) -> str:
    if not is_ifname(name):
        msg = f"{name!r} is not an interface's name"
        raise ValueError(msg)
    return name


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    container_id: Annotated[str, AfterValidator(_name), Field(alias="containerId")]
    ifname: Annotated[str, AfterValidator(_ifname), Field(alias="ifName")]
    network: Annotated[str, AfterValidator(_name), Field(alias="networkName")]
    netns: str = ""  # since libcni 1.2
    config: Base64Bytes
    cni_args: tuple[tuple[str, str], ...] | None = Field(None, alias="cniArgs")
    capability_args: dict[str, Any] | None = Field(None, alias="capabilityArgs")
    result: dict[str, Any]

    @property
    def sandbox(self) -> str:
        """The path of the network namespace, from the result where an older libcni did not write it down."""
        if self.netns:
            return self.netns
        interfaces = PrevResult.model_validate(self.result).interfaces or ()
        sandboxes = (interface.sandbox for interface in interfaces if interface.name == self.ifname)
        return next(filter(None, sandboxes), "")


@dataclass(frozen=True)
class Interface:
    """A container's interface, whichever plugins made it: its network namespace, if that is known, and addresses."""

    container_id: str
    ifname: str
    netns: str
    addresses: frozenset[IPv4Address | IPv6Address]


def read(path: Path, *, waits: bool = True) -> Call | None:
    """Return the ADD to which this plugin owes an attachment, as libcni made it.

    ``None`` if the file is gone, or is about something else. Raises ``ValueError``, a sentence, if it cannot be read;
    with ``waits``, after as long as libcni may take to write it.
    """
    return _read(path, _call, READ_ATTEMPTS if waits else 1)


def interface(path: Path) -> Interface | None:
    """Return the interface that an entry is about, ``None`` and errors as for ``read``."""
    return _read(path, _interface)


def _read(path: Path, parse: Callable[[_Entry], T], attempts: int = READ_ATTEMPTS) -> T | None:
    for attempt in range(attempts):
        try:
            document = json.loads(files.read(path))
            if not isinstance(document, dict) or document.get("kind") != KIND:
                return None
            return parse(_Entry.model_validate(document))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error
        except (RecursionError, ValueError) as error:
            failure = error
            time.sleep(READ_PAUSE if attempt < attempts - 1 else 0)
    raise ValueError(sentence(failure)) from failure


def _interface(entry: _Entry) -> Interface:
    addresses = PrevResult.model_validate(entry.result).addresses(entry.ifname)
    return Interface(entry.container_id, entry.ifname, entry.sandbox, frozenset(address.ip for address in addresses))


@cache
def _conflist(data: bytes) -> Conflist:
    """Parse a conflist: the entries of one network all have the same."""
    return Conflist.parse(data)


def _call(entry: _Entry) -> Call | None:
    conflist = _conflist(entry.config)
    plugin = conflist.plugin()
    if plugin is None:
        return None
    declared = plugin.get("capabilities")
    capabilities = {name for name, value in declared.items() if value is True} if isinstance(declared, dict) else ()
    environ = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": entry.container_id,
        "CNI_NETNS": entry.sandbox,
        "CNI_IFNAME": entry.ifname,
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in entry.cni_args or ()),
    }
    config = {
        **plugin,
        "cniVersion": conflist.cni_version,
        "name": entry.network,
        "runtimeConfig": {name: value for name, value in (entry.capability_args or {}).items() if name in capabilities},
        "prevResult": entry.result,
    }
    return Call(environ, config)
