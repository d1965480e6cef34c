"""The table that everything is in: its maps and base chains, the same on every node, and the names of chains.

Imports nothing, so that those who only want a name pay for nothing else.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

FAMILY, TABLE = "inet", "hostport"
PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}  # nft prints numbers on a node that has no /etc/protocols

# Keys are declared by what they are compared with (typeof), never by their type: with a type, nftables 1.1.3 and later
# leave notes at the set that end every process which reads it with 1.1.1 or earlier (netlink_delinearize_set of
# src/netlink.c). For the same reason there are no maps without a name: their notes are of that kind, too.
PORT = "meta l4proto . th dport"
DADDR = {4: "ip daddr", 6: "ip6 daddr"}
KEY = DADDR[6]  # that of an attachment, in the form of an address, which has as many bytes
PORT_MAPS = {
    "hostports": f"meta nfproto . {PORT}",
    "hostports_ip4": f"{DADDR[4]} . {PORT}",
    "hostports_ip6": f"{DADDR[6]} . {PORT}",
}
POD_MAPS = {"pods_ip4": DADDR[4], "pods_ip6": DADDR[6]}
# The keys of attachments that were deleted, for longer than a runtime takes to forget about one: what was read from a
# runtime's cache before must not bring it back.
DELETED = "deleted"
_DELETED_SET = f"add set {FAMILY} {TABLE} {DELETED} {{ typeof {KEY}; flags timeout; timeout 10m; }}"
RESTORING = f"{0:016x}-{0:016x}"  # what is in it, instead of a key, while attachments are being restored
# the node's addresses, from dispatch to postrouting, where nothing else tells to which address a connection was opened
ADDRESS_SETS = {"local_ip4": DADDR[4], "local_ip6": DADDR[6]}
# A container's attachments on further networks, which wait for a port that the first of them has. An element begins
# with the key of the one that waits, and leads to the chain of the one that has the port: while somebody waits for it,
# the kernel does not let that chain be deleted.
WAITING_MAPS = {f"waiting_{name}": f"{KEY} . {key}" for name, key in PORT_MAPS.items()}
# The interfaces on which this plugin needs route_localnet, and who needs it: the key of an attachment, leading to a
# chain of the interface, which cannot be deleted while there is one. The comment is on what this plugin itself opened.
LOCALNET, LOCALNET_NEEDS, OPENED = "localnet", "localnet_needs", "opened"
# the addresses that kube-proxy puts on an interface of its own: those of all Services, not the node's
IPVS_SETS = {"ipvs_ip4": DADDR[4], "ipvs_ip6": DADDR[6]}
SETS = IPVS_SETS | {LOCALNET: "iif"}
MAPS = PORT_MAPS | POD_MAPS | WAITING_MAPS | {LOCALNET_NEEDS: KEY}

# Behind the nat hooks of all others: what they translate, a Service or a published port, is more specific than a port
# of every address (CVE-2019-9946), and what one hook has translated the next ones leave alone.
NAT_PRIORITY = -99

# name: (hook, rules); the order of rules matters, that of chains does not
BASE_CHAINS = {
    "dispatch": (
        "",
        (
            # cannot leave the host, or the link: let the connection be refused instead of hanging
            "ip6 daddr ::1 return",
            "ip6 daddr fe80::/10 return",
            "ip daddr != 127.0.0.0/8 update @local_ip4 { ip daddr }",  # so many that they would fill the set
            "update @local_ip6 { ip6 daddr }",
            "ip daddr . meta l4proto . th dport vmap @hostports_ip4",  # a given host address beats any address
            "ip6 daddr . meta l4proto . th dport vmap @hostports_ip6",
            "ip daddr @ipvs_ip4 return",
            "ip6 daddr @ipvs_ip6 return",
            "meta nfproto . meta l4proto . th dport vmap @hostports",
        ),
    ),
    "prerouting": (
        "type nat hook prerouting priority dstnat + 1; policy accept;",
        # a port published on 127.0.0.1 is for the node itself
        ('iif != "lo" ip daddr 127.0.0.0/8 return', "fib daddr type local goto dispatch"),
    ),
    # nftables 1.0.6 knows the name dstnat for prerouting only
    "output": (
        f"type nat hook output priority {NAT_PRIORITY}; policy accept;",
        ("fib daddr type local goto dispatch",),
    ),
    "postrouting": (
        "type nat hook postrouting priority srcnat; policy accept;",
        # what others redirect to the pod, such as a Service's connections, is theirs to masquerade
        (
            "ct status dnat ct original ip daddr 127.0.0.0/8 ip daddr vmap @pods_ip4",
            "ct status dnat ct original ip daddr @local_ip4 ip daddr vmap @pods_ip4",
            "ct status dnat ct original ip6 daddr @local_ip6 ip6 daddr vmap @pods_ip6",
        ),
    ),
    # route_localnet lets 127.0.0.0/8 through on the pods' interface; only the node itself may use it (CVE-2020-8558)
    "loopback": (
        "type filter hook prerouting priority raw; policy accept;",
        ("iif @localnet ip daddr 127.0.0.0/8 drop", "iif @localnet ip saddr 127.0.0.0/8 drop"),
    ),
}


def add_table() -> str:
    """Return the command that declares the table."""
    return f'add table {FAMILY} {TABLE} {{ comment "CNI hostport plugin"; }}'


def base() -> list[str]:
    """Return the commands that declare the table, maps and base chains, and put right what is there of them."""
    commands = [add_table()]
    # each element of a port counts the new connections to it
    commands += [
        f"add map {FAMILY} {TABLE} {name} {{ typeof {key} : verdict; counter; }}" for name, key in PORT_MAPS.items()
    ]
    commands += [
        f"add map {FAMILY} {TABLE} {name} {{ typeof {key} : verdict; }}"
        for name, key in MAPS.items()
        if name not in PORT_MAPS
    ]
    commands += [f"add set {FAMILY} {TABLE} {name} {{ typeof {key}; }}" for name, key in SETS.items()]
    commands += [
        f"add set {FAMILY} {TABLE} {name} {{ typeof {key}; flags dynamic,timeout; timeout 1m; }}"
        for name, key in ADDRESS_SETS.items()
    ]
    commands.append(_DELETED_SET)
    for name, (hook, _) in BASE_CHAINS.items():
        commands += [
            f"add chain {FAMILY} {TABLE} {name}" + (f" {{ {hook} }}" if hook else ""),
            f"flush chain {FAMILY} {TABLE} {name}",
        ]
    for name, (_, rules) in BASE_CHAINS.items():
        commands += [f"add rule {FAMILY} {TABLE} {name} {rule}" for rule in rules]
    return commands


def with_declarations(commands: Iterable[str]) -> list[str]:
    """Return commands with declarations of those sets and maps of the base whose elements they name before they do.

    Whoever runs them then needs no word of the kernel's of what these sets are.
    """
    declarations = {_name(command): command for command in base() if command.startswith(("add map ", "add set "))}
    declared, complete = set[str](), list[str]()
    for command in commands:
        kind, name = command.split(" ", 2)[1], _name(command)
        if kind == "element" and name in declarations and name not in declared:
            complete.append(declarations[name])
            declared.add(name)
        if kind in {"map", "set"}:
            declared.add(name)
        complete.append(command)
    return complete


def _name(command: str) -> str:
    """Return ``FAMILY TABLE NAME`` of a command ``VERB KIND FAMILY TABLE NAME``, as far as it has that."""
    return " ".join(command.split(" ", 5)[2:5])


def note_deleted(key: str) -> list[str]:
    """Return the commands that put an attachment among the deleted ones, for as long as if it had not been there."""
    return [_DELETED_SET, *(deleted(verb, key) for verb in ("add", "delete", "add"))]


def deleted(verb: str, key: str) -> str:
    """Return the command that adds an attachment to the deleted ones, or does what else the verb says."""
    return f"{verb} element {FAMILY} {TABLE} {DELETED} {{ {as_address(key)} }}"


def as_address(key: str) -> str:
    """Return an attachment's key as an element has it: in the form of an IPv6 address, which has as many bytes."""
    digits = key.replace("-", "")
    return ":".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def target_map(key: str, version: int, *, is_given: bool) -> str:
    """Return the name of the map from an attachment's ports to its pod's, where these are too many for rules.

    There is one for each IP version, and another for the ports of a given host address.
    """
    return f"{'given' if is_given else 'any'}_ip{version}-{key}"


def target_maps(key: str) -> dict[str, str]:
    """Return the declarations of all maps that an attachment can have besides everybody's, by their names."""
    return {
        target_map(key, version, is_given=is_given): (f"{f'{daddr} . ' if is_given else ''}{PORT} : {daddr} . th dport")
        for version, daddr in DADDR.items()
        for is_given in (False, True)
    }


def dnat_chain(key: str) -> str:
    """Return the name of the chain that translates an attachment's connections: its ownership token."""
    return f"dnat-{key}"


def waiting_map(name: str) -> str:
    """Return the name of the map of those that wait for a port of another map."""
    return f"waiting_{name}"


def localnet_chain(interface: int) -> str:
    """Return the name of the chain of an interface, by its index, on which attachments need ``route_localnet``."""
    return f"localnet-{interface}"


def masq_chain(key: str) -> str:
    """Return the name of the chain that masquerades an attachment's connections."""
    return f"masq-{key}"
