"""What the agent answers by HTTP: ``/metrics`` to Prometheus, ``/healthz`` and ``/readyz`` to a kubelet."""

from __future__ import annotations

import socket
from threading import BoundedSemaphore, Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from cni_hostport.errors import NFTError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

    from prometheus_client import CollectorRegistry

    Check = Callable[[], str]
    """Says what is wrong; nothing if all is well."""

TIMEOUT = 10  # seconds for a client to say what it wants
MAX_CLIENTS = 16  # at a time; others are turned away
PLAIN = ("Content-Type", "text/plain; charset=utf-8")


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT

    def log_message(self, *_: object) -> None:
        """Keep silent: each scrape would be a line."""


class _Server(WSGIServer):
    clients = BoundedSemaphore(MAX_CLIENTS)

    def server_bind(self) -> None:
        """Bind, without a look-up of this host's name, which can take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if there are not too many; who asks from the node itself, as a kubelet does, gets one."""
        is_local = client_address[0] == request.getsockname()[0]
        if not is_local and not self.clients.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            Thread(
                target=self._answer, args=(request, client_address), kwargs={"is_local": is_local}, daemon=True
            ).start()
        except RuntimeError:  # the kernel has no more threads
            self._end(request, is_local=is_local)

    def _answer(self, request: Any, client_address: Any, *, is_local: bool) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:
            pass  # a client that went away, or said nothing
        finally:
            self._end(request, is_local=is_local)

    def _end(self, request: Any, *, is_local: bool) -> None:
        self.shutdown_request(request)
        if not is_local:
            self.clients.release()

    def handle_error(self, *_: object) -> None:
        """Keep silent of a client that went away."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def start(address: str, port: int, registry: CollectorRegistry, checks: dict[str, Check]) -> None:
    """Answer in a thread from now on; ``checks`` has those that are asked by path.

    Raises ``OSError`` naming the address if it cannot be listened on.
    """
    metrics = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        try:
            if path == "/metrics":
                page: Iterable[bytes] = metrics(environ, start_response)
                return page
            if path not in checks:
                status, text = "404 Not Found", f"There are {', '.join(['/metrics', *checks])}."
            elif wrong := checks[path]():
                status, text = "503 Service Unavailable", wrong
            else:
                status, text = "200 OK", "ok"
        except (NFTError, OSError) as error:
            status, text = "500 Internal Server Error", str(error)
        start_response(status, [PLAIN])
        return [f"{text}\n".encode(errors="backslashreplace")]

    server_class = _Server6 if ":" in address else _Server
    try:
        server = server_class((address, port), _Handler)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen there: {error.strerror}", f"{address} port {port}") from error
    server.set_app(answer)
    Thread(target=server.serve_forever, daemon=True).start()
