"""The CNI protocol's edge: environment and stdin in, result or error JSON on stdout out.

The order of the checks and their codes are those of the reference implementation (containernetworking/cni, pkg/skel),
on which runtimes rely. As there, the operations are handed in. So is everything else, and the whole protocol can be run
in-process.
"""

from __future__ import annotations

import json
import os
import re
from math import isfinite

from cni_hostport import LARGEST_INPUT, LONGEST_IFNAME, __version__
from cni_hostport.errors import CNIError, Code, as_cni_error
from cni_hostport.text import log_to, print_traceback, write_message

TYPE_CHECKING = False  # typing itself takes longer to import than the rest of this module
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from cni_hostport.log import Log
    from cni_hostport.text import Writable

    Operation = Callable[["Call", Log], Mapping[str, Any] | None]
    LoadOperation = Callable[[str], Operation]

    class Readable(Protocol):
        """Where the network configuration comes from."""

        def read(self) -> bytes:
            """Return everything, or more than ``LARGEST_INPUT`` bytes of it; or raise ``OSError``."""
            ...


VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
LATEST = VERSIONS[-1]

REQUIRED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
}
SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}

# what the call leaves to be done once the caller has its answer
AFTERWARDS: list[Callable[[], None]] = []

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
NOT_A_NAME = "is not a letter or digit followed by letters, digits, '_', '.' or '-'"


class Call:
    """One CNI command as the runtime gave it: its variables, and the network configuration of stdin, unvalidated."""

    __slots__ = ("args", "command", "config", "container_id", "ifname", "netns", "network")

    def __init__(self, environ: Mapping[str, str], config: Mapping[str, Any]) -> None:
        """Take the variables that operations use, and the name, the only key that ``skel`` itself validates."""
        self.command = environ["CNI_COMMAND"]
        self.container_id = environ.get("CNI_CONTAINERID", "")
        self.netns = environ.get("CNI_NETNS", "")
        self.ifname = environ.get("CNI_IFNAME", "")
        self.args = environ.get("CNI_ARGS", "")
        self.config = config
        self.network: str = config["name"]


def run(
    environ: Mapping[str, str],
    stdin: Readable,
    stdout: Writable,
    stderr: Writable,
    load_operation: LoadOperation,
) -> int:
    """Execute the command in CNI_COMMAND and return the process's exit status: 0, or 1 with an error JSON on stdout.

    ``load_operation`` is asked for the operation of one of the ``REQUIRED`` commands once the call has passed all
    checks. A message that cannot be written is lost. A result that cannot be written is an error, and undoes an ADD.
    """
    log = log_to(stderr)
    if not environ.get("CNI_COMMAND"):
        supported = f"CNI protocol versions supported: {', '.join(VERSIONS)}"
        write_message(stderr, f"CNI hostport plugin v{__version__}\n{supported}\n")
        return 0

    version = LATEST
    try:
        _check_environment(environ)
        if environ["CNI_COMMAND"] == "VERSION":
            _print(stdout, {"cniVersion": LATEST, "supportedVersions": VERSIONS})
            return 0
        config = _read_config(stdin)
        requested = _requested_version(config)
        version = requested if requested in VERSIONS else LATEST
        _check_network_name(config)
        _check_call(environ, requested)
        result = load_operation(environ["CNI_COMMAND"])(Call(environ, config), log)
        if result is not None:
            try:
                _print(stdout, {**result, "cniVersion": version})
            except BaseException:
                _undo(environ, config, log, load_operation)
                raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the edge: whatever happens, a panic in pydantic included, is told
        failure = as_cni_error(error, environ["CNI_COMMAND"])
        if failure.code == Code.UNEXPECTED:
            print_traceback(error, stderr)
    else:
        return 0

    try:
        _print(stdout, failure.json(version))
    except CNIError:
        log(failure.msg)  # a runtime shows it where there is no error JSON
    return 1


def withdraw(
    environ: Mapping[str, str],
    installed: Readable | None,
    error: Exception,
    stderr: Writable,
    load_operation: LoadOperation,
) -> None:
    """Say that the output of a call that was run already cannot be written, and undo the call if it is an ADD.

    ``installed`` is the standard input of a call that succeeded.
    """
    log = log_to(stderr)
    log(_unwritten(error).msg)
    if installed and environ["CNI_COMMAND"] == "ADD":
        _undo(environ, _read_config(installed), log, load_operation)


def _undo(environ: Mapping[str, str], config: Mapping[str, Any], log: Log, load_operation: LoadOperation) -> None:
    """Remove what an ADD has installed, because the runtime does not get its result."""
    delete = load_operation("DEL")
    AFTERWARDS.clear()
    try:
        delete(Call(environ, config), log)
    except Exception as error:  # noqa: BLE001 - the call fails already
        log(f"what was installed cannot be removed: {error}")


