from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from dynamic_ports import asking
from lab import BRIDGE4, LAUNCHER, NODE4, Node, config, mapping
from prometheus_client.parser import text_string_to_metric_families as parsed

if TYPE_CHECKING:
    from collections.abc import Iterator

Samples = dict[str, dict[frozenset[str], float]]
PORT = 9100
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in parsed(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.values())] = sample.value
    return found


def measured(node: Node) -> Samples:
    ran = node.run(*LAUNCHER, "metrics")
    assert ran.stderr == ""
    return samples(ran.stdout)


def of(*labels: str) -> frozenset[str]:
    return frozenset(labels)


NOTHING = {of("alive"): 0, of("gone"): 0, of("unknown"): 0}


@contextlib.contextmanager
def serving(node: Node, listen: str) -> Iterator[str]:
    served = subprocess.Popen(
        ["nsenter", f"--net={node.path}", *LAUNCHER, "metrics", "--listen", listen], stderr=subprocess.PIPE, text=True
    )
    try:
        assert served.stderr is not None
        with served.stderr as lines:
            yield lines.readline().strip()
    finally:
        served.kill()
        served.wait()


def scrape(node: Node, address: str = "127.0.0.1") -> Samples:
    with node.socket("tcp", address) as asking:
        asking.settimeout(10)
        asking.connect((address, PORT))
        asking.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        head, _, body = asking.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.splitlines()[0].split()[1] == b"200", head
    return samples(body.decode())


def test_a_node_without_a_table_has_no_mappings_and_no_holders(node: Node) -> None:
    assert measured(node) == {"hostport_holders": NOTHING}
    assert node.nft("list ruleset") == ""


