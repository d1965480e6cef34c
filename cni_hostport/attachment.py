"""An attachment, and the key by which the ruleset knows it.

An attachment is (network, container ID, ifname), the key under which the CNI specification lets a runtime ADD and DEL.
Its chains are named by two hashes, which are made here: any ID fits a chain name, and GC can tell its own network's
chains.
"""

from __future__ import annotations

try:
    from _blake2 import blake2b  # hashlib loads OpenSSL

    blake2b()  # in FIPS mode, Pythons refuse the one or the other
except (ImportError, ValueError):
    from cni_hostport.blake2_fallback import blake2b  # type: ignore[assignment]

from cni_hostport.names import HASH_BYTES

COMMENT_BYTES = 128  # what nftables stores at most (NFTNL_UDATA_COMMENT_MAXLEN)
UNQUOTABLE = frozenset('"\\')
SHORT_ID = 12  # characters of a container ID that runtimes show, and that `crictl inspect` accepts
HEXADECIMAL = "0123456789abcdef"
POD_ID_BYTES = 72  # of what names a pod in a comment, beside a container port with its host address


class Attachment:
    """One container's interface on one network.

    What else is known of it does not identify it: ``netns`` is the path of its network namespace, ``identity`` and
    ``place`` are as in ``ruleset.comment``, ``pod`` is ``namespace/name``, and ``pod_uid`` its UID.
    """

    __slots__ = ("_key", "container_id", "identity", "ifname", "netns", "network", "place", "pod", "pod_uid")

    def __init__(self, network: str, container_id: str, ifname: str, netns: str = "", pod: str = "") -> None:
        """Take the names that a runtime gives it."""
        self.network = network
        self.container_id = container_id
        self.ifname = ifname
        self.netns = netns
        self.identity = ""
        self.place = ""
        self.pod = pod
        self.pod_uid = ""
        self._key = ""

    @property
    def key(self) -> str:
        """``N-A``, two hashes: the part that the names of its chains share."""
        if not self._key:
            self._key = f"{self.network_key(self.network)}-{digest(self.container_id, self.ifname)}"
        return self._key

    @property
    def pod_id(self) -> str:
        """What tells its pod from others: the pod's UID, or where there is none the container ID, at least its end."""
        return (self.pod_uid or self.container_id)[-POD_ID_BYTES:].lstrip("-_.") or digest(self.container_id)

    @staticmethod
    def network_key(network: str) -> str:
        """``N``, a hash: the first part of the keys of all attachments of a network."""
        return digest(network)


def short_id(container_id: str) -> str:
    """Return a container ID as runtimes show it; nerdctl's keep what precedes its own: ``NAMESPACE-``."""
    namespace, dash, own = container_id.rpartition("-")
    return container_id[:SHORT_ID] if own.strip(HEXADECIMAL) else f"{namespace}{dash}{own[:SHORT_ID]}"


def printable(text: str) -> str:
    """Reduce a text from outside to what may stand between double quotes in an nft command."""
    if text.isascii() and text.isprintable() and not UNQUOTABLE & set(text):
        return text
    return "".join(c if " " <= c <= "~" and c not in UNQUOTABLE else "?" for c in text)


def pod_name(cni_args: str) -> str:
    """Return ``namespace/name`` from CNI_ARGS (``KEY=value;KEY=value``), or an empty string where it has no pod.

    Runtimes send these for Kubernetes pods. They only label the rules, so nothing in them is an error.
    """
    args = _arguments(cni_args)
    namespace, name = args.get("K8S_POD_NAMESPACE", ""), args.get("K8S_POD_NAME", "")
    return printable(f"{namespace}/{name}" if namespace and name else name)[:COMMENT_BYTES]


def pod_uid(cni_args: str) -> str:
    """Return the pod's UID from CNI_ARGS, empty where it has none, or none that can be the name of a directory."""
    uid = _arguments(cni_args).get("K8S_POD_UID", "")
    return uid if uid.isascii() and uid.replace("-", "").isalnum() and len(uid) <= POD_ID_BYTES else ""


def _arguments(cni_args: str) -> dict[str, str]:
    return dict(item.partition("=")[::2] for item in cni_args.split(";"))


def digest(*parts: str) -> str:
    """Return the hash of names, in hexadecimal."""
    return blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=HASH_BYTES).hexdigest()
