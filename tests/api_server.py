"""An API server that knows pods alone, and of these names, UIDs and annotations; and the account of its client."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from lab import Namespace

ADDRESS, PORT = "127.0.0.1", 6443
POD = re.compile(r"/api/v1/namespaces/([^/?]+)/pods/([^/?]+)/status\?fieldManager=hostport")
UID_CAUSE = {"reason": "FieldValueInvalid", "message": "field is immutable", "field": "metadata.uid"}


@dataclass
class Pod:
    """A pod, and what was written to it."""

    uid: str
    annotations: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    document: dict[str, Any]
    time: float = field(default_factory=time.monotonic)


class FakeAPIServer:
    """The server, at an address and ``PORT`` of a network namespace from ``start`` to ``stop``.

    ``refuse`` may answer in its place, by the name of the pod: with a status, or with 0 for no answer at all.
    """

    def __init__(self, namespace: Namespace, directory: Path, address: str = ADDRESS) -> None:
        self.address = address
        self.account = directory / "account"
        self.account.mkdir()
        self.pods: dict[str, Pod] = {}
        self.requests: list[Request] = []
        self.refuse: Callable[[str], int] = lambda _: 200
        self.reason: bytes | None = None  # in the place of what a refusal says
        self.retry_after = ""
        self._namespace = namespace
        self._server: ThreadingHTTPServer | None = None
        self._certificate = directory / "server.pem"
        self.rotate_token("first")
        self.rotate_certificate()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def rotate_token(self, token: str, *, tell: bool = True) -> None:
        """Accept another token and no more the one before, and give it to the client."""
        self.token = token
        if tell:
            self._give("token", f"{token}\n")

    def _give(self, name: str, text: str) -> None:
        """Replace a file of the account at once, as a kubelet does."""
        (self.account / "new").write_text(text)
        (self.account / "new").replace(self.account / name)

    def rotate_certificate(self) -> None:
        """Take another certificate, from the next start on, and give it to the client as that of the authority."""
        key = self._certificate.with_suffix(".key")
        command = [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-subj", "/CN=test", "-addext", f"subjectAltName=IP:{self.address}", "-keyout", str(key),
            "-out", str(self._certificate),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        self._give("ca.crt", self._certificate.read_text())
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self._certificate, key)

    def start(self) -> None:
        """Answer in threads."""
        handler = type("Handler", (_Handler,), {"api": self})
        with self._namespace.inside():
            self._server = _Server((self.address, PORT), handler)
        self._server.socket = self._context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Answer nobody, and close all connections."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def answer(self, request: Request) -> tuple[int, dict[str, Any]]:
        """Do what is asked, and return what is answered."""
        self.requests.append(request)
        match = POD.fullmatch(request.path)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"message": "Unauthorized"}
        if request.method != "PATCH" or not match:
            return 403, {"message": f"cannot {request.method} {request.path}"}
        name = f"{match[1]}/{match[2]}"
        status = self.refuse(name)
        if status != 200:
            return status, {"message": f"{name} is refused"}
        if name not in self.pods:
            return 404, {"message": "not found"}
        metadata = request.document["metadata"]
        if metadata["uid"] != self.pods[name].uid:
            return 422, {"message": "invalid", "details": {"causes": [UID_CAUSE]}}
        self.pods[name].annotations |= metadata["annotations"]
        return 200, {}


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        super().__init__(address, handler)

    def handle_error(self, *_: object) -> None:
        """Keep silent of clients that go away or do not trust this server."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: FakeAPIServer

    def log_message(self, *_: object) -> None:
        """Keep silent."""

    def handle_one_request(self) -> None:
        if self.api._server is not self.server:  # noqa: SLF001 - its own
            self.close_connection = True
            return
        super().handle_one_request()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, dict(self.headers), json.loads(body or b"{}"))
        status, document = self.api.answer(request)
        if self.api._server is not self.server:  # noqa: SLF001 - its own
            status = 0
        if not status:
            self.close_connection = True
            return
        text = json.dumps({"kind": "Status", **document}).encode()
        if self.api.reason is not None and status != 200:
            text = self.api.reason
        self.send_response(status)
        if self.api.retry_after and status in {429, 503}:
            self.send_header("Retry-After", self.api.retry_after)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PATCH = do_GET = do_DELETE = do_PUT = _answer  # noqa: N815 - http.server names them
