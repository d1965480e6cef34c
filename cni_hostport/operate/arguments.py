"""The values and the errors of the command line: values are checked as they come in, errors are sentences."""

from __future__ import annotations

import os
import re
import sys
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cni_hostport.dynamic_ports.request import MAX_PORT
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.libcni import directory
from cni_hostport.names import PROTOCOLS
from cni_hostport.text import escaped

if TYPE_CHECKING:
    from collections.abc import Iterator

CAP_NET_ADMIN = 12  # linux/capability.h
PORT_PROTOCOLS = tuple(PROTOCOLS.values())  # the first is the default
PATH = click.Path(path_type=Path)
CACHES = click.option(
    "--cache-dir", "caches", type=PATH, multiple=True, default=[directory.DEFAULT], show_default=True,
    envvar="HOSTPORT_CACHE_DIR",
    help="Where runtimes keep what they asked for (libcni's cache); can be given several times.",
)  # fmt: skip


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        vars(error)["message"] = escaped(error.message)
        raise


class _Command(click.Command):
    """A command that needs the ruleset, which its help does not."""

    def invoke(self, ctx: click.Context) -> Any:
        if not _may_use_nftables():
            msg = f"'{ctx.command_path}' uses nftables, which needs root (CAP_NET_ADMIN)"
            raise click.ClickException(msg)
        return super().invoke(ctx)


class Commands(click.Group):
    """Commands whose errors are sentences."""

    command_class = _Command

    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        """Read the command line; raises ``click.UsageError``."""
        with _printable_errors():
            return super().make_context(*arguments, **extra)

    @_printable_errors()
    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; raises ``click.ClickException`` for what can go wrong on a node."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                _flush()  # here, where it can still be said that there is no room for it
        except BrokenPipeError:
            raise  # whoever reads has seen enough
        except (CNIError, NFTError, OSError) as error:
            raise click.ClickException(sentence(error)) from error


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at its end
        raise OSError(error.errno, error.strerror, "standard output") from error


def sentence(error: Exception) -> str:
    """Say what went wrong, without what only a programmer needs."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def port(value: str) -> tuple[int, str]:
    """Read ``8080`` or ``53/udp``; the protocol is empty where none is given."""
    number, slash, protocol = value.partition("/")
    if not _is_port(number) or protocol.lower() not in (PORT_PROTOCOLS if slash else ("",)):
        msg = f"'{value}' is not PORT or PORT/PROTOCOL, as in 8080 or 53/udp"
        raise click.BadParameter(msg)
    return int(number), protocol.lower()


def port_and_protocol(value: str) -> tuple[int, str]:
    """Read ``8080/tcp``, for which ``8080`` is short, or ``53/udp``."""
    number, protocol = port(value)
    return number, protocol or PORT_PROTOCOLS[0]


def address(value: str) -> IPv4Address | IPv6Address:
    """Read an IPv4 or IPv6 address."""
    try:
        return ip_address(value)
    except ValueError:
        msg = f"'{value}' is not an IP address"
        raise click.BadParameter(msg) from None


def addresses(value: str) -> list[IPv4Address | IPv6Address]:
    """Read addresses with commas between them, none in an empty text."""
    return [address(part) for part in value.split(",") if part]


def listen_address(value: str) -> tuple[str, int]:
    """Read ``HOST:PORT``, or ``PORT`` alone, which means that of 127.0.0.1."""
    match = re.fullmatch(r"(?:(\[[^\[\]]+\]|[^\[\]:]+):)?([0-9]+)", value)
    if not match or not _is_port(match[2]):
        msg = f"'{value}' is not [HOST:]PORT, as in 9100, 192.0.2.1:9100 or [::1]:9100"
        raise click.BadParameter(msg)
    return (match[1] or "127.0.0.1").strip("[]"), int(match[2])


def text_file(value: str) -> Path:
    """Read the name of a file to write, which is not there or a file: what is replaced must not be a device."""
    if os.path.exists(value) and not os.path.isfile(value):
        msg = f"'{value}' is not a file"
        raise click.BadParameter(msg)
    return Path(os.path.realpath(value))


def _is_port(digits: str) -> bool:
    return re.fullmatch("[1-9][0-9]{0,4}", digits) is not None and int(digits) <= MAX_PORT


def _may_use_nftables() -> bool:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return True  # the kernel has the last word anyway
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return effective is None or bool(int(effective[1], 16) >> CAP_NET_ADMIN & 1)
