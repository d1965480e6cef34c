"""An established TCP connection through a host port, with both of its ends in the test's hands."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

from lab import PATIENCE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from lab import Namespace


class Conversation:
    """A client's connection to ``address`` and ``port`` that leads to a server's ``server_port``."""

    def __init__(self, client: Namespace, address: str, port: int, server: Namespace, server_port: int = 8888) -> None:
        self._closing = contextlib.ExitStack()
        self._client, self._address, self._port = client, address, port
        self._server, self._server_port = server, server_port

    def __enter__(self) -> Self:
        with self._server.socket("tcp", self._address) as listening:
            listening.bind(("", self._server_port))
            listening.listen()
            listening.settimeout(PATIENCE)
            self._asking = self._closing.enter_context(self._client.socket("tcp", self._address))
            self._asking.settimeout(PATIENCE)
            self._asking.connect((self._address, self._port))
            self._answering = self._closing.enter_context(listening.accept()[0])
            self._answering.settimeout(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def goes_on(self) -> bool:
        """Tell whether each end still hears the other."""
        return self.is_heard() and _hears(self._answering.send, self._asking)

    def is_heard(self, timeout: float = PATIENCE) -> bool:
        """Tell whether the server still hears the client."""
        self._answering.settimeout(timeout)
        return _hears(self._asking.send, self._answering)


def _hears(send: Callable[[bytes], int], hearing: socket.socket) -> bool:
    try:
        send(b"still there?")
        return hearing.recv(64) == b"still there?"
    except OSError:
        return False
