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
from pathlib import Path
from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, Code
from cni_hostport.lookup import Lookup
from cni_hostport.operate.leftovers_nftables import Leftover
from cni_hostport.portmap import chain_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.nft import Nft

TOP = "CNI-HOSTPORT-DNAT"
COMMENT = re.compile(r'dnat name: "(?P<network>[^"]*)" id: "(?P<container_id>[^"]*)"')
JUMP = re.compile(r"-A (?P<source>\S+) .*-[jg] (?P<target>CNI-DN-[0-9a-f]+)$")
PROGRAMS = {"ip": "iptables", "ip6": "ip6tables"}
NAMES = Path("/proc/thread-self/net")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
WAIT = "--wait=5"  # seconds, for the lock of legacy iptables


def find(_nft: Nft) -> list[Leftover]:
    """Return what nftables' and legacy iptables hold of each container.

    Raises ``CNIError`` if there is something that only a missing program can show, or one that fails, and ``NFTError``.
    """
    return [leftover for family in PROGRAMS for prefix in _in_use(family) for leftover in _of(family, prefix)]


def _in_use(family: str) -> Iterator[str]:
    """Return what the programs are called that have rules of portmap's to show: nothing is loaded by asking."""
    program = PROGRAMS[family]
    if Lookup().has_chain(TOP, "nat", family):
        yield f"{program}-nft"
    names = NAMES / f"{family}_tables_names"
    if names.exists() and "nat" in names.read_text().split():
        yield f"{program}-legacy"


def _of(family: str, prefix: str) -> Iterator[Leftover]:
    rules = [line for line in _run([_program(f"{prefix}-save"), "-t", "nat"]).splitlines() if line.startswith("-A ")]
    jumps: dict[str, list[str]] = {}
    for line in rules:
        jump = JUMP.match(line)
        if jump:
            jumps.setdefault(jump["target"], []).append(line)
    for chain, lines in jumps.items():
        container_id = _owner(chain, lines)
        if container_id:
            targets = list(_targets(line for line in rules if line.startswith(f"-A {chain} ")))
            yield Leftover(
                family,
                container_id,
                _addresses(target for _, target in targets),
                tuple(f"{host} -> {target}" for host, target in targets),
                (*(line.replace("-A", "-D", 1) for line in lines), f"-F {chain}", f"-X {chain}"),
                f"{prefix}-restore",
            )


def _owner(chain: str, jumps: Sequence[str]) -> str:
    """Return the container of a chain, empty if anything about it is not portmap's: who else jumps there, its name."""
    owners = set()
    for line in jumps:
        words = shlex.split(line)
        comment = COMMENT.fullmatch(words[words.index("--comment") + 1]) if "--comment" in words else None
        owners.add((comment["network"], comment["container_id"]) if comment and words[1] == TOP else ("", ""))
    network, container_id = owners.pop()
    return container_id if not owners and chain_name(network, container_id) == chain else ""


def _targets(rules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Return the host's side and the container's of what rules translate."""
    for rule in rules:
        words = shlex.split(rule)
        given = dict(pairwise(words))
        if "--to-destination" in given:
            host = f" on {given['-d'].partition('/')[0]}" if "-d" in given else ""
            yield f"{given.get('--dport', '?')}/{given.get('-p', '?')}{host}", given["--to-destination"]


def _addresses(targets: Iterable[str]) -> frozenset[IPv4Address | IPv6Address]:
    """Return the addresses of what is translated to, none at all where one of them is not an address and a port."""
    try:
        return frozenset(ip_address(target.rpartition(":")[0].strip("[]")) for target in targets)
    except ValueError:
        return frozenset()


def restore(program: str, commands: Sequence[str]) -> None:
    """Run lines of one IP family's nat table, all of them or, with a ``CNIError``, none."""
    text = "\n".join(("*nat", *commands, "COMMIT", ""))
    _run([_program(program), "--noflush", WAIT], text)


def _program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if not found and "-nft" in name:
        found = shutil.which(name.replace("-nft", ""), path=PATH)
    if not found:
        raise CNIError(Code.HOST_SETTING, f"there are rules of iptables, and {name} is not installed to show them")
    return found


def _run(command: Sequence[str], text: str = "") -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)  # noqa: S603 - found on PATH above
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise CNIError(Code.HOST_SETTING, f"{command[0]} failed: {reason.strip()}") from error
    return done.stdout
