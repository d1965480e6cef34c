"""Import time is this program's run time: what each kind of call imports, with a cold start as the executable does."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from typing import TYPE_CHECKING, Any

import pytest
from dynamic_ports import asking
from go_tools import ROOT
from lab import LAUNCHER, Namespace, mapping, result

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

PATHS = [str(ROOT), sysconfig.get_path("purelib")]
RUN = """
import sys
bare = set(sys.modules)
sys.path[:0] = sys.argv[1:3]
import os
def leave(status):
    named = [[name, getattr(module, "__file__", None) or ""] for name, module in sys.modules.items()]
    modules = [item for item in named if item[0] not in bare]
    import json
    print(json.dumps(modules), file=sys.stderr)
    sys.exit(status)
os._exit = leave
from cni_hostport import handover
handover.UNTIL_TAKEN = 30
handover.main(sys.argv[3])
"""
ENVIRONMENT = {"CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/absent", "CNI_IFNAME": "eth0", "CNI_PATH": "/bin"}
CONFIG = {"cniVersion": "1.1.0", "name": "pods", "prevResult": result("10.1.0.2/24")}
PROTOCOL = pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
TCP = {"runtimeConfig": {"portMappings": [mapping(8080)]}}
# as containerd and CRI-O hand them over
ANNOTATIONS = {"io.kubernetes.cri.pod-annotations": {"kubernetes.io/config.source": "api", "hostport/other": "80/tcp"}}
ASKING = {"dynamicPorts": "40000-40999", "runtimeConfig": asking("80/tcp, 53/udp")["runtimeConfig"]}

PYDANTIC = {"annotated_types", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection"}
ROOMS = {path.parent.name for path in (ROOT / "cni_hostport").glob("*/__init__.py")}
# of the standard library, what takes its time
NEVER = {
    "asyncio", "email", "importlib.metadata", "logging", "multiprocessing", "subprocess", "syslog", "traceback"
}  # fmt: skip
SLOW = NEVER | {
    "ctypes", "dataclasses", "datetime", "decimal", "hashlib", "inspect", "ipaddress", "pathlib", "random", "selectors",
    "socket", "tempfile", "threading", "typing", "urllib", "uuid", "zoneinfo",
}  # fmt: skip

START = {"handover", "__main__", "skel", "errors", "text"}
NOTHING_TO_MAP = START | {"plugin"}
VALIDATION = {"config", "runtime_keys"} | {f"dynamic_ports.{name}" for name in ("keys", "ranges", "request")}
UNSPECIFIED = NOTHING_TO_MAP | VALIDATION
PLAN = UNSPECIFIED | {"kernel.interfaces", "kernel.netns", "kernel.routes", "netlink", "ruleset.plan"}
LOOKUP = {"lookup", "names", "netlink", "nf_answers", "nf_tables"}
PORTMAP = {"foreign_rules", "portmap"}
FORMER = LOOKUP | {"attachment"}  # whether there are host ports by an earlier ADD
DEL = NOTHING_TO_MAP | FORMER | PORTMAP | {"deletion"}
CONNTRACK = {"kernel.conntrack", "kernel.nf_conntrack"}
NFT = {"kernel.library", "kernel.library_process", "kernel.nft", "ruleset.base"}
COMMANDS = {"ruleset.base", "ruleset.commands", "ruleset.comment"}
HOLDERS = {"kernel.presence", "ownership", "precedence", "ruleset.elements", "ruleset.installed"}
NODE = {"kernel.ipvs", "kernel.listeners", "kernel.localnet"}
ADD = PLAN | FORMER | PORTMAP | CONNTRACK | NFT | COMMANDS | HOLDERS | NODE | {"addition", "afterwards"}
CHECK = PLAN | FORMER | NFT | COMMANDS | {"check", "kernel.snapshot"}
ASSIGNMENT = {"dynamic_ports.assignment"}
ALLOCATION = ASSIGNMENT | {f"dynamic_ports.{name}" for name in ("allocation", "note", "order", "picker", "pod_files")}


class Imported:
    """The modules of one call: the project's own, other distributions' top packages, and the slow standard ones."""

    def __init__(self, modules: list[tuple[str, str]]) -> None:
        self.all = {name for name, _ in modules}
        own = {name.partition(".")[2] for name in self.all if name.startswith("cni_hostport.")}
        self.rooms = own & ROOMS  # each costs as much as a module, though it holds nothing itself
        self.own = own - ROOMS
        self.others = {name.partition(".")[0] for name, path in modules if "site-packages" in path}
        self.slow = self.all & SLOW


class Caller:
    """Calls the executable's entry point in a network namespace, without a resident process unless told of one."""

    def __init__(self, namespace: Namespace, socket: Path) -> None:
        self.namespace = namespace
        self.socket = socket
        self.netns = ENVIRONMENT["CNI_NETNS"]

    def __call__(self, command: str, **keys: Any) -> Imported:
        ran = self.namespace.run(
            sys.executable, "-I", "-S", "-c", RUN, *PATHS, str(self.socket),
            input=json.dumps(CONFIG | keys), env=ENVIRONMENT | {"CNI_COMMAND": command, "CNI_NETNS": self.netns},
        )  # fmt: skip
        *lines, modules = ran.stderr.splitlines()
        assert lines == []
        return Imported(json.loads(modules))


@pytest.fixture
def call(_kernel: None, tmp_path: Path) -> Iterator[Caller]:
    with Namespace("imports") as namespace:
        namespace.ip("link add cni0 type bridge", "addr add 10.1.0.1/24 dev cni0", "link set cni0 up")
        yield Caller(namespace, tmp_path / "socket")


