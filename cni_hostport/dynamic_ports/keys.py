"""The names under which dynamic host ports are asked for and told. Imports nothing: ADD and DEL look for them.

The prefix of an annotation says who gives it a meaning. ``kubernetes.io`` and ``cni.dev`` are others' domains, and this
plugin has none: so the prefix is its own name, until Kubernetes settles on another one. ``dynamic-ports`` says that
somebody picks the port, which ``ports`` or ``host-ports`` would not. Asked and answered differ by ``-status``, as with
Multus' ``networks`` and ``network-status``: a pod that is copied with all its annotations still asks for the same.

CNI wants capabilities and keys in camel case. ``dynamicPorts`` is both: as a key of the network configuration it is the
ranges, as a capability what one container asks for of them. So is ``mac`` of the plugin tuning a key and a capability,
and here as there, what is in ``runtimeConfig`` cannot be mistaken for the other.
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
