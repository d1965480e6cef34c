from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from lab import mapping, result

SLOW = {"pydantic", "pyroute2", "nftables", "asyncio", "traceback"}

RUN = """
import io, json, sys
from cni_hostport import skel
environ, config, kernel = json.loads(sys.argv[1])
if kernel:
    from cni_hostport import plugin
    from cni_hostport.installed import Installed
    from cni_hostport.nft import NotFoundError

    class Kernel:
        def run(self, commands):
            if kernel == "empty":
                raise NotFoundError([("No such file or directory", command) for command in commands])

        def installed(self):
            return Installed.read(kernel)

        def listing(self, what):
            return []

    plugin.Nft = Kernel
status = skel.run(environ, io.BytesIO(json.dumps(config).encode()), io.StringIO(), sys.stderr)
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
ENVIRONMENT = {"CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/absent", "CNI_IFNAME": "eth0", "CNI_PATH": "/bin"}
CHAIN = "dnat-664b16ffde93ac1d-02419fd924bed545"
TCP_POD = [
    {"chain": {"table": "hostport", "name": CHAIN, "handle": 1}},
    {"map": {"name": "hostports", "elem": [[{"concat": ["ipv4", "tcp", 8080]}, {"goto": {"target": CHAIN}}]]}},
]


def imported(command: str, kernel: object = None, **keys: Any) -> set[str]:
    config = {"cniVersion": "1.1.0", "name": "pods", "prevResult": result("10.1.0.2/24"), **keys}
    argument = json.dumps([ENVIRONMENT | {"CNI_COMMAND": command}, config, kernel])
    ran = subprocess.run([sys.executable, "-I", "-c", RUN, argument], check=True, capture_output=True, text=True)
    status, modules = json.loads(ran.stdout)
    assert (status, ran.stderr) == (0, "")
    return SLOW.intersection(modules)


def test_version_imports_nothing_slow() -> None:
    assert imported("VERSION") == set()


@pytest.mark.parametrize("command", ["ADD", "CHECK"])
@pytest.mark.parametrize(
    "keys", [{}, {"runtimeConfig": None}, {"runtimeConfig": {"portMappings": [], "bandwidth": None}}]
)
def test_a_pod_without_mappings_imports_nothing_slow(command: str, keys: dict[str, Any]) -> None:
    assert imported(command, **keys) == set()


def test_a_pod_whose_host_ports_are_all_unspecified_asks_the_kernel_nothing() -> None:
    modules = imported("ADD", runtimeConfig={"portMappings": [mapping(0)]})
    assert not modules & {"pyroute2", "nftables"}


@pytest.mark.parametrize("kernel", ["empty", TCP_POD], ids=["not installed", "installed"])
@pytest.mark.parametrize("keys", [{}, {"runtimeConfig": {"portMappings": [mapping(8080)]}}])
def test_a_del_imports_nothing_slow_but_nftables(kernel: object, keys: dict[str, Any]) -> None:
    assert not imported("DEL", kernel, **keys)
