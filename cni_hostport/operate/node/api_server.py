"""The API server of the cluster in which this process runs in a pod."""

from __future__ import annotations

import json
import os
import ssl
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cni_hostport import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

# where a pod has them: kubernetes.io/docs/tasks/run-application/access-api-from-pod
HOST, PORT = "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = 10.0  # seconds for each step of a request
HEADERS = {
    "Content-Type": "application/merge-patch+json",
    # of the object that was changed, nothing but its metadata comes back
    "Accept": "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
    "User-Agent": f"hostport/{__version__}",
}


class UnreachableError(OSError):
    """No request can be sent, whatever it is about."""


@dataclass(frozen=True)
class Answer:
    """The answer to a request: its HTTP status, and the object of the kind ``Status`` where it was refused.

    ``retry_after`` is for how many seconds the server wants to be left alone.
    """

    status: int
    reason: Mapping[str, Any]
    retry_after: float

    @property
    def message(self) -> str:
        """Why the request was refused."""
        return f"{self.status}: {self.reason.get('message') or 'no reason is given'}"

    @property
    def wrong_fields(self) -> set[str]:
        """The fields that were refused, as in ``metadata.uid``."""
        try:
            return {str(cause["field"]) for cause in self.reason["details"]["causes"] if "field" in cause}
        except (KeyError, TypeError):
            return set()  # whoever answered is no API server, or gives no reason


class APIServer:
    """The API server, with one connection that stays open until ``close``."""

    def __init__(self, host: str, port: int) -> None:
        """Connect not yet."""
        self._host, self._port = host, port
        self._connection: HTTPSConnection | None = None

    @classmethod
    def of_this_pod(cls) -> Self:
        """Return that of the cluster; raises ``OSError`` where there is none."""
        try:
            return cls(os.environ[HOST], int(os.environ[PORT]))
        except (KeyError, ValueError):
            msg = f"this is no container of a cluster: {HOST} and {PORT} do not name its API server"
            raise OSError(msg) from None

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection:
            self._connection.close()
        self._connection = None

    def merge(self, path: str, document: Mapping[str, Any]) -> Answer:
        """Change an object by a merge patch (RFC 7396).

        Raises ``UnreachableError``, or another ``OSError`` if this request gets no answer.
        """
        is_used = self._connection is not None
        try:
            return self._merge(path, document)
        except ConnectionError:
            if not is_used:
                raise
            return self._merge(path, document)  # it was closed since the last request; a patch can be repeated

    def _merge(self, path: str, document: Mapping[str, Any]) -> Answer:
        try:
            # the account's files are replaced as time goes by
            token = _token()
            connection = self._connection = self._connection or self._connect()
        except (OSError, ValueError) as error:
            raise UnreachableError(str(error)) from error
        try:
            connection.request(
                "PATCH", path, json.dumps(document).encode(), {**HEADERS, "Authorization": f"Bearer {token}"}
            )
            response = connection.getresponse()
            text = response.read()
            if response.will_close:
                self.close()
        except (HTTPException, OSError, ValueError) as error:
            self.close()
            if isinstance(error, OSError):
                raise
            raise OSError(str(error) or type(error).__name__) from error
        seconds = response.headers.get("Retry-After", "")
        return Answer(response.status, _object(text), float(seconds) if seconds.isdecimal() else 0.0)

    def _connect(self) -> HTTPSConnection:
        context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
        # Python's default since 3.13, which certificates of many clusters do not satisfy
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        connection = HTTPSConnection(self._host, self._port, timeout=TIMEOUT, context=context)
        connection.connect()
        return connection


def _token() -> str:
    """Read the account's token; raises ``OSError``, and ``ValueError`` without its text, which is a secret."""
    token = (ACCOUNT / "token").read_text(errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable():
        msg = f"{ACCOUNT}/token holds no token"
        raise ValueError(msg)
    return token


def _object(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
