"""The names under which dynamic host ports are asked for and told. Imports nothing: each ADD looks for them.

A name below a domain is its owner's to give: ``kubernetes.io`` and ``cni.dev`` are those of others. So the annotations
have the plugin's own name as their prefix, which is no domain, until Kubernetes settles on another one. Asked and
answered differ by ``-status``, as with Multus' ``networks`` and ``network-status``. In a network configuration,
``dynamicPorts`` are the ranges, and in a runtime's capability of the same name what one container asks for of them: so
is ``ipRanges`` of the plugin host-local both a capability and its content.
"""

from __future__ import annotations

REQUEST = "hostport/dynamic-ports"  # annotation: what a pod asks for, as in ``80/tcp, 9000-9002/udp``
STATUS = "hostport/dynamic-ports-status"  # annotation: the host ports that it has
# capabilities of a plugin: by the first, containerd and CRI-O hand over a pod's annotations; the other is this plugin's
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
CAPABILITY = "dynamicPorts"


def are_in(runtime_config: object) -> bool:
    """Tell whether ``runtimeConfig`` asks for dynamic host ports, however that is written; if in doubt, it does not."""
    if not isinstance(runtime_config, dict):
        return False
    annotations = runtime_config.get(ANNOTATIONS)
    return bool(runtime_config.get(CAPABILITY) or (isinstance(annotations, dict) and annotations.get(REQUEST)))
