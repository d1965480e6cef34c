"""The names of pods that have dynamic host ports, by their UIDs.

They are on the rules of their attachments, as a comment, which nftables cuts at 128 bytes. A longer one is in libcni's
cache, once the runtime has its answer to the ADD.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from cni_hostport import nf_answers, nf_tables
from cni_hostport.attachment import COMMENT_BYTES
from cni_hostport.kernel import files
from cni_hostport.libcni import directory
from cni_hostport.names import DYNAMIC, request_and_pod

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from cni_hostport.dynamic_ports.assignment import Assigned
    from cni_hostport.log import Log
    from cni_hostport.lookup import Lookup

ATTEMPTS = 25  # to find a long name


class PodNames:
    """Names as ``namespace/name``, of those pods of Kubernetes that were looked for."""

    def __init__(self, lookup: Lookup, caches: Sequence[Path], log: Log) -> None:
        """Look for none yet; ``caches`` are runtimes' directories."""
        self._lookup, self._caches, self._log = lookup, caches, log
        self._names: dict[str, str] = {}
        self._attempts = Counter[str]()

    def __getitem__(self, pod_id: str) -> str:
        """Return a name that was found."""
        return self._names[pod_id]

    def __contains__(self, pod_id: str) -> bool:
        """Tell whether a name was found."""
        return bool(self._names.get(pod_id))

    def keep(self, pod_ids: Collection[str]) -> None:
        """Forget the names of all pods but these, and those that were not found."""
        self._names = {pod_id: name for pod_id, name in self._names.items() if name and pod_id in pod_ids}
        self._attempts = Counter({pod_id: self._attempts[pod_id] for pod_id in self._attempts if pod_id in pod_ids})

    def find(self, assigned: Mapping[str, Assigned]) -> bool:
        """Find the names of pods, by their host ports; tell whether all were found that can be.

        Raises ``NFTError``.
        """
        for pod_id in [pod_id for pod_id, name in self._names.items() if not name and pod_id not in assigned]:
            del self._names[pod_id], self._attempts[pod_id]  # of the pod's next sandbox it may be found
        labels = {pod_id: self._label(pod_id, ports) for pod_id, ports in assigned.items() if pod_id not in self._names}
        cut = [pod_id for pod_id, label in labels.items() if label and len(label) == COMMENT_BYTES]
        cached = self._cached(cut) if cut else {}
        for pod_id, label in labels.items():
            name = label
            if label and pod_id in cut:
                name = cached.get(pod_id) or self._unknown(pod_id, label)
            if name is not None:
                # what runs in no pod of Kubernetes has no namespace
                self._names[pod_id] = name if "/" in name else ""
        return all(pod_id in self._names for pod_id in assigned)

    def _unknown(self, pod_id: str, label: str) -> str | None:
        """Give a long name up that no cache has, but not at once."""
        self._attempts[pod_id] += 1
        if self._attempts[pod_id] < ATTEMPTS:
            return None
        if self._attempts[pod_id] == ATTEMPTS:
            self._log(f"the name of the pod with the UID {pod_id} is unknown: nftables has no more of it than {label}")
        return ""

    def _label(self, pod_id: str, ports: Assigned) -> str | None:
        """Return what is on the rules to which a pod's first port leads, ``None`` if that is gone by now."""
        request, port = next(iter(ports.items()))
        for version in ("ipv4", "ipv6"):
            key = nf_tables.packed_port(f"{version} . {request.rpartition('/')[2]} . {port}")
            [element] = self._lookup.ask(nf_tables.get_element((DYNAMIC, key)))
            if element:
                [(_, comment)] = nf_answers.members_with_comments(element)
                # another pod can have this port of the other IP version
                if request_and_pod(comment)[1] == pod_id:
                    return self._lookup.label(nf_answers.target(element))
        return None

    def _cached(self, pod_ids: Iterable[str]) -> dict[str, str]:
        """Return the names that runtimes gave, as far as their cache has these pods."""
        wanted, found = set(pod_ids), dict[str, str]()
        try:
            entries = directory.entries(self._caches)
        except OSError:
            return {}  # what is not found is told
        for path in entries:
            try:
                given = dict(json.loads(files.read(path))["cniArgs"])
            except (OSError, ValueError, TypeError, KeyError, RecursionError):
                continue  # of somebody else, or about to be written
            namespace, name = given.get("K8S_POD_NAMESPACE"), given.get("K8S_POD_NAME")
            if given.get("K8S_POD_UID") in wanted and namespace and name:
                found[given["K8S_POD_UID"]] = f"{namespace}/{name}"
        return found
