"""The base of the ruleset: the table's maps, sets and base chains, the same on every node. Pure.

``names`` has the names. Each chain is here with its hook, its priority and its rules.
"""

from __future__ import annotations

from cni_hostport.names import (
    ANY_ADDRESS,
    DELETED,
    DYNAMIC,
    FAMILY,
    LOCAL,
    LOCALNET,
    LOCALNET_NEEDS,
    ONE_ADDRESS,
    PODS,
    PORT_MAPS,
    SERVICES,
    TABLE,
    address_form,
    target_map,
    waiting_map,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# Keys are declared by what they are compared with (typeof), never by their type: with a type, nftables 1.1.3 and later
# leave notes at the set that end every process which reads it with 1.1.1 or earlier (netlink_delinearize_set of
# src/netlink.c). For the same reason there are no maps without a name: their notes are of that kind, too.
PORT = "meta l4proto . th dport"
DADDR = {4: "ip daddr", 6: "ip6 daddr"}
ATTACHMENT = DADDR[6]  # its key, in the form of an address, which has as many bytes

# by their names, the keys of the maps
PORT_KEYS = {
    ANY_ADDRESS: f"meta nfproto . {PORT}",
    **{name: f"{DADDR[version]} . {PORT}" for version, name in ONE_ADDRESS.items()},
}
# A container's attachments on further networks wait for a port that the first of them has. An element begins with the
# key of the attachment that waits, and leads to the chain of the one that has the port: while an attachment waits for
# it, the kernel does not let that chain be deleted.
WAITING_KEYS = {waiting_map(name): f"{ATTACHMENT} . {key}" for name, key in PORT_KEYS.items()}
MAP_KEYS = {
    **PORT_KEYS,
    DYNAMIC: PORT_KEYS[ANY_ADDRESS],
    **{name: DADDR[version] for version, name in PODS.items()},
    **WAITING_KEYS,
    # an attachment leads to the chain of its interface, so that the chain cannot be deleted while it is needed
    LOCALNET_NEEDS: ATTACHMENT,
}
# the addresses that kube-proxy puts on an interface of its own are those of all Services, not the node's
SET_KEYS = {**{name: DADDR[version] for version, name in SERVICES.items()}, LOCALNET: "iif"}
# from dispatch to postrouting, where nothing else tells to which address of the node a connection was opened
LOCAL_KEYS = {name: DADDR[version] for version, name in LOCAL.items()}
# for longer than a runtime takes to forget about an attachment: what was read from its cache before must not bring the
# attachment back
_DELETED_SET = f"add set {FAMILY} {TABLE} {DELETED} {{ typeof {ATTACHMENT}; flags timeout; timeout 10m; }}"

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
        # a port published on 127.0.0.1 is for the node itself; by its name, since libnftables looks for an index among
        # all interfaces of the node
        ('iifname != "lo" ip daddr 127.0.0.0/8 return', "fib daddr type local goto dispatch"),
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


def table_command() -> str:
    """Return the command that declares the table."""
    return f'add table {FAMILY} {TABLE} {{ comment "CNI hostport plugin"; }}'


def base_commands() -> list[str]:
    """Return the commands that declare the table, maps and base chains, and put right what is there of them."""
    commands = [table_command()]
    # each element of a port counts the new connections to it
    commands += [
        f"add map {FAMILY} {TABLE} {name} {{ typeof {key} : verdict; counter; }}" for name, key in PORT_KEYS.items()
    ]
    commands += [
        f"add map {FAMILY} {TABLE} {name} {{ typeof {key} : verdict; }}"
        for name, key in MAP_KEYS.items()
        if name not in PORT_MAPS
    ]
    commands += [f"add set {FAMILY} {TABLE} {name} {{ typeof {key}; }}" for name, key in SET_KEYS.items()]
    commands += [
        f"add set {FAMILY} {TABLE} {name} {{ typeof {key}; flags dynamic,timeout; timeout 1m; }}"
        for name, key in LOCAL_KEYS.items()
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

    libnftables then does not have to read these maps and sets from the kernel.
    """
    declarations = {
        _name(command): command for command in base_commands() if command.startswith(("add map ", "add set "))
    }
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


def deletion_note_commands(key: str) -> list[str]:
    """Return the commands that put an attachment among the deleted ones, for as long as if it had not been there."""
    return [_DELETED_SET, *(deleted_command(verb, key) for verb in ("add", "delete", "add"))]


def deleted_command(verb: str, key: str) -> str:
    """Return the command that adds an attachment to the deleted ones, or does what else the verb says."""
    return f"{verb} element {FAMILY} {TABLE} {DELETED} {{ {address_form(key)} }}"


def target_maps(key: str) -> dict[str, str]:
    """Return, by their names, the declarations of all maps that an attachment can have of its own."""
    return {
        target_map(key, version, is_given=is_given): (f"{f'{daddr} . ' if is_given else ''}{PORT} : {daddr} . th dport")
        for version, daddr in DADDR.items()
        for is_given in (False, True)
    }
