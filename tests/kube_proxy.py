"""kube-proxy on a node, with an API server that knows nothing but Services and where they lead."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

from go_tools import TOOLS
from lab import NODE4, NODE6
from resident import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lab import Node, Pod

PORT = 6443
SERVICES, SLICES = "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"
KINDS = {
    "/api/v1/nodes": "NodeList",
    SERVICES: "ServiceList",
    SLICES: "EndpointSliceList",
    "/apis/networking.k8s.io/v1/servicecidrs": "ServiceCIDRList",
}
FAMILIES = {"IPv4": (4, "10.96.0.", NODE4), "IPv6": (6, "fd00:96::", NODE6)}
TABLES = {"nftables": "table ip6 kube-proxy", "iptables": "KUBE-NODEPORTS"}


class Services:
    """What the API server knows: each Service leads to one port of one pod, in both families."""

    def __init__(self) -> None:
        addresses = [{"type": "InternalIP", "address": address} for address in (NODE4, NODE6)]
        self.items: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self.items["/api/v1/nodes"] = [
            {"metadata": {"name": "node", "uid": "node"}, "status": {"addresses": addresses}}
        ]

    def add(
        self,
        name: str,
        pod: Pod,
        port: int,
        target: int = 80,
        *,
        node_port: int = 0,
        ingress: Sequence[str] = (),
    ) -> None:
        """Add a Service of the next ClusterIPs, by a node's port or on a load balancer's addresses if there are any."""
        number = len(self.items[SERVICES]) + 10
        ports = [{"name": "main", "port": port, "protocol": "TCP", "nodePort": node_port or None}]
        cluster_ips = [f"{prefix}{number}" for _, prefix, _ in FAMILIES.values()]
        self.items[SERVICES].append({
            "metadata": _metadata(name),
            "spec": {
                "type": "LoadBalancer" if ingress else "NodePort" if node_port else "ClusterIP",
                "clusterIP": cluster_ips[0],
                "clusterIPs": cluster_ips,
                "ipFamilies": list(FAMILIES),
                "ipFamilyPolicy": "RequireDualStack",
                "externalTrafficPolicy": "Cluster",
                "internalTrafficPolicy": "Cluster",
                "sessionAffinity": "None",
                "ports": ports,
            },
            "status": {"loadBalancer": {"ingress": [{"ip": ip, "ipMode": "VIP"} for ip in ingress]}},
        })  # fmt: skip
        for family, address in (("IPv4", pod.ip4), ("IPv6", pod.ip6)):
            self.items[SLICES].append({
                "metadata": {
                    **_metadata(f"{name}-{family.lower()}"),
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": family,
                "endpoints": [{"addresses": [address], "conditions": {"ready": True}, "nodeName": "node"}],
                "ports": [{"name": "main", "port": target, "protocol": "TCP"}],
            })  # fmt: skip


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "namespace": "default", "uid": f"{name}-uid", "resourceVersion": "1"}


class KubeProxy:
    """kube-proxy on a node, in ``mode`` ``nftables`` or ``iptables``, which has set up all Services when it is made."""

    def __init__(self, node: Node, services: Services, directory: Path, mode: str) -> None:
        self._stop = threading.Event()
        with node.inside():
            self._server = ThreadingHTTPServer(("127.0.0.1", PORT), _handler(services, self._stop))
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        log = directory / f"kube-proxy-{mode}.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["nsenter", f"--net={node.path}", TOOLS / "kube-proxy", f"--config={_configuration(directory, mode)}"],
                env=os.environ | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, stdout=output, stderr=output,
            )  # fmt: skip
        targets = {endpoint["endpoints"][0]["addresses"][0] for endpoint in services.items[SLICES]}

        def is_complete() -> bool:
            ruleset = node.nft("list ruleset")
            return TABLES[mode] in ruleset and all(target in ruleset for target in targets)

        if not eventually(is_complete, 60):
            self.stop()
            raise AssertionError(log.read_text()[-4000:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it; its rules stay."""
        self._process.kill()
        self._process.wait()
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def proxy_configuration(mode: str, node: str, kubeconfig: str, pods: str) -> dict[str, Any]:
    """Return the configuration of a kube-proxy; ``pods`` are the networks of all pods, separated by commas."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "hostnameOverride": node,
        "clusterCIDR": pods,
        "clientConnection": {"kubeconfig": kubeconfig, "contentType": "application/json"},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "nftables": {"minSyncPeriod": "0s"},
        "iptables": {"minSyncPeriod": "0s"},
    }


def _configuration(directory: Path, mode: str) -> Path:
    kubeconfig, configuration = directory / "kubeconfig", directory / f"kube-proxy-{mode}.json"
    server = {"name": "node", "cluster": {"server": f"http://127.0.0.1:{PORT}"}}
    context = {"name": "node", "context": {"cluster": "node", "user": ""}}
    kubeconfig.write_text(
        json.dumps({"kind": "Config", "clusters": [server], "contexts": [context], "current-context": "node"})
    )
    configuration.write_text(
        json.dumps(proxy_configuration(mode, "node", str(kubeconfig), "10.88.0.0/24,fd00:88::/64"))
    )
    return configuration


def _handler(services: Services, stop: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            self.send_response(200 if path in KINDS else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if "watch=" in query:
                self.wfile.flush()
                stop.wait()
            elif path in KINDS:
                group, version = path.split("/")[-3:-1]
                api = version if group == "api" else f"{group}/{version}"
                listed = {"metadata": {"resourceVersion": "1"}, "items": services.items[path]}
                self.wfile.write(json.dumps({"apiVersion": api, "kind": KINDS[path], **listed}).encode())

        def do_POST(self) -> None:
            """Take an event, and forget it."""
            event = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(201)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(event)

        def log_message(self, *_: object) -> None: ...

    return Handler
