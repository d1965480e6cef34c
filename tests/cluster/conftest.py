from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from go_tools import TOOLS
from lab import require
from runtimes import image

from cluster.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

BUILT = (
    *("bridge", "host-local", "loopback", "portmap", "containerd", "ctr", "kubelet", "kube-proxy", "kubectl"),
    *("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "agnhost", "e2e"),
)


@pytest.fixture(scope="module")
def cluster(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two nodes whose network is ``bridge`` and ``portmap``."""
    for program in BUILT:
        require((TOOLS / program).exists(), f"needs {program}, built by tests/build-tools.sh")
    require(image.can_be_made(), "needs busybox-static")
    for program in ("runc", "iptables", "openssl", "curl", "nc"):
        require(shutil.which(program), f"needs the program {program}")
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made