def _print(stdout: Writable, document: Mapping[str, Any]) -> None:
    """Write a document; raises ``CNIError`` with ``Code.IO_FAILURE`` if that fails."""
    text = json.dumps(document)
    try:
        stdout.write(f"{text}\n")
    except OSError as error:
        raise _unwritten(error) from error


def _unwritten(error: Exception) -> CNIError:
    return CNIError(Code.IO_FAILURE, f"cannot write the result to stdout: {error}")


def _check_environment(environ: Mapping[str, str]) -> None:
    required = REQUIRED.get(environ["CNI_COMMAND"], ())
    container_id = environ.get("CNI_CONTAINERID", "")
    if "CNI_CONTAINERID" in required and container_id and not NAME.fullmatch(container_id):
        raise CNIError(Code.INVALID_ENVIRONMENT, f"CNI_CONTAINERID {container_id!r} {NOT_A_NAME}")
    ifname = environ.get("CNI_IFNAME", "")
    if "CNI_IFNAME" in required and ifname and not is_ifname(ifname):
        raise CNIError(
            Code.INVALID_ENVIRONMENT,
            f"CNI_IFNAME {ifname!r} is not an interface name: at most {LONGEST_IFNAME} bytes,"
            " not '.' or '..', without '/', ':' and white space",
        )
    missing = [name for name in required if not environ.get(name)]
    if missing:
        raise CNIError(Code.INVALID_ENVIRONMENT, f"required environment variables are missing: {', '.join(missing)}")


def is_ifname(name: str) -> bool:
    """Tell whether a name is one that the kernel takes for an interface."""
    return (
        len(os.fsencode(name)) <= LONGEST_IFNAME
        and name not in {".", ".."}
        and not any(character in "/:" or character.isspace() for character in name)
    )


def _read_config(stdin: Readable) -> dict[str, Any]:
    try:
        data = stdin.read()
    except (OSError, MemoryError) as error:
        reason = str(error) or "there is no memory for it"
        raise CNIError(Code.IO_FAILURE, f"cannot read the network configuration from stdin: {reason}") from error
    if len(data) > LARGEST_INPUT:
        raise CNIError(
            Code.IO_FAILURE, f"the network configuration on stdin is not read: it has more than {LARGEST_INPUT} bytes"
        )
    try:
        config = json.loads(data.decode(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CNIError(Code.DECODING_FAILURE, f"the network configuration on stdin is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CNIError(
            Code.DECODING_FAILURE,
            f"the network configuration on stdin is not a JSON object but {type(config).__name__}",
        )
    return config


def _finite(number: str) -> float:
    value = float(number)
    if not isfinite(value):
        msg = f"{number} is not a number of JSON's"
        raise ValueError(msg)
    return value


def _requested_version(config: Mapping[str, Any]) -> str:
    version = config.get("cniVersion")
    if version is not None and not isinstance(version, str):
        raise CNIError(Code.DECODING_FAILURE, f"cniVersion {version!r} is not a string")
    return version or VERSIONS[0]


def _check_network_name(config: Mapping[str, Any]) -> None:
    name = config.get("name")
    if not name:
        raise CNIError(Code.INVALID_CONFIG, "the network configuration has no name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CNIError(Code.INVALID_CONFIG, f"network name {name!r} {NOT_A_NAME}")


def _check_call(environ: Mapping[str, str], version: str) -> None:
    command = environ["CNI_COMMAND"]
    if command not in REQUIRED:
        raise CNIError(Code.INVALID_ENVIRONMENT, f"unknown CNI_COMMAND {command!r}")
    if version not in VERSIONS:
        raise CNIError(
            Code.INCOMPATIBLE_VERSION, f"cniVersion {version!r} is not supported; supported: {', '.join(VERSIONS)}"
        )
    since = SINCE.get(command, VERSIONS[0])
    if VERSIONS.index(version) < VERSIONS.index(since):
        raise CNIError(
            Code.INCOMPATIBLE_VERSION, f"cniVersion {version!r} does not have {command}, which came with {since}"
        )
    if command in {"ADD", "DEL"} and environ.get("CNI_NETNS_OVERRIDE", "").lower() not in {"1", "true"}:
        _check_netns(environ.get("CNI_NETNS", ""))


def _check_netns(netns: str) -> None:
    """Raise ``CNIError`` with ``Code.PLUGIN_NETNS`` if a path is that of this process's own network namespace."""
    try:
        same = os.path.samefile(netns, "/proc/self/ns/net")
    except (OSError, ValueError):
        return  # a namespace that is gone, or seen by the runtime alone, is not the one this process runs in
    if same:
        raise CNIError(
            Code.PLUGIN_NETNS, f"CNI_NETNS {netns!r} is the plugin's own network namespace, not a container's"
        )
