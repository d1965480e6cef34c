"""The names of all that this plugin has in nftables: its table, maps, sets and chains, and what their keys look like.

Imports nothing, since every DEL and every pod without mappings needs some of these. ``ruleset.base`` declares what has
these names.
"""

from __future__ import annotations

FAMILY, TABLE = "inet", "hostport"

# by their numbers in an IP header, which nft prints on a node that has no /etc/protocols
PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}
PROTOCOL_NUMBERS = {name: number for number, name in PROTOCOLS.items()}

# Verdict maps from a host port to the chain of the attachment that holds it: a port of every address of the node, and
# by IP version a port of one address.
ANY_ADDRESS = "hostports"
ONE_ADDRESS = {4: "hostports_ip4", 6: "hostports_ip6"}
PORT_MAPS = (ANY_ADDRESS, *ONE_ADDRESS.values())
# From a dynamic host port to the chain of the attachment that has it, whichever address it is for: nobody else gets a
# port that is in here. The comment of an element is the request that it fulfils, and the pod.
DYNAMIC = "dynamic_ports"
# by IP version, from a pod's address to the chain that masquerades its connections
PODS = {4: "pods_ip4", 6: "pods_ip6"}
POD_MAPS = tuple(PODS.values())


def waiting_map(port_map: str) -> str:
    """Return the name of the map of those attachments that wait for a port of another map."""
    return f"waiting_{port_map}"


WAITING_MAPS = tuple(map(waiting_map, PORT_MAPS))
LOCALNET_NEEDS = "localnet_needs"  # from an attachment to the chain of the interface on which it needs route_localnet
MAPS = (*PORT_MAPS, DYNAMIC, *POD_MAPS, *WAITING_MAPS, LOCALNET_NEEDS)

SERVICES = {4: "ipvs_ip4", 6: "ipvs_ip6"}  # by IP version, the addresses of Services in kube-proxy's IPVS mode
LOCALNET = "localnet"  # the interfaces whose route_localnet this plugin guards
OPENED = "opened"  # the comment there on an interface whose route_localnet this plugin itself has set
LOCAL = {4: "local_ip4", 6: "local_ip6"}  # by IP version, the node's addresses to which connections were opened lately
DELETED = "deleted"  # the attachments that were deleted lately
SETS = (*SERVICES.values(), LOCALNET, *LOCAL.values())  # all but the one of deleted attachments

# An attachment's key is two hashes, of its network's name and of the rest, in hexadecimal: NETWORK-REST. ``attachment``
# makes them.
HASH_BYTES = 8
HASH_DIGITS = 2 * HASH_BYTES
RESTORING = "-".join(2 * ["0" * HASH_DIGITS])  # a key that DELETED holds while attachments are being restored

DNAT, MASQUERADE = "dnat", "masq"


def dnat_chain(key: str) -> str:
    """Return the name of the chain that translates an attachment's connections: its ownership token."""
    return f"{DNAT}-{key}"


def masq_chain(key: str) -> str:
    """Return the name of the chain that masquerades an attachment's connections."""
    return f"{MASQUERADE}-{key}"


def dynamic_comment(request: str, pod_id: str) -> str:
    """Return the comment on an element of ``DYNAMIC``: the request that it fulfils, as text, and the pod's ID."""
    return f"{request} {pod_id}"


def request_and_pod(comment: str) -> tuple[str, str]:
    """Return what a comment of ``dynamic_comment`` is made of; the pod's ID is empty in one that is no such."""
    request, _, pod_id = comment.partition(" ")
    return request, pod_id


def key_in(chain: str) -> str:
    """Return the key of the attachment that a chain belongs to, empty for a chain of another kind."""
    prefix, _, key = chain.partition("-")
    return key if prefix in {DNAT, MASQUERADE} else ""


def network_in(key: str) -> str:
    """Return the part of an attachment's key that all attachments of its network share."""
    return key.partition("-")[0]


def localnet_chain(interface: int) -> str:
    """Return the name of the chain of an interface, by its index, on which attachments need ``route_localnet``."""
    return f"{LOCALNET}-{interface}"


def interface_in(chain: str) -> int:
    """Return the index of the interface to which a chain of ``localnet_chain`` belongs."""
    return int(chain.rpartition("-")[2])


def target_map(key: str, version: int, *, is_given: bool) -> str:
    """Return the name of the map from an attachment's ports to its pod's, where these are too many for rules.

    There is one for each IP version, and another for the ports of a given host address.
    """
    return f"{'given' if is_given else 'any'}_ip{version}-{key}"


def address_form(key: str) -> str:
    """Return an attachment's key as an element has it: in the form of an IPv6 address, which has as many bytes."""
    digits = key.replace("-", "")
    return ":".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def packed(key: str) -> bytes:
    """Return an attachment's key as the kernel has it in an element."""
    return bytes.fromhex(key.replace("-", ""))


def unpacked(data: bytes) -> str:
    """Return the attachment's key that an element has; the opposite of ``packed``."""
    digits = data.hex()
    return f"{digits[:HASH_DIGITS]}-{digits[HASH_DIGITS:]}"
