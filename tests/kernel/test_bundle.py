"""The bundle: everything works where there is nothing else, and nothing of a machine's is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import bundle
import pytest
from api_server import ADDRESS, PORT, FakeAPIServer
from api_server import Pod as FakePod
from bare_root import EXECUTABLE, BareRoot
from go_tools import TOOLS, unavailable
from installation import Machine
from lab import NODE4, Node, config, mapping, require
from resident import eventually

from cni_hostport import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lab import Pod

BUSYBOX = "/bin/busybox"
SOCKET = "run/hostport.sock"
STATUS = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
# a machine that would have its programs load what it names
EVIL = "libnss_evil.so.2"
HOSTILE_FILES = {
    "/etc/ld.so.preload": "/usr/lib/evil.so\n",
    "/etc/nsswitch.conf": "".join(
        f"{name}: evil files\n" for name in ("group", "hosts", "networks", "passwd", "protocols", "services")
    ),
    "/etc/ssl/openssl.cnf": "openssl_conf = x\n",
}
HOSTILE_ENVIRONMENT = {
    "GCONV_PATH": "/usr/lib",
    "LANG": "C.UTF-8",
    "LD_LIBRARY_PATH": "/usr/lib:/lib",
    "LD_PRELOAD": "/usr/lib/evil.so",
    "LOCPATH": "/usr/lib/locale",
    "OPENSSL_CONF": "/etc/ssl/openssl.cnf",
    "PYTHONHOME": "/usr",
    "PYTHONPATH": "/usr/lib/python3",
    "XTABLES_LIBDIR": "/usr/lib/xtables",
}
# what else is opened: data, and what is named from a directory of /proc
DATA = re.compile(
    r"/(proc|sys|dev|run|var/run/secrets|var/lib/cni|etc/cni)(/|$)|/$|[\w-]+(/[\w-]+)*$|"
    r"/etc/(connlabel\.conf|group|host\.conf|hosts|iproute2/\w+|localtime|networks|nsswitch\.conf|passwd|protocols|"
    r"resolv\.conf|services)$|/usr/share/(zoneinfo|iproute2)/"
)
OPENED = re.compile(r'(?:openat\(\w+, |open\(|execve\()"([^"]*)".* = \d+$', re.MULTILINE)
FOREIGN_RULE = "iptables-nft -A FORWARD -p tcp -m comment --comment evil -m multiport --dports 80,81 -j DROP"
EVERY_MODULE = """
import importlib, pkgutil, sys
sys.path.insert(0, f"{sys.prefix}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
import cni_hostport, pyroute2
for module in pkgutil.walk_packages(cni_hostport.__path__, "cni_hostport."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
pyroute2.IPRoute, pyroute2.DiagSocket
"""


@pytest.fixture(scope="module")
def unpacked(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that is in the archive."""
    require(shutil.which("dpkg-query"), "bundles are built on Debian")
    top = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["tar", "-xzf", bundle.archive(), "-C", top], check=True)
    return top / f"hostport-{__version__}"


@pytest.fixture(scope="module", params=["an empty root", "a busybox root"])
def root(
    unpacked: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BareRoot]:
    files = {}
    if request.param == "a busybox root":
        require(shutil.which("busybox"), "needs busybox")
        files = {BUSYBOX: Path(str(shutil.which("busybox"))).read_bytes()}
    with BareRoot(tmp_path_factory.mktemp("root") / "root", unpacked, files=files) as made:
        yield made


@pytest.fixture
def node(root: BareRoot) -> Iterator[Node]:
    with Node(root.launcher) as made:
        yield made


@pytest.fixture(scope="module")
def hostile(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareRoot]:
    """This machine's root, with libraries that it would have all its programs load."""
    require(shutil.which("strace"), "needs strace")
    directory = tmp_path_factory.mktemp("hostile")
    library = directory / EVIL
    subprocess.run(["cc", "-shared", "-xc", os.devnull, "-o", library], check=True)
    places = ("/usr/lib/evil.so", f"/usr/lib/{EVIL}", f"/usr/lib/x86_64-linux-gnu/{EVIL}")
    files = HOSTILE_FILES | dict.fromkeys(places, library.read_bytes())
    with BareRoot(directory / "root", unpacked, "/", files) as made:
        yield made


@contextmanager
def serving(command: Sequence[str], socket: Path) -> Iterator[None]:
    """Have the resident process run that this command starts."""
    socket.unlink(missing_ok=True)
    with subprocess.Popen([*command, "serve"], env={}) as process:
        try:
            assert eventually(socket.exists)
            yield
        finally:
            end(process)


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process, and one that strace has started in its place: strace itself waits for that."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    is_traced = Path(f"/proc/{process.pid}/comm").read_text() == "strace\n"
    for number in map(int, children) if is_traced else [process.pid]:
        os.kill(number, signal.SIGTERM)


def on(node: Node, command: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net={node.path}", *command]


def life(node: Node, pod: Pod) -> str:
    """See a pod have its host port from its ADD to its DEL, and return what ``list`` printed meanwhile."""
    pod.serve("tcp", 80, "web")
    call = config(pod, mapping(8080))
    assert node.cni("ADD", pod, call).json["ips"]
    assert node.client.ask("tcp", NODE4, 8080) == "web 192.0.2.2"
    assert node.cni("CHECK", pod, call).status == 0
    listed = node.run(*node.launcher, "list").stdout
    assert node.cni("DEL", pod, call).status == 0
    assert node.client.is_silent("tcp", NODE4, 8080)
    return listed


def test_all_operations_work(node: Node) -> None:
    status = node.cni("STATUS", None, STATUS)
    assert (status.status, status.stdout, status.stderr) == (0, "", "")
    pod = node.pod(4)
    assert f"0.0.0.0:8080/tcp  {pod.ip4}:80" in life(node, pod)
    assert node.footprint(pod) == {}


def test_the_commands_for_people_work(node: Node) -> None:
    node.add(node.pod(4), mapping(8080))
    assert "leads to" in node.run(*node.launcher, "explain", "8080", check=False).stdout
    assert "nftables has all that host ports need" in node.run(*node.launcher, "doctor").stdout
    assert "hostport_mappings{" in node.run(*node.launcher, "metrics").stdout
    assert node.run(*node.launcher, "--version").stdout == f"hostport, version {__version__}\n"


def test_the_resident_process_runs_calls(root: BareRoot, node: Node, tmp_path: Path) -> None:
    require(shutil.which("strace"), "needs strace")
    trace, pod = tmp_path / "trace", node.pod(4)

    def is_warm() -> bool:
        node.add(pod, mapping(8080))
        return "execve" in trace.read_text() and "ld-linux" not in trace.read_text()

    with serving(on(node, root.launcher), root.inside / SOCKET):
        node.launcher = [
            "env",
            f"PATH={os.defpath}",
            "strace",
            "-f",
            "-etrace=execve",
            "-o",
            str(trace),
            *root.launcher,
        ]
        assert eventually(is_warm)


def test_every_module_can_be_imported(root: BareRoot, unpacked: Path) -> None:
    loader = next((unpacked / "lib").glob("ld-linux*")).name
    python = [f"/hostport/lib/{loader}", "--library-path", "/hostport/lib", "--argv0", "/hostport/bin/python3"]
    subprocess.run(root.command(*python, "/hostport/bin/python3", "-IS", "-c", EVERY_MODULE), check=True)


def test_it_works_wherever_it_lies(unpacked: Path, tmp_path: Path) -> None:
    moved = tmp_path / "höst port" / "moved"
    shutil.copytree(unpacked, moved)
    link = tmp_path / "hostport"
    link.symlink_to(moved / "bin" / "hostport")
    with Node([str(link)]) as node:
        assert "8080" in life(node, node.pod(4))


def test_an_executable_without_its_bundle_says_so(unpacked: Path, tmp_path: Path) -> None:
    alone = shutil.copy(unpacked / "bin" / "hostport", tmp_path)
    ran = subprocess.run([alone], capture_output=True, text=True, check=False, env={"CNI_COMMAND": "VERSION"})
    assert (ran.returncode, json.loads(ran.stdout)["code"]) == (1, 5)
    assert "cannot be loaded: No such file or directory" in ran.stdout


def annotate(node: Node, root: BareRoot, command: Sequence[str], directory: Path) -> None:
    """See a pod annotated, by TLS."""
    pod = node.pod(4)
    names = f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID={pod.name}"
    call = config(pod, dynamicPorts="40000-40999", runtimeConfig={"dynamicPorts": "80"})
    assert node.cni("ADD", pod, call, ARGS=names).status == 0
    with FakeAPIServer(node, directory) as server:
        server.pods["shop/web"] = FakePod(pod.name)
        account = root.inside / "run" / "secrets" / "kubernetes.io" / "serviceaccount"
        shutil.copytree(server.account, account)
        variables = [f"-EKUBERNETES_SERVICE_HOST={ADDRESS}", f"-EKUBERNETES_SERVICE_PORT={PORT}"]
        annotating = on(node, [*command[:-1], *variables, command[-1], "node", "annotate"])
        with subprocess.Popen(annotating) as process:
            try:
                assert eventually(lambda: server.pods["shop/web"].annotations)
            finally:
                end(process)
    assert node.cni("DEL", pod, call, ARGS=names).status == 0


def test_nothing_of_a_machine_is_loaded(hostile: BareRoot, tmp_path: Path) -> None:
    variables = (f"-E{name}={value}" for name, value in HOSTILE_ENVIRONMENT.items())
    strace = ["strace", "-f", "-e", "trace=open,openat,execve", "-A", "-o", "/run/trace"]
    traced = hostile.command(*strace, *variables, EXECUTABLE)
    with Node(traced) as node:
        assert node.cni("STATUS", None, STATUS).status == 0
        life(node, node.pod(4))
        node.run(*FOREIGN_RULE.split())
        node.add(node.pod(4), mapping(8080))
        for command in ("list", "explain 8080", "doctor", "metrics", "restore"):
            node.run(*traced, *command.split(), check=False)
        listening = on(node, [*traced, "metrics", "--listen", "localhost:9100"])
        with subprocess.Popen(listening, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            assert "Listening" in process.stderr.readline()
            end(process)
        with serving(on(node, traced), hostile.inside / SOCKET):
            node.add(node.pod(4), mapping(8081))
        annotate(node, hostile, traced, tmp_path)
    opened = set(OPENED.findall((hostile.inside / "run" / "trace").read_text()))
    own = ("lib/libnftables.so.1", "lib/xtables/libxt_multiport.so", "lib/libssl.so.3")
    assert {f"/hostport/{path}" for path in own} <= opened
    assert {path for path in opened if not path.startswith("/hostport/") and not DATA.match(path)} == set()


def answers(launcher: Sequence[str]) -> list[str]:
    """Return what an installation says in the course of events, with the same names whoever is asked."""
    with Node(launcher) as node:
        web, other = node.pod(4), node.pod(4)
        node.run(*FOREIGN_RULE.split())
        calls = [
            node.cni(command, pod, config(pod, mapping(port)), CONTAINERID=pod.ip4)
            for command, pod, port in [
                ("ADD", web, 8080),
                ("ADD", other, 8080),
                ("ADD", other, 70000),
                ("CHECK", web, 8080),
                ("CHECK", web, 8081),
            ]
        ]
        said = [f"{call.status} {call.stdout} {call.stderr}" for call in calls]
        for command in (
            "list --json",
            "explain 8080 --from 192.0.2.2",
            "doctor",
            "metrics",
            "list --nonsense",
            "--help",
        ):
            ran = node.run(*launcher, *command.split(), check=False)
            said.append(f"{ran.returncode} {ran.stdout} {ran.stderr}")
        said.append(node.ruleset())
        said.append(str(node.cni("DEL", web, config(web, mapping(8080)), CONTAINERID=web.ip4)))
    return [re.sub(r"@[\d:]+ \d+:\d+ /|\bhp[0-9a-f]+-[0-9a-f]+-", "", text) for text in said]


def test_it_gives_the_answers_of_an_installation(unpacked: Path, installed_machine: Machine) -> None:
    assert answers([str(unpacked / "bin" / "hostport")]) == answers([str(installed_machine.executable)])


@pytest.fixture(scope="module")
def output(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``install.sh`` builds of the same files another time."""
    directory = tmp_path_factory.mktemp("built")
    (directory / "machine").mkdir()
    source = Machine(directory / "machine").source  # whose manifests it changes
    command = [str(source / "install.sh"), "--bundle", str(directory), "--image", "localhost/hostport"]
    environment = bundle.image_store(directory)
    if not unavailable("nfpm", "nfpm"):
        command += ["--packages", str(directory / "packages")]
        environment["NFPM"] = str(TOOLS / "nfpm")
    built = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    (directory / "said").write_text(built.stderr)
    return directory


def test_the_same_files_make_the_same_bundle(output: Path) -> None:
    archive = bundle.archive()
    assert (output / archive.name).read_bytes() == archive.read_bytes()


def test_the_archive_is_one_directory_of_root_s(unpacked: Path) -> None:
    archive = bundle.archive()
    assert re.fullmatch(rf"hostport-{re.escape(__version__)}-linux-(amd64|arm64)\.tar\.gz", archive.name)
    with tarfile.open(archive) as tar:
        entries = tar.getmembers()
    assert {entry.name.partition("/")[0] for entry in entries} == {unpacked.name}
    assert {(entry.uid, entry.gid, entry.mtime) for entry in entries} == {(0, 0, 0)}
    assert {entry.mode for entry in entries} == {0o755, 0o644}
    assert {path.name for path in unpacked.iterdir()} == {
        ".hostport-installation", "DIGEST", "bin", "lib", "licences"
    }  # fmt: skip
    assert {path.name for path in (unpacked / "bin").iterdir()} == {"hostport", "python3"}


def test_it_is_small(unpacked: Path) -> None:
    assert bundle.archive().stat().st_size < 22_000_000
    assert sum(path.stat().st_size for path in unpacked.rglob("*")) < 62_000_000


def test_the_digest_is_that_of_what_is_in_it(unpacked: Path) -> None:
    digests = [
        (directory / "DIGEST").read_text() for directory in (unpacked, bundle.directory(), bundle.directory("9.9"))
    ]
    assert re.fullmatch(r"[0-9a-f]{12}\n", digests[0])
    assert digests[0] == digests[1] != digests[2]


def test_it_has_the_licences_of_what_is_in_it(unpacked: Path) -> None:
    licences = {path.name for path in (unpacked / "licences").iterdir()}
    assert licences >= {
        "LICENSE",
        "libc6.txt",
        "libnftables1.txt",
        "libpython3.11-stdlib.txt",
        "python3.11-minimal.txt",
    }
    packages = {path.partition("-")[0] for path in licences if path.endswith(".dist-info")}
    assert packages >= {"click", "pip_nftables", "prometheus_client", "psutil", "pydantic", "pyroute2", "rich"}


def test_the_image_has_the_bundle_alone_and_says_its_version(unpacked: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", bundle.image_archive(), "-C", tmp_path], check=True)
    [image] = json.loads((tmp_path / "manifest.json").read_text())
    assert image["RepoTags"] == [f"localhost/hostport:{__version__}"]
    configuration = json.loads((tmp_path / image["Config"]).read_text())["config"]
    assert configuration["Entrypoint"] == ["/hostport/bin/hostport"]
    assert configuration["Labels"]["org.opencontainers.image.version"] == __version__
    [layer] = image["Layers"]
    with tarfile.open(tmp_path / layer) as tar:
        files = {entry.name for entry in tar if entry.isfile()}
    assert files == {f"hostport/{path.relative_to(unpacked)}" for path in unpacked.rglob("*") if path.is_file()}


def test_the_manifests_name_the_image_by_its_content(unpacked: Path, output: Path) -> None:
    tag = f"{__version__}-{(unpacked / 'DIGEST').read_text().strip()}"
    said = (output / "said").read_text()
    assert f"Built the image localhost/hostport:{tag}, which conf/kubernetes names now" in said
    assert "ctr -n k8s.io images import" in said
    component = (output / "machine" / "source" / "conf" / "kubernetes" / "image" / "kustomization.yaml").read_text()
    assert component.endswith(f'    newName: localhost/hostport\n    newTag: "{tag}"\n')


def test_packages_are_made_with_nfpm(output: Path) -> None:
    require(not (need := unavailable("nfpm", "nfpm")), f"needs {need}")
    assert {path.suffix for path in (output / "packages").iterdir()} == {".deb", ".rpm"}
    assert f"Built packages in {output / 'packages'}" in (output / "said").read_text()