def test_mappings_holders_and_connections_are_counted(node: Node) -> None:
    pod, absent = node.pod(), node.pod(4)
    pod.serve("tcp", 80, "web")
    asked = config(pod, mapping(8080), mapping(53, 53, "udp"), mapping(81, hostIP=NODE4))
    assert node.cni("ADD", pod, asked, ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web").code == 0
    node.add(absent, mapping(9090), name="back")
    absent.remove()
    for _ in range(3):
        node.client.ask("tcp", NODE4, 8080)
    pod_labels, gone_labels = ("shop/web", pod.id, "eth0", "pods"), ("", absent.id, "eth0", "back")
    assert measured(node) == {
        "hostport_mappings": {
            of("tcp", "ipv4"): 3, of("tcp", "ipv6"): 1, of("udp", "ipv4"): 1, of("udp", "ipv6"): 1,
        },
        "hostport_dynamic_ports": {
            of("tcp", "ipv4"): 0, of("tcp", "ipv6"): 0, of("udp", "ipv4"): 0, of("udp", "ipv6"): 0,
        },
        "hostport_holders": NOTHING | {of("alive"): 1, of("gone"): 1},
        "hostport_connections_total": {
            of("tcp", "0.0.0.0", "8080", *pod_labels): 3,
            of("tcp", "::", "8080", *pod_labels): 0,
            of("udp", "0.0.0.0", "53", *pod_labels): 0,
            of("udp", "::", "53", *pod_labels): 0,
            of("tcp", NODE4, "81", *pod_labels): 0,
            of("tcp", "0.0.0.0", "9090", *gone_labels): 0,
        },
    }  # fmt: skip


def test_dynamic_ports_are_counted_among_the_others(node: Node) -> None:
    node.add(node.pod(), **asking("80, 81, 9000/udp", mapping(8080)))
    found = measured(node)
    assert found["hostport_mappings"] == {
        of("tcp", "ipv4"): 3, of("tcp", "ipv6"): 3, of("udp", "ipv4"): 1, of("udp", "ipv6"): 1,
    }  # fmt: skip
    assert found["hostport_dynamic_ports"] == {
        of("tcp", "ipv4"): 2, of("tcp", "ipv6"): 2, of("udp", "ipv4"): 1, of("udp", "ipv6"): 1,
    }  # fmt: skip
    assert len(found["hostport_connections_total"]) == 8


def test_each_family_says_what_it_counts_and_how(node: Node) -> None:
    node.add(node.pod(4), mapping(8080))
    families = {family.name: family for family in parsed(node.run(*LAUNCHER, "metrics").stdout)}
    assert {name: family.type for name, family in families.items()} == {
        "hostport_mappings": "gauge", "hostport_dynamic_ports": "gauge", "hostport_holders": "gauge",
        "hostport_connections": "counter",
    }  # fmt: skip
    assert all(family.documentation for family in families.values())
    [sample] = families["hostport_connections"].samples
    assert sorted(sample.labels) == [
        "container_id", "host_ip", "host_port", "interface", "network", "pod", "protocol",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ['"', "\\", "\\n", "\n", '"} 1\nevil 2\n', "{}=,", "\u00e9"], ids=ascii)
def test_a_hostile_name_stays_within_its_label(node: Node, text: str) -> None:
    pod = node.pod(4)
    args = f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web{text}"
    assert node.cni("ADD", pod, config(pod, mapping(8080)), ARGS=args).code == 0
    [listed] = json.loads(node.run(*LAUNCHER, "list", "--json").stdout)
    assert listed["pod"].startswith("shop/web")
    found = measured(node)
    assert set(found) == {
        "hostport_mappings", "hostport_dynamic_ports", "hostport_holders", "hostport_connections_total",
    }  # fmt: skip
    assert [listed["pod"] in labels for labels in found["hostport_connections_total"]] == [True]


def test_a_comment_that_somebody_wrote_by_hand_stays_within_its_label(node: Node) -> None:
    node.add(node.pod(4), mapping(8080))
    node.nft_file(r"""
        add chain inet hostport dnat-mine { counter comment "a\b\n{c}=1"; }
        add element inet hostport hostports { ipv4 . tcp . 81 comment "x\y e\0 z" : goto dnat-mine }
    """)
    connections = measured(node)["hostport_connections_total"]
    assert of("tcp", "0.0.0.0", "81", r"a\b\n{c}=1", r"x\y", r"e\0", "mine") in connections


def test_a_text_file_is_replaced_at_once_and_readable_for_everybody(node: Node, tmp_path: Path) -> None:
    node.add(node.pod(4), mapping(8080))
    written = tmp_path / "hostport.prom"
    written.write_text("old")
    old = written.open()
    node.run("sh", "-c", 'umask 077; exec "$@"', "sh", *LAUNCHER, "metrics", "--textfile", str(written))
    assert samples(written.read_text())["hostport_mappings"] == {of("tcp", "ipv4"): 1}
    assert written.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["hostport.prom"]
    with old:
        assert old.read() == "old"


def test_a_text_file_is_never_seen_incomplete(node: Node, tmp_path: Path) -> None:
    node.add(node.pod(), *map(mapping, range(8000, 8100)))
    written, done, seen = tmp_path / "hostport.prom", threading.Event(), set[int]()

    def look() -> None:
        while not done.is_set():
            for path in tmp_path.glob("*.prom"):
                seen.add(len(samples(path.read_text())["hostport_connections_total"]))

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(5):
        node.run(*LAUNCHER, "metrics", f"--textfile={written}")
    done.set()
    looking.join()
    assert seen == {200}


def test_a_text_file_is_written_through_a_link_to_it(node: Node, tmp_path: Path) -> None:
    link, written = tmp_path / "hostport.prom", tmp_path / "collector"
    link.symlink_to(written)
    node.run(*LAUNCHER, "metrics", f"--textfile={link}")
    assert samples(written.read_text()) == {"hostport_holders": NOTHING}


@pytest.mark.parametrize("where", ["/dev/null", "/run", "/dev/stdout"])
def test_only_a_file_is_replaced(node: Node, where: str) -> None:
    before = os.lstat(where)
    ran = node.run(*LAUNCHER, "metrics", "--textfile", where, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1] == f"Error: Invalid value for '--textfile': '{where}' is not a file"
    assert os.path.samestat(before, os.lstat(where))


def test_a_text_file_that_cannot_be_written_is_named(node: Node) -> None:
    ran = node.run(*LAUNCHER, "metrics", "--textfile", "/nowhere/hostport.prom", check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "Error: /nowhere/hostport.prom: cannot write it: No such file or directory\n"


def test_scrapes_are_answered_at_the_same_time_and_after_the_ruleset_was_flushed(node: Node) -> None:
    node.add(node.pod(), mapping(8080))
    with serving(node, str(PORT)) as output, ThreadPoolExecutor(8) as threads:
        assert output == f"Listening on http://127.0.0.1:{PORT}/metrics"
        first = scrape(node)
        assert len(first["hostport_connections_total"]) == 2
        assert list(threads.map(lambda _: scrape(node), range(40))) == [first] * 40
        node.nft("flush ruleset")
        assert scrape(node) == {"hostport_holders": NOTHING}
        node.add(node.pod(), mapping(8080), mapping(8081))
        assert len(scrape(node)["hostport_connections_total"]) == 4
        assert node.client.is_silent("tcp", NODE4, PORT)


@pytest.mark.parametrize(
    ("listen", "address"),
    [(f"{BRIDGE4}:{PORT}", BRIDGE4), (f"[::1]:{PORT}", "::1"), (f"localhost:{PORT}", "127.0.0.1")],
)
def test_scrapes_are_answered_on_the_given_address(node: Node, listen: str, address: str) -> None:
    with serving(node, listen) as output:
        assert output == f"Listening on http://{listen}/metrics"
        assert scrape(node, address) == {"hostport_holders": NOTHING}


def test_a_port_that_is_in_use_is_named(node: Node) -> None:
    with node.socket("tcp", "127.0.0.1") as other:
        other.bind(("127.0.0.1", PORT))
        other.listen()
        ran = node.run(*LAUNCHER, "metrics", "--listen", str(PORT), check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"Error: 127.0.0.1:{PORT}: cannot listen there: Address already in use\n"


@pytest.mark.parametrize("host", ["203.0.113.1", "300.1.1.1", "a..b", "l" * 70])
def test_an_address_that_is_not_the_nodes_is_named(node: Node, host: str) -> None:
    ran = node.run(*LAUNCHER, "metrics", "--listen", f"{host}:{PORT}", check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"Error: {host}:{PORT}: cannot listen there: ")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "listen", ["0", "65536", "http", "", ":9100", "127.0.0.1", "127.0.0.1:", "::1:9100", "[::1]", "-1"]
)
def test_what_is_no_port_to_listen_on_is_refused(node: Node, listen: str) -> None:
    ran = node.run(*LAUNCHER, "metrics", f"--listen={listen}", check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"'{listen}' is not [HOST:]PORT, as in 9100, 192.0.2.1:9100 or [::1]:9100" in ran.stderr


def test_a_file_and_a_port_do_not_go_together(node: Node, tmp_path: Path) -> None:
    ran = node.run(*LAUNCHER, "metrics", "--listen", "9100", "--textfile", str(tmp_path / "x"), check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1] == "Error: --textfile and --listen do not go together"


def test_nothing_is_written_or_served_without_the_privilege_to_read_the_ruleset(node: Node, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for options in ([], ["--listen", str(PORT)], ["--textfile", str(tmp_path / "hostport.prom")]):
        ran = node.run(*NOBODY, *LAUNCHER, "metrics", *options, check=False)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr == "Error: 'hostport metrics' uses nftables, which needs root (CAP_NET_ADMIN)\n"
    assert not list(tmp_path.iterdir())


def test_scrapes_are_answered_again_after_libnftables_was_ended(node: Node) -> None:
    with serving(node, f"127.0.0.1:{PORT}"):
        scrape(node)
        listed = subprocess.check_output(["ip", "netns", "pids", node.name], text=True).split()
        [library] = [process for process in listed if _parent(process) in listed]
        os.kill(int(library), signal.SIGKILL)
        with contextlib.suppress(AssertionError):
            scrape(node)
        assert [scrape(node) for _ in range(4)] == [{"hostport_holders": NOTHING}] * 4


def _parent(process: str) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
