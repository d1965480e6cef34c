"""The agent of a node, as the DaemonSet's container runs it, but in a mount namespace and on a node of the tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from lab import CLIENT4, NODE4, NODE6, Node, config, mapping, wait
from libcni_cache import Cache
from resident import eventually
from restoration import running

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 9477
PRIMARY = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, {"type": "portmap"}]}
# with a /run of its own, where the resident process has its socket, but with the machine's network namespaces
WITH_OWN_RUN = """
set -e
mkdir -p "$0/netns"
mount --rbind /run/netns "$0/netns"
mount -t tmpfs tmpfs /run
mkdir /run/netns
mount --move "$0/netns" /run/netns
exec "$@"
"""


class Agent:
    """The agent on a node, which it prepares so that calls find its resident process."""

    def __init__(self, node: Node, top: Path, address: str = "0.0.0.0") -> None:
        self.node, self.top, self.address = node, top, address
        self.bin, self.conf, self.log = top / "bin", top / "net.d", top / "log"
        self.bin.mkdir()
        self.conf.mkdir()
        self.ours = self.conf / "01-hostport.conflist"
        self.executable = self.bin / "hostport"
        self.executable.symlink_to(Path(sys.prefix) / "bin" / "hostport")
        (self.bin / "bridge").touch()
        self.cache = Cache(top / "cache")
        self.start()

    def start(self) -> None:
        command = [
            "unshare", "--mount", "--propagation=slave", "sh", "-c", WITH_OWN_RUN, str(self.top),
            str(self.executable), "node", "run",
            f"--bin-dir={self.bin}", f"--lib-dir={self.top}/lib", f"--conf-dir={self.conf}",
            f"--cache-dir={self.cache.directory}", f"--listen={self.address}:{PORT}",
        ]  # fmt: skip
        self.log.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            inside = ["nsenter", f"--net={self.node.path}", *command]
            self.process = subprocess.Popen(inside, stdout=log, stderr=log)
        self.node.launcher = ["nsenter", f"--target={self.process.pid}", "--mount", str(self.executable)]
        # it may begin to listen, or say that it cannot, after it has started the resident process
        assert eventually(lambda: self.has_resident() and "listen" in self.log.read_text()), self.log.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)

    def has_resident(self) -> bool:
        return Path(f"/proc/{self.process.pid}/root/run/hostport.sock").exists()

    def children(self) -> list[int]:
        number = self.process.pid
        return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]

    def residents(self) -> list[int]:
        return [child for child in self.children() if "serve" in shown(child, "cmdline")]

    def write_primary(self, name: str = "10-pods.conflist") -> None:
        written = self.conf / f"{name}.new"
        written.write_text(json.dumps(PRIMARY))
        written.rename(self.conf / name)

    def get(self, path: str, address: str = NODE4) -> tuple[int, str]:
        curl = [
            "curl",
            "--silent",
            "--max-time",
            "20",
            "--write-out",
            "\n%{http_code}",
            f"http://{address}:{PORT}{path}",
        ]
        text, _, status = self.node.run(*curl, check=False).stdout.rpartition("\n")
        return int(status), text

    def is_ready(self) -> bool:
        return self.get("/readyz")[0] == 200


def shown(process: int, what: str) -> str:
    """Return what the kernel shows of a process, nothing of one that has ended."""
    try:
        return Path(f"/proc/{process}/{what}").read_text()
    except OSError:
        return ""


@pytest.fixture
def agent(node: Node, tmp_path: Path) -> Iterator[Agent]:
    with Agent(node, tmp_path) as made:
        yield made


def test_it_is_ready_when_the_next_pod_gets_its_host_ports(agent: Agent) -> None:
    status, text = agent.get("/readyz")
    assert (status, str(agent.conf) in text) == (503, True)
    agent.write_primary()
    assert eventually(agent.is_ready), agent.log.read_text()
    ours = json.loads(agent.ours.read_text())
    assert [plugin["type"] for plugin in ours["plugins"]] == ["bridge", "hostport"]
    assert agent.get("/healthz") == (200, "ok\n")


def test_it_is_not_ready_where_the_executable_is_another_version(agent: Agent) -> None:
    agent.write_primary()
    assert eventually(agent.is_ready)
    agent.executable.unlink()
    agent.executable.symlink_to("/opt/hostport/other/bin/hostport")
    status, text = agent.get("/readyz")
    assert (status, "leads to /opt/hostport/other/bin/hostport" in text) == (503, True), text


def test_it_is_not_ready_where_nftables_cannot_be_used(agent: Agent) -> None:
    agent.write_primary()
    assert eventually(agent.is_ready)
    break_nftables(agent.node)
    assert eventually(lambda: not agent.is_ready())
    assert "host ports are not available" in agent.get("/readyz")[1]
    assert agent.ours.exists()


def break_nftables(node: Node) -> None:
    node.nft_file("add table inet hostport; add map inet hostport hostports { type mark : mark; }")


def test_a_node_where_the_plugin_does_not_work_is_not_switched(agent: Agent) -> None:
    break_nftables(agent.node)
    agent.write_primary()
    assert eventually(lambda: "host ports are not available" in agent.get("/readyz")[1])
    assert not agent.ours.exists()
    agent.node.nft("delete table inet hostport")
    assert eventually(agent.is_ready)
    assert agent.ours.exists()


def test_a_node_whose_runtime_looks_elsewhere_for_plugins_is_not_switched(agent: Agent) -> None:
    (agent.bin / "bridge").unlink()
    agent.write_primary()
    assert eventually(lambda: "has none of the plugins bridge, portmap" in agent.get("/readyz")[1])
    assert not agent.ours.exists()


def test_it_brings_host_ports_back_when_the_table_was_deleted(agent: Agent, node: Node) -> None:
    pod = running(node, agent.cache, mapping(8080))
    pod.serve("tcp", 80, "web")
    node.nft("flush ruleset")
    assert eventually(lambda: not node.client.is_silent("tcp", NODE4, 8080)), agent.log.read_text()
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert "was deleted" in agent.log.read_text()


def test_it_brings_host_ports_back_that_were_lost_before_its_start(agent: Agent, node: Node) -> None:
    pod = running(node, agent.cache, mapping(8080))
    pod.serve("tcp", 80, "web")
    agent.end()
    node.nft("flush ruleset")
    agent.start()
    assert eventually(lambda: not node.client.is_silent("tcp", NODE4, 8080)), agent.log.read_text()


def test_it_makes_a_pods_file_again_that_is_lost(agent: Agent, node: Node) -> None:
    pod = node.pod(4)
    node.add(pod, dynamicPorts="40000-40999", runtimeConfig={"dynamicPorts": "80/tcp"})

    def file() -> Path:
        return Path(f"/proc/{agent.process.pid}/root/run/hostport/pods/{pod.id}/dynamic-ports.json")

    told = file().read_text()
    file().parents[1].rename(file().parents[1].with_name("lost"))  # at once: the agent may look in between
    assert eventually(file().exists), agent.log.read_text()
    assert file().read_text() == told
    agent.end()
    agent.start()  # with an empty /run, as after the start of the node
    assert eventually(file().exists), agent.log.read_text()
    assert file().read_text() == told


def test_a_plugin_that_ends_without_a_word_is_not_available(agent: Agent) -> None:
    agent.executable.unlink()
    agent.executable.write_text("#!/bin/sh\nexit 127\n")
    agent.executable.chmod(0o755)
    agent.write_primary()
    assert eventually(lambda: "ended with status 127" in agent.log.read_text())
    assert not agent.ours.exists()


def test_a_restoration_that_fails_is_repeated(agent: Agent, node: Node) -> None:
    pod = running(node, agent.cache, mapping(8080))
    pod.serve("tcp", 80, "web")
    entry = agent.cache.path(pod)
    whole = entry.read_text()
    entry.write_text("{")
    node.nft("flush ruleset")
    assert eventually(lambda: "the restoration did not restore all" in agent.log.read_text())
    entry.write_text(whole)
    assert eventually(lambda: not node.client.is_silent("tcp", NODE4, 8080)), agent.log.read_text()


def test_calls_that_lose_the_resident_process_leave_no_zombies(agent: Agent) -> None:
    (resident,) = agent.residents()
    os.kill(resident, signal.SIGKILL)
    assert eventually(lambda: agent.residents() not in ([resident], []) and agent.has_resident())
    children = agent.children()
    assert eventually(lambda: not [child for child in children if ") Z " in shown(child, "stat")])


def test_a_resident_process_that_is_killed_is_started_again(agent: Agent, node: Node) -> None:
    (first,) = agent.residents()
    os.kill(first, signal.SIGKILL)
    node.add(node.pod(4), mapping(8080))
    assert eventually(lambda: agent.residents() not in ([first], []) and agent.has_resident())
    assert "the resident process ended with status -9" in agent.log.read_text()


def test_its_end_is_nobodys_loss(agent: Agent, node: Node) -> None:
    holder, waiting = node.pod(4), node.pod(4)
    node.add(holder, mapping(8080))
    started = node.start("ADD", waiting, config(waiting, mapping(8080), waitForHolder=10))
    assert eventually(lambda: "waiting" in node.ruleset()), node.ruleset()
    agent.process.send_signal(signal.SIGTERM)
    node.delete(holder)
    assert wait(started).status == 0
    agent.process.wait(timeout=30)
    assert (agent.process.returncode, agent.has_resident()) == (0, False)
    assert f"{waiting.ip4} . tcp . 80" in node.ruleset() or node.holds(waiting)


def test_it_logs_take_overs(agent: Agent, node: Node) -> None:
    dead, next_ = node.pod(4), node.pod(4)
    node.add(dead, mapping(8080))
    dead.remove()
    node.add(next_, mapping(8080))
    assert eventually(lambda: re.search("takes over", agent.log.read_text()))


def test_it_answers_scrapes(agent: Agent, node: Node) -> None:
    node.add(node.pod(4), mapping(8080))
    status, text = agent.get("/metrics")
    assert (status, 'hostport_mappings{family="ipv4",protocol="tcp"} 1.0' in text) == (200, True)
    assert agent.get("/")[0] == 404


def test_an_address_that_cannot_be_listened_on_is_named_and_all_else_goes_on(node: Node, tmp_path: Path) -> None:
    with Agent(node, tmp_path, "203.0.113.1") as agent:
        agent.write_primary()
        assert eventually(agent.ours.exists)
        assert "203.0.113.1 port 9477: cannot listen there" in agent.log.read_text()


def test_it_answers_at_an_ipv6_address(node: Node, tmp_path: Path) -> None:
    with Agent(node, tmp_path, f"[{NODE6}]") as agent:
        assert eventually(lambda: agent.get("/healthz", f"[{NODE6}]") == (200, "ok\n"))


def test_of_many_clients_that_say_nothing_most_are_turned_away(agent: Agent, node: Node) -> None:
    with contextlib.ExitStack() as closing:
        for _ in range(100):
            silent = closing.enter_context(node.client.socket("tcp", NODE4))
            silent.connect((NODE4, PORT))
        assert eventually(lambda: len(list(Path(f"/proc/{agent.process.pid}/task").iterdir())) < 25)
        assert agent.get("/healthz") == (200, "ok\n")
