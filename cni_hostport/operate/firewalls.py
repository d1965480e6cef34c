"""The firewalls of others: where they drop connections to host ports, and how their owners let these through."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cni_hostport.kernel import files
from cni_hostport.lookup import Lookup
from cni_hostport.names import FAMILY, TABLE
from cni_hostport.operate.statements import note, problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

LEGACY = Path("/proc/thread-self/net")  # ip_tables_names and ip6_tables_names
VERSIONS = {"ip": {4}, "ip6": {6}, "inet": {4, 6}}
IPTABLES = {"ip": "iptables", "ip6": "ip6tables"}
FIREWALLD = "firewalld"  # its tables are all called so
AS_WELL = "(and the same where your firewall is configured)."
# what a rule does with all translated connections, as nft prints it
TRANSLATED_RULE = re.compile(r'ct status dnat (?:counter )?(?:accept|(?:jump|goto) (\S+))(?: comment ".*")?$')
VERDICT = re.compile(r"\b(drop|reject|queue|jump|goto|vmap|return)\b")


@dataclass(frozen=True)
class Connections:
    """Which connections a firewall is to accept, in the words of each kind of firewall."""

    nft: str
    iptables: str
    firewalld: str


# firewalld accepts what others translate, unless StrictForwardPorts is set, which 2.3 brought (firewalld.conf(5))
TRANSLATED = Connections(
    "ct status dnat",
    "-m conntrack --ctstate DNAT",
    "write StrictForwardPorts=no into /etc/firewalld/firewalld.conf, then firewall-cmd --reload. With 'yes', firewalld"
    " accepts only ports that it forwards itself (firewall-cmd --add-forward-port).",
)


def untranslated(protocol: str, port: int) -> Connections:
    """Return the words for connections to a port that come to a firewall before they are translated."""
    return Connections(
        f"{protocol} dport {port}",
        f"-p {protocol} --dport {port}",
        f"firewall-cmd --permanent --add-port={port}/{protocol}, then firewall-cmd --reload.",
    )


def acceptance(nft: Nft, family: str, table: str, chain: str, what: Connections = TRANSLATED) -> str:
    """Return what lets connections pass a chain: a command for the program that manages its table, or a sentence.

    A native rule in a table of iptables' works, and makes ``iptables -S`` and ``iptables-save`` refuse the table.
    A table with the flag ``owner`` can be changed by the program alone that has made it (Linux 5.12).
    Raises ``NFTError`` if nftables cannot be asked.
    """
    if table == FIREWALLD:
        return f"firewalld manages this table: {what.firewalld}"
    owner = Lookup().owner(table, family)
    if owner is not None:
        return f"Only {_program(owner)} can change table {family} {table}: have it accept {what.nft}."
    if _is_of_iptables(nft, family, table):
        option = "" if table == "filter" else f"-t {shlex.quote(table)} "
        return f"{IPTABLES[family]} {option}-I {shlex.quote(chain)} {what.iptables} -j ACCEPT {AS_WELL}"
    return f"nft insert rule {family} {shlex.quote(table)} {shlex.quote(chain)} {what.nft} accept {AS_WELL}"


def _program(port: int) -> str:
    """Name the program behind a netlink port, which the kernel makes the number of its process if that is free.

    It goes without a name where that cannot be read.
    """
    try:
        name = files.text(Path(f"/proc/{port}/comm")) if port else ""
        return f"{name.removesuffix(chr(10))} (process {port})" if port else "its owner"
    except OSError:
        return "its owner"


def _is_of_iptables(nft: Nft, family: str, table: str) -> bool:
    """Tell whether a table has the base chains that iptables-nft makes, which have the names of their hooks."""
    base = [
        chain
        for item in nft.listing("chains")
        if (chain := item.get("chain", {})).get("hook") and (chain["family"], chain["table"]) == (family, table)
    ]
    return family in IPTABLES and bool(base) and all(chain["name"] == chain["hook"].upper() for chain in base)


def forward_policy(nft: Nft, mappings: Sequence[PortMapping]) -> Iterator[Statement]:
    """Say which rules of others can drop what is forwarded; raises ``NFTError`` and ``OSError``."""
    for item in nft.listing("chains"):
        chain = item.get("chain", {})
        if (
            chain.get("hook") == "forward"
            and chain.get("type") == "filter"
            and chain["family"] in VERSIONS
            and (chain["family"], chain["table"]) != (FAMILY, TABLE)
        ):
            family, table, name = chain["family"], chain["table"], chain["name"]
            yield from _of_chain(nft, family, table, name, mappings, drops=chain.get("policy") == "drop")
    yield from _legacy()


def _of_chain(
    nft: Nft, family: str, table: str, chain: str, mappings: Sequence[PortMapping], *, drops: bool
) -> Iterator[Statement]:
    """Say what a chain does with translated connections; ``drops`` is whether whatever comes to its end is dropped."""
    place = f"{family} {table} {chain}"
    for rule in nft.rules(place).values():
        everything = TRANSLATED_RULE.match(rule)
        if everything and not everything[1]:
            return
        found = list(_of_chain(nft, family, table, everything[1], mappings, drops=False)) if everything else []
        if found:
            yield from found
            return
        if VERDICT.search(rule):
            break
    rules = [of["rule"]["expr"] for of in nft.listing(f"chain {place}") if "rule" in of]
    ends = bool(rules) and _drops_the_rest(rules[-1])
    if not drops and not ends:
        return
    text = f"chain {place} drops what is forwarded and not accepted by its rules"
    accept = acceptance(nft, family, table, chain)
    if len(rules) > ends:
        yield note(
            text,
            "Whether its rules accept connections to host ports depends on the packet.",
            f"hostport explain PORT shows the way of one. If it ends there: {accept}",
        )
        return
    versions = VERSIONS[family]
    say = problem if any(mapping.version in versions for mapping in mappings) else note
    ip = " or ".join(f"IPv{version}" for version in sorted(versions))
    yield say(f"{text}, and it has none", f"No connection over {ip} reaches a pod.", accept)


def _legacy() -> Iterator[Statement]:
    used = []
    for program, name in (("iptables-legacy", "ip_tables_names"), ("ip6tables-legacy", "ip6_tables_names")):
        with suppress(FileNotFoundError):  # not in use
            used += [f"{program} -t {table} -S" for table in (LEGACY / name).read_text().split()]
    if used:
        yield note(
            "legacy iptables has tables beside those of nftables",
            "They see every packet too, and nft does not show their rules.",
            "If connections get lost, see what they do:",
            tuple(used),
        )


def _drops_the_rest(rule: Sequence[Any]) -> bool:
    """Tell whether a rule drops or rejects everything that comes to it."""
    verdicts = [next(iter(part)) for part in rule if not part.keys() & {"counter", "log"}]
    return verdicts in (["drop"], ["reject"])
