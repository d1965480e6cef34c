"""The control plane of a cluster: etcd, the API server, the controller manager, the scheduler, and kubectl."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
from typing import TYPE_CHECKING, Any

from go_tools import TOOLS
from lab import CLIENT4
from runtimes.host import SYSTEM_PATH, Processes, Program, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lab import Namespace

ETCD = "http://127.0.0.1:2379"
SERVER = f"https://{CLIENT4}:6443"
SERVICES = "10.96.0.0/16,fd00:96::/112"
ADMIN = "admin"
# the controllers and the scheduler are let do what they do by roles that the API server makes for these users
COMPONENTS = {"kube-controller-manager": "system:kube-controller-manager", "kube-scheduler": "system:kube-scheduler"}
USERS = {ADMIN: "system:masters", "system:kube-proxy": "", **dict.fromkeys(COMPONENTS.values(), "")}


def kubeconfig(user: str) -> dict[str, Any]:
    """Return the configuration of a client of the API server's."""
    cluster = {"server": SERVER, "insecure-skip-tls-verify": True}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": user, "user": {"token": f"token-{user}"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
        "current-context": "test",
    }


class Control(Processes):
    """A control plane at ``SERVER``; ``begin`` and ``complete`` start it, and nodes may be made between them."""

    def __init__(self, namespace: Namespace, nodes: Sequence[str], directory: Path) -> None:
        super().__init__(namespace)
        self._namespace = namespace
        self._directory = directory
        directory.mkdir()
        users = USERS | dict.fromkeys((f"system:node:{node}" for node in nodes), "system:nodes")
        with (directory / "tokens.csv").open("w") as tokens:
            csv.writer(tokens).writerows([f"token-{user}", user, user, group] for user, group in users.items())
        for user in users:
            self._kubeconfig(user).write_text(json.dumps(kubeconfig(user)))
        self.kubeconfig = self._kubeconfig(ADMIN)
        self._key = directory / "service-accounts.key"
        subprocess.run(
            ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self._key], check=True
        )

    def _kubeconfig(self, user: str) -> Path:
        return self._directory / f"{user.replace(':', '-')}.json"

    def log(self, program: str) -> Path:
        """Return the log of a program, by its name."""
        return self._directory / f"{program}.log"

    def _start(self, program: str, *options: str) -> Program:
        environment = {"PATH": SYSTEM_PATH}
        return self.start(program, TOOLS / program, *options, log=self.log(program), environment=environment)

    def begin(self) -> None:
        """Start the API server and its store, and do not wait for them."""
        self._start("etcd", "--data-dir=/var/lib/etcd", "--unsafe-no-fsync", "--listen-peer-urls=http://127.0.0.1:0")
        self._begin_to_serve()

    def _begin_to_serve(self) -> None:
        self._api_server = self._start(
            "kube-apiserver", f"--etcd-servers={ETCD}", f"--advertise-address={CLIENT4}",
            f"--cert-dir={self._directory}", f"--service-cluster-ip-range={SERVICES}",
            f"--token-auth-file={self._directory / 'tokens.csv'}", "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._key}", f"--service-account-signing-key-file={self._key}",
        )  # fmt: skip

    @contextlib.contextmanager
    def without_api_server(self) -> Iterator[None]:
        """Run the block after the API server was killed; start it again, and wait for it."""
        self._api_server.kill()
        try:
            yield
        finally:
            self._begin_to_serve()
            wait_for(self._is_ready, self.log("kube-apiserver"))

    def wait(self) -> None:
        """Wait for the API server."""
        wait_for(self._is_ready, self.log("kube-apiserver"))

    def complete(self) -> None:
        """Wait for the API server, and start the others."""
        self.wait()
        for program, user in COMPONENTS.items():
            self._start(
                program, f"--kubeconfig={self._kubeconfig(user)}", "--leader-elect=false",
                *(self._controller_options() if program == "kube-controller-manager" else ()),
            )  # fmt: skip

    def _controller_options(self) -> list[str]:
        return [
            "--use-service-account-credentials", f"--service-account-private-key-file={self._key}",
            f"--root-ca-file={self._directory / 'apiserver.crt'}", "--kube-api-qps=200", "--kube-api-burst=400",
        ]  # fmt: skip

    def _is_ready(self) -> bool:
        ready = self._namespace.run("curl", "--insecure", "--silent", "--fail", f"{SERVER}/readyz", check=False)
        return ready.stdout == "ok"

    def kubectl(self, *arguments: str | Path, check: bool = True, text: str | None = None) -> str:
        """Run kubectl as an administrator, with ``text`` as its standard input, and return what it prints."""
        command = [TOOLS / "kubectl", f"--kubeconfig={self.kubeconfig}", *arguments]
        ran = self._namespace.run(*command, check=False, input=text)
        assert not (check and ran.returncode), f"{command}: {ran.stderr}"
        return ran.stdout + (ran.stderr if ran.returncode else "")
