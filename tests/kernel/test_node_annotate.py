"""The annotator of a node: what it sends to an API server, and when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
from api_server import PORT, FakeAPIServer, Pod
from dynamic_ports import given
from lab import LAUNCHER, NODE4, NODE6, Node, config
from libcni_cache import Cache
from resident import eventually

from cni_hostport.dynamic_ports import keys
from cni_hostport.dynamic_ports.request import status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import lab

RANGE = "40000-40999"
MODULES = """
from cni_hostport.__main__ import main
from cni_hostport.operate.node import annotator, api_server, pod_names
"""
# with the account where a container has it
WITH_ACCOUNT = """
set -e
place=/run/secrets/kubernetes.io/serviceaccount
mount -t tmpfs tmpfs /run
mkdir -p $place
mount --bind "$0" $place
exec "$@"
"""


class Annotator:
    """The annotator on a node, which it runs on until it is ended; lines of Python alter its constants."""

    def __init__(
        self, node: Node, server: FakeAPIServer, directory: Path, *lines: str, host_ips: str = f"{NODE4},{NODE6}"
    ) -> None:
        self.node, self.server, self._host_ips = node, server, host_ips
        self.cache = Cache(directory / "cache")
        self._log = directory / "log"
        altered = [sys.executable, "-Ic", "\n".join([MODULES, *lines, "main()"])]
        self._launcher = altered if lines else LAUNCHER
        self.start()

    def start(self) -> None:
        command = [
            "unshare", "--mount", "--propagation=slave", "sh", "-c", WITH_ACCOUNT, str(self.server.account),
            *self._launcher, "node", "annotate", f"--cache-dir={self.cache.directory}",
        ]  # fmt: skip
        environment = {
            "PATH": os.defpath, "HOSTPORT_HOST_IPS": self._host_ips,
            "KUBERNETES_SERVICE_HOST": self.server.address, "KUBERNETES_SERVICE_PORT": str(PORT),
        }  # fmt: skip
        with self._log.open("ab") as log:
            inside = ["nsenter", f"--net={self.node.path}", *command]
            self.process = subprocess.Popen(inside, stdout=log, stderr=log, env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def has_written(self, name: str, ports: dict[str, int]) -> bool:
        """Wait until a pod is annotated with its host ports."""
        return self.has_annotated(name, text(ports))

    def has_annotated(self, name: str, annotation: str) -> bool:
        """Wait until a pod has an annotation."""
        return eventually(lambda: self.server.pods[name].annotations.get(keys.STATUS) == annotation)


def text(ports: dict[str, int], host_ip: str = NODE4) -> str:
    """Return the annotation of a pod, on a node of one address."""
    return json.dumps({asked: {**port, "hostIP": port.get("hostIP", host_ip)} for asked, port in status(ports).items()})


def annotated(node: Node, server: FakeAPIServer, annotator: Annotator) -> tuple[lab.Pod, dict[str, int]]:
    """Have a pod ``shop/web`` with a dynamic host port, annotated with it; return it and its ports."""
    pod = node.pod(4)
    server.pods["shop/web"] = Pod(f"{pod.name}-uid")
    ports = add_again(node, pod, "shop/web", "80/tcp")
    assert annotator.has_written("shop/web", ports)
    return pod, ports


@pytest.fixture
def server(node: Node, tmp_path: Path) -> Iterator[FakeAPIServer]:
    with FakeAPIServer(node, tmp_path) as made:
        yield made


@pytest.fixture
def annotator(node: Node, server: FakeAPIServer, tmp_path: Path) -> Iterator[Annotator]:
    with Annotator(node, server, tmp_path) as made:
        yield made


def add(node: Node, name: str, request: str, **keys: Any) -> tuple[lab.Pod, str, dict[str, int]]:
    """Have a pod with dynamic host ports, and return it with its UID and these ports."""
    pod = node.pod(4)
    uid = f"{pod.name}-uid"
    return pod, uid, add_again(node, pod, name, request, **keys)


def add_again(node: Node, pod: lab.Pod, name: str, request: str, **keys: Any) -> dict[str, int]:
    uid = f"{pod.name}-uid"
    add_sandbox(node, pod, name, uid, request, **keys)
    return given(node)[uid]


def add_sandbox(node: Node, pod: lab.Pod, name: str, uid: str, request: str, **keys: Any) -> None:
    call = config(pod, **{"dynamicPorts": RANGE, "runtimeConfig": {"dynamicPorts": request}, **keys})
    namespace, _, own = name.partition("/")
    args = f"K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={own};K8S_POD_UID={uid}"
    added = node.cni("ADD", pod, call, ARGS=args)
    assert added.status == 0, added


def test_a_pod_is_patched_with_its_ports_and_its_uid(node: Node, server: FakeAPIServer, annotator: Annotator) -> None:
    server.pods["shop/web"] = Pod("")
    pod = node.pod(4)
    server.pods["shop/web"].uid = uid = f"{pod.name}-uid"
    ports = add_again(node, pod, "shop/web", "80/tcp, 192.0.2.1:443, 9000-9001/udp")
    assert annotator.has_written("shop/web", ports), annotator.log
    [request] = server.requests
    assert (request.method, request.path) == (
        "PATCH", "/api/v1/namespaces/shop/pods/web/status?fieldManager=hostport"
    )  # fmt: skip
    assert request.headers["Content-Type"] == "application/merge-patch+json"
    assert request.headers["Authorization"] == "Bearer first"
    assert request.document == {"metadata": {"uid": uid, "annotations": {"hostport/dynamic-ports-status": text(ports)}}}
    told = json.loads(text(ports))
    assert told["80/tcp"] == {"hostPort": ports["80/tcp"], "hostIP": NODE4}
    assert told["9001/udp"]["hostPort"] == told["9000/udp"]["hostPort"] + 1


def test_pods_that_have_one_port_of_two_ip_versions_are_told_apart(
    node: Node, server: FakeAPIServer, annotator: Annotator
) -> None:
    for name, asked, host_ip in (("four", "0.0.0.0:80", NODE4), ("six", "[::]:80", NODE6)):
        pod = node.pod()
        server.pods[f"shop/{name}"] = Pod(f"{pod.name}-uid")
        assert add_again(node, pod, f"shop/{name}", asked, dynamicPorts="40000") == {f"{asked}/tcp": 40000}
        told = {f"{asked}/tcp": {"hostPort": 40000, "hostIP": host_ip}}
        assert annotator.has_annotated(f"shop/{name}", json.dumps(told)), annotator.log


def test_a_port_that_somebody_keeps_from_being_given_is_no_pods(
    node: Node, server: FakeAPIServer, annotator: Annotator
) -> None:
    annotated(node, server, annotator)
    node.nft('add element inet hostport dynamic_ports { ipv4 . tcp . 41000 comment "kept for tests" : accept }')
    pod = node.pod(4)
    server.pods["shop/later"] = Pod(f"{pod.name}-uid")
    ports = add_again(node, pod, "shop/later", "80/tcp")
    assert annotator.has_written("shop/later", ports), annotator.log


def test_another_pod_of_the_same_name_is_left_alone(node: Node, server: FakeAPIServer, annotator: Annotator) -> None:
    server.pods["shop/web"] = Pod("another")
    add(node, "shop/web", "80/tcp")
    assert eventually(lambda: "is not the one with the UID" in annotator.log)
    time.sleep(1.5)
    assert len(server.requests) == 1
    assert server.pods["shop/web"].annotations == {}


def test_a_pod_that_is_gone_is_no_matter(node: Node, server: FakeAPIServer, annotator: Annotator) -> None:
    add(node, "shop/gone", "80/tcp")
    assert eventually(lambda: server.requests)
    time.sleep(1.5)
    assert len(server.requests) == 1
    assert annotator.log == ""


def test_without_the_role_the_log_says_so_once(node: Node, server: FakeAPIServer, annotator: Annotator) -> None:
    server.refuse = lambda _: 403
    for name in ("shop/one", "shop/two"):
        _, uid, ports = add(node, name, "80/tcp")
        server.pods[name] = Pod(uid)
    assert eventually(lambda: len(server.requests) > 2)
    assert annotator.log.count("ClusterRole hostport-annotator") == annotator.log.count("\n") == 1
    server.refuse = lambda _: 200
    assert annotator.has_written("shop/two", ports), annotator.log


@pytest.mark.parametrize("failure", [0, 500, 409, 429, 503])
def test_what_fails_is_sent_again_and_holds_nobody_up(
    node: Node, server: FakeAPIServer, annotator: Annotator, failure: int
) -> None:
    server.refuse = lambda name: failure if name == "shop/bad" else 200
    _, bad_uid, bad_ports = add(node, "shop/bad", "80/tcp")
    server.pods["shop/bad"] = Pod(bad_uid)
    assert eventually(lambda: server.requests)
    for name in ("shop/good", "shop/other", "shop/third"):  # a listing has them in any order
        pod = node.pod(4)
        server.pods[name] = Pod(f"{pod.name}-uid")
        assert annotator.has_written(name, add_again(node, pod, name, "80/tcp")), annotator.log
    assert server.pods["shop/bad"].annotations == {}
    server.refuse = lambda _: 200
    assert annotator.has_written("shop/bad", bad_ports), annotator.log


@pytest.mark.parametrize(
    "reason",
    [
        b"<html>", b"", b"[]", b"[" * 100_000, b"\xff", b'{"details": []}', b'{"details": {"causes": [1, {}]}}',
        b'{"details": {"causes": {"field": "metadata.uid"}}, "message": {}}',
    ],
)  # fmt: skip
def test_a_refusal_of_which_no_sense_can_be_made_is_one(
    node: Node, server: FakeAPIServer, annotator: Annotator, reason: bytes
) -> None:
    server.refuse, server.reason = lambda _: 422, reason
    _, uid, ports = add(node, "shop/web", "80/tcp")
    server.pods["shop/web"] = Pod(uid)
    assert eventually(lambda: "was not taken, and is sent again: 422" in annotator.log)
    server.refuse = lambda _: 200
    assert annotator.has_written("shop/web", ports), annotator.log


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_can_do_nothing_now_is_left_alone(
    node: Node, server: FakeAPIServer, annotator: Annotator, status: int
) -> None:
    server.refuse, server.retry_after = lambda _: status, "1"
    for name in ("shop/one", "shop/two"):
        _, uid, ports = add(node, name, "80/tcp")
        server.pods[name] = Pod(uid)
    assert eventually(lambda: len(server.requests) > 1)
    first, second = server.requests[:2]
    assert second.time - first.time >= 1
    server.refuse = lambda _: 200
    assert annotator.has_written("shop/two", ports), annotator.log


def test_a_server_that_goes_away_and_comes_back_gets_what_it_missed(
    node: Node, server: FakeAPIServer, annotator: Annotator
) -> None:
    early = node.pod(4)
    server.pods["shop/early"] = Pod(f"{early.name}-uid")
    assert annotator.has_written("shop/early", add_again(node, early, "shop/early", "80/tcp"))
    assert eventually(lambda: "pod shop/early has " in annotator.log)  # which comes after the server's answer
    server.stop()
    _, uid, ports = add(node, "shop/late", "80/tcp")
    server.pods["shop/late"] = Pod(uid)
    assert eventually(lambda: "cannot be reached" in annotator.log)
    server.rotate_certificate()
    server.start()
    assert annotator.has_written("shop/late", ports), annotator.log
    assert annotator.log.count("cannot be reached") == 1
    assert eventually(lambda: "the API server answers again" in annotator.log)


def test_a_cluster_can_be_one_of_ipv6_alone(node: Node, tmp_path: Path) -> None:
    pod = node.pod(6)
    with FakeAPIServer(node, tmp_path, "::1") as server, Annotator(node, server, tmp_path, host_ips=NODE6) as annotator:
        server.pods["shop/web"] = Pod(f"{pod.name}-uid")
        ports = add_again(node, pod, "shop/web", "80/tcp")
        assert annotator.has_annotated("shop/web", text(ports, NODE6)), annotator.log
        [request] = server.requests
        assert request.headers["Host"] == f"[::1]:{PORT}"


def test_a_token_that_is_rotated_is_used_at_once(node: Node, server: FakeAPIServer, annotator: Annotator) -> None:
    server.rotate_token("second")
    _, uid, _ = add(node, "shop/web", "80/tcp")
    server.pods["shop/web"] = Pod(uid)
    assert eventually(lambda: server.requests)
    assert server.requests[0].headers["Authorization"] == "Bearer second"
    server.rotate_token("third", tell=False)
    _, uid, ports = add(node, "shop/other", "80/tcp")
    server.pods["shop/other"] = Pod(uid)
    assert eventually(lambda: "401: Unauthorized" in annotator.log)
    server.rotate_token("third")
    assert annotator.has_written("shop/other", ports), annotator.log


@pytest.mark.parametrize("token", ["", "hidden\nhidden", "\0", "\u00e9"], ids=ascii)
def test_what_is_no_token_is_not_sent_and_not_shown(
    node: Node, server: FakeAPIServer, annotator: Annotator, token: str
) -> None:
    server.rotate_token(token)
    _, uid, ports = add(node, "shop/web", "80/tcp")
    server.pods["shop/web"] = Pod(uid)
    assert eventually(lambda: "serviceaccount/token holds no token" in annotator.log)
    server.rotate_token("second")
    assert annotator.has_written("shop/web", ports), annotator.log
    assert "hidden" not in annotator.log
    assert len(server.requests) == 1


def test_its_restart_writes_the_same_once(node: Node, server: FakeAPIServer, annotator: Annotator) -> None:
    _, ports = annotated(node, server, annotator)
    for number in (signal.SIGTERM, signal.SIGKILL):
        assert annotator.end(number) in {0, -signal.SIGKILL}
        server.requests.clear()
        annotator.start()
        assert eventually(lambda: server.requests), annotator.log
        time.sleep(0.5)
        assert [request.document["metadata"]["annotations"][keys.STATUS] for request in server.requests] == [
            text(ports)
        ]


def test_the_annotation_follows_a_sandbox_that_is_made_again(
    node: Node, server: FakeAPIServer, annotator: Annotator
) -> None:
    pod, first = annotated(node, server, annotator)
    node.delete(pod)
    time.sleep(0.5)
    assert server.pods["shop/web"].annotations[keys.STATUS] == text(first)
    second = add_again(node, pod, "shop/web", "80/tcp", dynamicPorts="41000-41999")
    assert second != first
    assert annotator.has_written("shop/web", second)


def test_of_two_sandboxes_of_a_pod_the_annotation_tells_the_one_that_is_left(
    node: Node, server: FakeAPIServer, annotator: Annotator
) -> None:
    sandboxes = [node.pod(4) for _ in range(2)]
    uid = f"{sandboxes[0].name}-uid"
    made = server.pods["shop/web"] = Pod(uid)
    add_sandbox(node, sandboxes[0], "shop/web", uid, "80/tcp")
    first = given(node)[uid]
    assert annotator.has_written("shop/web", first)
    add_sandbox(node, sandboxes[1], "shop/web", uid, "80/tcp")
    time.sleep(0.5)
    told, other = sandboxes if made.annotations[keys.STATUS] == text(first) else reversed(sandboxes)
    node.delete(told)
    left = given(node)[uid]
    assert (left != first) == (told is sandboxes[0])
    assert annotator.has_written("shop/web", left), annotator.log
    node.delete(other)


def test_a_flush_changes_nothing_and_neither_does_a_restore(
    node: Node, server: FakeAPIServer, annotator: Annotator
) -> None:
    pod, ports = annotated(node, server, annotator)
    node.nft("flush ruleset")
    assert add_again(node, pod, "shop/web", "80/tcp") == ports
    later = node.pod(4)
    server.pods["shop/later"] = Pod(f"{later.name}-uid")
    add_again(node, later, "shop/later", "80/tcp")
    assert eventually(lambda: len(server.requests) >= 2)
    assert [request.path.split("/")[6] for request in server.requests] == ["web", "later"]


def test_a_name_that_nftables_cuts_is_in_the_cache_after_the_add(
    node: Node, server: FakeAPIServer, tmp_path: Path
) -> None:
    with Annotator(node, server, tmp_path, "pod_names.ATTEMPTS = 10_000") as annotator:
        pod, name = node.pod(4), "w" * 200
        uid = f"{pod.name}-uid"
        server.pods[f"shop/{name}"] = Pod(uid)
        ports = add_again(node, pod, f"shop/{name}", "80/tcp")
        other = node.pod(4)
        server.pods["shop/web"] = Pod(f"{other.name}-uid")
        assert annotator.has_written("shop/web", add_again(node, other, "shop/web", "80/tcp"))
        annotator.cache.add(pod, cniArgs=[["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", name], ["K8S_POD_UID", uid]])
        assert annotator.has_written(f"shop/{name}", ports), annotator.log


def test_a_name_that_nobody_has_whole_is_said_once(node: Node, server: FakeAPIServer, tmp_path: Path) -> None:
    with Annotator(node, server, tmp_path, "pod_names.ATTEMPTS = 3") as annotator:
        add(node, f"shop/{'w' * 200}", "80/tcp")
        assert eventually(lambda: "is unknown: nftables has no more of it than shop/www" in annotator.log)
        assert (server.requests, annotator.log.count("\n")) == ([], 1)


def test_a_name_that_was_not_found_is_looked_for_again_when_the_pod_has_another_sandbox(
    node: Node, server: FakeAPIServer, tmp_path: Path
) -> None:
    with Annotator(node, server, tmp_path, "pod_names.ATTEMPTS = 3") as annotator:
        name = "w" * 200
        pod, uid, _ = add(node, f"shop/{name}", "80/tcp")
        server.pods[f"shop/{name}"] = Pod(uid)
        assert eventually(lambda: "is unknown" in annotator.log)
        node.delete(pod)
        other = node.pod(4)
        server.pods["shop/web"] = Pod(f"{other.name}-uid")
        assert annotator.has_written("shop/web", add_again(node, other, "shop/web", "80/tcp"))
        annotator.cache.add(pod, cniArgs=[["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", name], ["K8S_POD_UID", uid]])
        ports = add_again(node, pod, f"shop/{name}", "80/tcp")
        assert annotator.has_written(f"shop/{name}", ports), annotator.log


def test_a_container_outside_of_kubernetes_is_none_of_its_business(
    node: Node, server: FakeAPIServer, annotator: Annotator
) -> None:
    pod = node.pod(4)
    call = config(pod, dynamicPorts=RANGE, runtimeConfig={"dynamicPorts": "80/tcp"})
    assert node.cni("ADD", pod, call).status == 0
    other = node.pod(4)
    server.pods["shop/web"] = Pod(f"{other.name}-uid")
    assert annotator.has_written("shop/web", add_again(node, other, "shop/web", "80/tcp"))
    assert eventually(lambda: annotator.log.count("\n"))  # which comes after the server's answer
    assert len(server.requests) == annotator.log.count("\n") == 1


def test_a_node_full_of_pods_is_annotated_at_once_and_without_repetition(
    node: Node, server: FakeAPIServer, annotator: Annotator
) -> None:
    add(node, "shop/web", "80/tcp")  # which makes the table
    lines = []
    for number in range(110):
        server.pods[f"shop/many-{number}"] = Pod(f"uid-{number}")
        chain = f"dnat-{number:033}"
        element = f'ipv4 . tcp . {41000 + number} comment "80/tcp uid-{number}" : goto {chain}'
        lines += [
            f"add chain inet hostport {chain}",
            f'add rule inet hostport {chain} tcp dport 80 accept comment "shop/many-{number}"',
            f"add element inet hostport dynamic_ports {{ {element} }}",
        ]
    began = time.monotonic()
    node.nft_file("\n".join(lines))
    for number in range(110):
        assert annotator.has_written(f"shop/many-{number}", {"80/tcp": 41000 + number}), annotator.log
    print(f"110 pods after {time.monotonic() - began:.3f} s")  # noqa: T201 - for who runs it with -s
    assert eventually(lambda: len(server.requests) >= 111)
    time.sleep(0.5)
    assert len(server.requests) == 111


def test_an_annotation_that_somebody_removed_is_written_again(
    node: Node, server: FakeAPIServer, tmp_path: Path
) -> None:
    pod = node.pod(4)
    made = server.pods["shop/web"] = Pod(f"{pod.name}-uid")
    with Annotator(node, server, tmp_path, "annotator.REPEAT = 1.0") as annotator:
        ports = add_again(node, pod, "shop/web", "80/tcp")
        assert annotator.has_written("shop/web", ports)
        made.annotations.clear()
        assert annotator.has_written("shop/web", ports)
        assert annotator.log.count("\n") == 1


@pytest.fixture
def hanging(server: FakeAPIServer) -> Iterator[FakeAPIServer]:
    """A server that says nothing about the pod ``shop/bad`` before the end of the test."""
    end = threading.Event()
    server.refuse = lambda name: 200 if name != "shop/bad" or end.wait() else 0
    yield server
    end.set()


def test_a_server_that_says_nothing_about_one_pod_holds_nobody_up_for_long(
    node: Node, hanging: FakeAPIServer, tmp_path: Path
) -> None:
    with Annotator(node, hanging, tmp_path, "api_server.TIMEOUT = 0.5") as annotator:
        add(node, "shop/bad", "80/tcp")
        assert eventually(lambda: "does not answer about pod shop/bad" in annotator.log)
        for name in ("shop/one", "shop/two"):
            pod = node.pod(4)
            hanging.pods[name] = Pod(f"{pod.name}-uid")
            assert annotator.has_written(name, add_again(node, pod, name, "80/tcp"))
        assert eventually(lambda: len([request for request in hanging.requests if "/bad/" in request.path]) > 1)


def test_it_ends_where_it_hangs(node: Node, hanging: FakeAPIServer, tmp_path: Path) -> None:
    with Annotator(node, hanging, tmp_path, "annotator.STALLED = 1.0", "annotator.LONGEST_WAIT = 0.1") as annotator:
        add(node, "shop/bad", "80/tcp")
        assert annotator.process.wait(timeout=30) == 1
        assert "Timeout" in annotator.log


TERMINATE = """
import ctypes, operator, os, signal
from functools import partial
wait, kill = annotator.select.select, partial(ctypes.CDLL(None).kill, os.getpid(), signal.SIGTERM)
class Final:
    __del__ = lambda _: os.kill(os.getpid(), signal.SIGTERM)
"""
MOMENTS = {
    "where an exception would be lost": "late = lambda *given: [Final() and None, wait(*given)][1]",
    # Python would see the signal in a step of its own between the two
    "just before it waits": "late = lambda *given: [*map(operator.call, (kill, partial(wait, *given)))][1]",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_it_at_any_moment(node: Node, server: FakeAPIServer, tmp_path: Path, moment: str) -> None:
    with Annotator(node, server, tmp_path, TERMINATE, MOMENTS[moment], "annotator.select.select = late") as annotator:
        assert annotator.process.wait(timeout=30) == 0, annotator.log


def test_outside_of_a_cluster_it_says_what_is_missing(node: Node) -> None:
    ran = node.run(*LAUNCHER, "node", "annotate", check=False, env={})
    assert (ran.returncode, "KUBERNETES_SERVICE_HOST" in ran.stderr) == (1, True), ran
