"""portmap's iptables back end: for each container a chain in the table nat, and rules that jump there.

Source: containernetworking/plugins, plugins/meta/portmap/portmap_iptables.go and pkg/utils/utils.go.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from ipaddress import ip_address
from itertools import pairwise
from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, Code
from cni_hostport.lookup import Lookup
from cni_hostport.migration.leftover import Leftover, TranslatedPort
from cni_hostport.portmap import CHAIN_PREFIX, NAT, TOP_CHAIN, MissingProgramError, Rules, chain_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.kernel.nft import Nft

COMMENT = re.compile(r'dnat name: "(?P<network>[^"]*)" id: "(?P<container_id>[^"]*)"')
JUMP = re.compile(rf"-A (?P<source>\S+) .*-[jg] (?P<target>{CHAIN_PREFIX}[0-9a-f]+)$")
PROGRAMS = {"ip": "iptables", "ip6": "ip6tables"}
PROGRAM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PROGRAM_PATH}  # ours can name extensions for the iptables of another system (conf/bundle)
LOCK_WAIT = "--wait=5"  # seconds, for the lock of legacy iptables
RESTORE_ATTEMPTS = 5  # while others change the same


def find(_nft: Nft) -> list[Leftover]:
    """Return what nftables' and legacy iptables hold of each container.

    Raises ``CNIError`` if there is something that only a missing program can show, or one that fails, and ``NFTError``.
    """
    return find_by_rules(Rules(Lookup()))


def find_by_rules(rules: Rules) -> list[Leftover]:
    """Return what ``find`` does, of rules that were looked for already."""
    prefixes = [(family, f"{PROGRAMS[family]}-nft") for family, _, _ in rules.in_iptables]
    prefixes += [(family, f"{PROGRAMS[family]}-legacy") for family in rules.in_legacy_iptables()]
    return [leftover for family, prefix in prefixes for leftover in _find(family, prefix)]


def remove_legacy(family: str, chain: str) -> None:
    """Remove a chain, and the rules that jump there, from what legacy iptables has of an IP family.

    Raises ``CNIError`` (``Code.HOST_SETTING``) if that fails, and not because others changed it at the same moment.
    """
    prefix = f"{PROGRAMS[family]}-legacy"
    for last in (*[False] * (RESTORE_ATTEMPTS - 1), True):
        lines = _run([_program(f"{prefix}-save"), "-t", NAT]).splitlines()
        if not any(line.startswith(f":{chain} ") for line in lines):
            return
        jumps = [
            line
            for line in lines
            if (jump := JUMP.match(line)) and (jump["source"], jump["target"]) == (TOP_CHAIN, chain)
        ]
        commands = (*(line.replace("-A", "-D", 1) for line in jumps), f"-F {chain}", f"-X {chain}")
        text = "\n".join((f"*{NAT}", *commands, "COMMIT", ""))
        try:
            _run([_program(f"{prefix}-restore"), "--noflush", LOCK_WAIT], text)
        except CNIError:
            if last:
                raise
        else:
            return


def _find(family: str, prefix: str) -> Iterator[Leftover]:
    rules = [line for line in _run([_program(f"{prefix}-save"), "-t", NAT]).splitlines() if line.startswith("-A ")]
    jumps: dict[str, list[str]] = {}
    for line in rules:
        jump = JUMP.match(line)
        if jump:
            jumps.setdefault(jump["target"], []).append(line)
    for chain, lines in jumps.items():
        network, container_id = _owner(chain, lines)
        if container_id:
            ports = tuple(_translated_ports(line for line in rules if line.startswith(f"-A {chain} ")))
            addresses = _addresses(port.target for port in ports)
            yield Leftover(family, container_id, addresses, ports, "iptables", network)


def _owner(chain: str, jumps: Sequence[str]) -> tuple[str, str]:
    """Return network and container of a chain.

    They are empty if anything about it is not portmap's: who else jumps there, its name.
    """
    owners = set()
    for line in jumps:
        words = shlex.split(line)
        comment = COMMENT.fullmatch(words[words.index("--comment") + 1]) if "--comment" in words else None
        owners.add((comment["network"], comment["container_id"]) if comment and words[1] == TOP_CHAIN else ("", ""))
    network, container_id = owners.pop()
    known = not owners and chain_name(network, container_id) == chain
    return (network, container_id) if known else ("", "")


def _translated_ports(rules: Iterable[str]) -> Iterator[TranslatedPort]:
    for rule in rules:
        words = shlex.split(rule)
        options = dict(pairwise(words))
        if "--to-destination" in options:
            host = options.get("-d", "").partition("/")[0]
            yield TranslatedPort(options.get("--dport", "?"), options.get("-p", "?"), host, options["--to-destination"])


def _addresses(targets: Iterable[str]) -> frozenset[IPv4Address | IPv6Address]:
    """Return the addresses of what is translated to, none at all where one of them is not an address and a port."""
    try:
        return frozenset(ip_address(target.rpartition(":")[0].strip("[]")) for target in targets)
    except ValueError:
        return frozenset()


def _program(name: str) -> str:
    names = [name, name.replace("-nft", "")]
    found = next(filter(None, (shutil.which(name, path=PROGRAM_PATH) for name in names)), None)
    if not found:
        raise MissingProgramError(
            Code.HOST_SETTING, f"there are rules of iptables, and {name} is not installed to show them"
        )
    return found


def _run(command: Sequence[str], text: str = "") -> str:
    try:
        ended = subprocess.run(command, input=text, capture_output=True, text=True, check=True, env=ENVIRONMENT)  # noqa: S603 - found on PATH above
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise CNIError(Code.HOST_SETTING, f"{command[0]} failed: {reason.strip()}") from error
    return ended.stdout