def test_version_imports_nothing_but_the_protocol(call: Caller) -> None:
    imported = call("VERSION")
    assert (imported.own, imported.others, imported.slow) == (START, set(), set())


@pytest.mark.parametrize(("command", "more"), [("ADD", FORMER), ("CHECK", set())])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"runtimeConfig": None},
        {"runtimeConfig": {"portMappings": [], "bandwidth": None}},
        {"runtimeConfig": ANNOTATIONS},
        {"conditionsV4": ["tcp", "dport", "!=", "9"], "snat": False},
    ],
)
def test_a_pod_without_mappings_imports_nothing_but_the_operation_and_a_look_for_former_ones(
    call: Caller, command: str, more: set[str], keys: Mapping[str, Any]
) -> None:
    imported = call(command, **keys)
    assert (imported.own, imported.others, imported.slow) == (NOTHING_TO_MAP | more, set(), set())
    assert imported.rooms == set()
    unneeded = {"contextlib", "collections.abc"} | (set() if more else {"struct", "errno"})
    assert not imported.all & (unneeded - modules_of("import json"))


@pytest.mark.parametrize(("command", "more"), [("ADD", FORMER), ("CHECK", set())])
def test_host_ports_that_are_all_unspecified_are_validated_and_no_more(
    call: Caller, command: str, more: set[str]
) -> None:
    imported = call(command, runtimeConfig={"portMappings": [mapping(0)]})
    assert (imported.own, imported.others) == (UNSPECIFIED | more, PYDANTIC)
    assert imported.rooms == {"dynamic_ports"}
    assert not imported.slow & NEVER


@pytest.mark.parametrize(("command", "own"), [("ADD", ADD), ("CHECK", CHECK)])
@PROTOCOL
def test_a_mapping_needs_pydantic_only_besides_libnftables_in_its_own_process(
    call: Caller, command: str, own: set[str], protocol: str
) -> None:
    keys = {"runtimeConfig": {"portMappings": [mapping(8080, 80, protocol)]}}
    if command == "CHECK":
        call("ADD", **keys)
    imported = call(command, **keys)
    assert (imported.own, imported.others) == (own, PYDANTIC)
    assert not imported.slow & NEVER


@pytest.mark.parametrize(("command", "own"), [("ADD", ADD | ALLOCATION), ("CHECK", CHECK | LOOKUP | ASSIGNMENT)])
def test_dynamic_ports_need_nothing_slow_either(call: Caller, command: str, own: set[str]) -> None:
    with Namespace("pod") as pod:
        pod.ip("link add eth0 type bridge")
        call.netns = pod.path
        if command == "CHECK":
            call("ADD", **ASKING)
        imported = call(command, **ASKING)
    assert (imported.own, imported.others) == (own, PYDANTIC)
    assert not imported.slow & NEVER
    imported = call("DEL")
    deletion = DEL | CONNTRACK | {"afterwards", "kernel.interfaces", "kernel.localnet"}
    assert (imported.own, imported.others) == (deletion | ASSIGNMENT | {"dynamic_ports.pod_files"}, set())
    assert not imported.slow


@pytest.mark.parametrize("known", [False, True], ids=["without mappings", "with mappings"])
@PROTOCOL
def test_a_del_of_an_installed_mapping_imports_nothing_slow(call: Caller, known: bool, protocol: str) -> None:
    keys = {"runtimeConfig": {"portMappings": [mapping(8080, 80, protocol)]}}
    call("ADD", **keys)
    imported = call("DEL", **keys if known else {})
    later = {"afterwards"} if protocol != "udp" else set()
    own = DEL | CONNTRACK | {"kernel.interfaces", "kernel.localnet"} | later
    assert (imported.own, imported.others, imported.slow) == (own, set(), set())
    assert "8080" not in call.namespace.run("nft", "list", "ruleset").stdout


@pytest.mark.parametrize("keys", [{}, {"runtimeConfig": ANNOTATIONS}])
def test_a_del_of_nothing_imports_nothing_slow(call: Caller, keys: Mapping[str, Any]) -> None:
    imported = call("DEL", **keys)
    assert (imported.own, imported.others, imported.slow) == (DEL, set(), set())
    assert imported.rooms == set()


def test_a_del_of_mappings_where_there_is_no_table_imports_nothing_slow_but_in_another_process(call: Caller) -> None:
    imported = call("DEL", **TCP)
    assert (imported.own, imported.others, imported.slow) == (DEL | NFT, set(), set())


def modules_of(script: str) -> set[str]:
    script = f"import sys; sys.path[:0] = sys.argv[1:]; {script}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-IS", "-c", script, *PATHS], check=True, capture_output=True, text=True)
    return set(ran.stdout.split())


def test_the_executable_begins_with_the_modules_of_the_interpreter_and_of_sockets() -> None:
    started = modules_of("import cni_hostport.handover")
    assert started - modules_of("import os, _socket") == {"cni_hostport", "cni_hostport.handover"}


@pytest.mark.parametrize("command", ["ADD", "CHECK", "DEL"])
def test_a_call_that_a_resident_process_runs_imports_nothing_more(call: Caller, command: str) -> None:
    resident = subprocess.Popen([*LAUNCHER, "serve", str(call.socket)])
    try:
        until = time.monotonic() + 30
        while not call.socket.exists() and time.monotonic() < until:
            time.sleep(0.02)
        call("ADD", **TCP)
        imported = call(command, **TCP)
    finally:
        resident.kill()
        resident.wait()
    assert imported.all == modules_of("import os, cni_hostport.handover") - modules_of("import sys")
