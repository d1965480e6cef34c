"""The comment on the map element of a host port: it tells a person, and this plugin later, who the holder is. Pure."""

from __future__ import annotations

from os.path import normpath
from typing import TYPE_CHECKING

from cni_hostport.attachment import COMMENT_BYTES, SHORT_ID, printable

if TYPE_CHECKING:
    from cni_hostport.attachment import Attachment

# below these, another process has other files
OWN_PATHS = ("/proc/self/", "/proc/thread-self/", "/dev/fd/", "/dev/std")


class Owner:
    """The holder of a port, as a map element's comment names it.

    ``container_id`` may be shortened. ``netns`` is the path of the network namespace; it is empty if it did not fit, or
    cannot be written as it is. A path can lead elsewhere later, and for other processes. So two more parts, which
    comments of older versions do not have, tell the namespace (see ``kernel.presence``). ``identity`` is
    ``<device>:<inode>`` of the namespace. ``place`` is ``<device>:<inode>`` of the directory that has the path's last
    name, and then ``:<cookie>`` of the namespace where the kernel gives one.
    """

    __slots__ = ("container_id", "identity", "ifname", "netns", "place")

    def __init__(self, container_id: str, ifname: str, netns: str = "", identity: str = "", place: str = "") -> None:
        """Take the comment's parts."""
        self.container_id = container_id
        self.ifname = ifname
        self.netns = netns
        self.identity = identity
        self.place = place

    def __eq__(self, other: object) -> bool:
        """Compare all parts."""
        return isinstance(other, Owner) and all(getattr(self, part) == getattr(other, part) for part in self.__slots__)

    def __hash__(self) -> int:
        """Hash part of what is compared."""
        return hash((self.container_id, self.ifname))

    def comment(self) -> str:
        """Return ``<containerID> <ifname>@<place> <identity> <netns path>``, printable ASCII of at most 128 bytes.

        If that is too long, the container ID is shortened; then the place is left out; then the path and its identity.
        A path is also left out if it cannot be written as it is, or if it means something else to another process,
        which would take the holder for dead. An older version takes the place for a part of the interface's name, and
        understands the rest.
        """
        ifname = printable(self.ifname)
        if _means_the_same_to_others(self.netns) and printable(self.netns) == self.netns:
            for place in dict.fromkeys((f"@{self.place}" if self.place else "", "")):
                rest = " ".join(filter(None, (ifname + place, self.identity, self.netns)))
                room = COMMENT_BYTES - len(f" {rest}")
                if room >= min(SHORT_ID, len(self.container_id)):
                    return f"{self.container_id[:room]} {rest}"
        return f"{self.container_id[: COMMENT_BYTES - len(f' {ifname}')]} {ifname}"

    def is_beside(self, attachment: Attachment) -> bool:
        """Tell whether this is another interface of the same container as an attachment's."""
        return (
            bool(self.netns)
            and self.netns == attachment.netns
            and (self.identity == attachment.identity or not (self.identity and attachment.identity))
            and self.container_id == attachment.container_id[: len(self.container_id)]
            and self.ifname != printable(attachment.ifname)
        )

    @classmethod
    def from_attachment(cls, attachment: Attachment) -> Owner:
        """Return what to write on an attachment's elements."""
        return cls(attachment.container_id, attachment.ifname, attachment.netns, attachment.identity, attachment.place)

    @classmethod
    def parse(cls, comment: str) -> Owner:
        """Read a comment; this never fails, whatever the comment is."""
        container_id, _, rest = comment.partition(" ")
        ifname, _, netns = rest.partition(" ")
        name, _, place = ifname.rpartition("@")
        if not _is_place(place):  # there is no ":" in the name of an interface
            name, place = ifname, ""
        identity, _, path = netns.partition(" ")
        if (path.startswith("/") or not path) and identity.replace(":", "").isdigit():
            return cls(container_id, name, path, identity, place)
        return cls(container_id, name, netns, "", place)  # of a version that did not note the identity


def _means_the_same_to_others(path: str) -> bool:
    return path.startswith("/") and not f"/{normpath(path).lstrip('/')}".startswith(OWN_PATHS)


def _is_place(text: str) -> bool:
    numbers = text.split(":")
    return len(numbers) in {2, 3} and all(map(str.isdecimal, numbers))
