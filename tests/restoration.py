"""Restorations on a test's node, from a cache of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import LAUNCHER, config

if TYPE_CHECKING:
    from lab import Node, Pod
    from libcni_cache import Cache


def restore(node: Node, *caches: Cache, options: tuple[str, ...] = (), status: int = 0) -> str:
    """Restore on a node, see it end with this status, and return what it says."""
    places = ["--watch=0", *(f"--cache-dir={item.directory}" for item in caches)]
    ran = node.run(*LAUNCHER, "restore", *places, *options, check=False)
    assert ran.returncode == status, ran
    return ran.stdout if options else ran.stderr


def running(node: Node, cache: Cache, *mappings: dict[str, Any], **keys: Any) -> Pod:
    """Have a pod with host ports, as a runtime leaves it behind."""
    pod = node.pod()
    call = config(pod, *mappings, name=keys.get("network", "pods"))
    added = node.cni("ADD", pod, call, ARGS=f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME={pod.host_end}")
    assert added.status == 0, added
    cache.add(pod, *mappings, **keys)
    return pod
