"""The firewalls of other programs: where they drop connections to host ports, and how their owners let these pass."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cni_hostport.kernel import files, xtables
from cni_hostport.lookup import Lookup
from cni_hostport.migration.iptables import PROGRAMS
from cni_hostport.names import FAMILY, TABLE
from cni_hostport.operate.statements import note, problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

IP_VERSIONS = {"ip": {4}, "ip6": {6}, "inet": {4, 6}}  # by a table's family
FIREWALLD = "firewalld"  # its tables are all called so
ELSEWHERE_TOO = "(and the same where your firewall is configured)."
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
    """Return the words for connections to a port that a firewall sees with the port untranslated."""
    return Connections(
        f"{protocol} dport {port}",
        f"-p {protocol} --dport {port}",
        f"firewall-cmd --permanent --add-port={port}/{protocol}, then firewall-cmd --reload.",
    )


def acceptance(nft: Nft, family: str, table: str, chain: str, connections: Connections = TRANSLATED) -> str:
    """Return how to let connections pass a chain: a command for the program that manages its table, or a sentence.

    A native rule in a table of iptables' works, and makes ``iptables -S`` and ``iptables-save`` refuse the table.
    A table with the flag ``owner`` can be changed by the program alone that has made it (Linux 5.12).
    Raises ``NFTError`` if nftables cannot be asked.
    """
    if table == FIREWALLD:
        return f"firewalld manages this table: {connections.firewalld}"
    owner = Lookup().owner(table, family)
    if owner is not None:
        return f"Only {_program(owner)} can change table {family} {table}: have it accept {connections.nft}."
    if _is_of_iptables(nft, family, table):
        option = "" if table == "filter" else f"-t {shlex.quote(table)} "
        return f"{PROGRAMS[family]} {option}-I {shlex.quote(chain)} {connections.iptables} -j ACCEPT {ELSEWHERE_TOO}"
    return (
        f"nft insert rule {family} {shlex.quote(table)} {shlex.quote(chain)} {connections.nft} accept {ELSEWHERE_TOO}"
    )


def _program(port: int) -> str:
    """Name the program that owns a table: the kernel tells the port of its netlink socket.

    That is the number of its process, unless the number was taken. Where no name can be read, it is "its owner".
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
    return family in PROGRAMS and bool(base) and all(chain["name"] == chain["hook"].upper() for chain in base)


def forward_policy(nft: Nft, mappings: Sequence[PortMapping]) -> Iterator[Statement]:
    """Say which rules of others can drop what is forwarded; raises ``NFTError`` and ``OSError``."""
    for item in nft.listing("chains"):
        chain = item.get("chain", {})
        if (
            chain.get("hook") == "forward"
            and chain.get("type") == "filter"
            and chain["family"] in IP_VERSIONS
            and (chain["family"], chain["table"]) != (FAMILY, TABLE)
        ):
            family, table, name = chain["family"], chain["table"], chain["name"]
            has_drop_policy = chain.get("policy") == "drop"
            yield from _chain_statements(nft, family, table, name, mappings, drops_rest=has_drop_policy)
    yield from _legacy_statements()


def _chain_statements(
    nft: Nft, family: str, table: str, chain: str, mappings: Sequence[PortMapping], *, drops_rest: bool
) -> Iterator[Statement]:
    """Say what a chain does with translated connections; ``drops_rest`` is whether what comes to its end is dropped."""
    place = f"{family} {table} {chain}"
    for rule in nft.rules(place).values():
        match = TRANSLATED_RULE.match(rule)
        if match and not match[1]:
            return
        target_statements = (
            list(_chain_statements(nft, family, table, match[1], mappings, drops_rest=False)) if match else []
        )
        if target_statements:
            yield from target_statements
            return
        if VERDICT.search(rule):
            break
    rules = [item["rule"]["expr"] for item in nft.listing(f"chain {place}") if "rule" in item]
    has_final_drop = bool(rules) and _drops_everything(rules[-1])
    if not drops_rest and not has_final_drop:
        return
    text = f"chain {place} drops what is forwarded and not accepted by its rules"
    remedy = acceptance(nft, family, table, chain)
    if len(rules) > has_final_drop:
        yield note(
            text,
            "Whether its rules accept connections to host ports depends on the packet.",
            f"hostport explain PORT shows the way of one. If it ends there: {remedy}",
        )
        return
    versions = IP_VERSIONS[family]
    statement = problem if any(mapping.version in versions for mapping in mappings) else note
    families = " or ".join(f"IPv{version}" for version in sorted(versions))
    yield statement(f"{text}, and it has none", f"No connection over {families} reaches a pod.", remedy)


def _legacy_statements() -> Iterator[Statement]:
    commands = tuple(
        f"{program}-legacy -t {table} -S"
        for family, program in PROGRAMS.items()
        for table in xtables.table_names(family)
    )
    if commands:
        yield note(
            "legacy iptables has tables beside those of nftables",
            "They see every packet too, and nft does not show their rules.",
            "If connections get lost, see what they do:",
            commands,
        )


def _drops_everything(rule: Sequence[Any]) -> bool:
    """Tell whether a rule drops or rejects everything that comes to it."""
    verdicts = [next(iter(part)) for part in rule if not part.keys() & {"counter", "log"}]
    return verdicts in (["drop"], ["reject"])
