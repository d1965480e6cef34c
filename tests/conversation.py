"""An established TCP connection through a host port, with both of its ends in the test's hands."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from lab import Namespace, Pod


class Conversation:
    """A client's connection to ``address`` and ``port`` that leads to a pod's ``container_port``."""

    def __init__(self, client: Namespace, address: str, port: int, pod: Pod, container_port: int = 8888) -> None:
        self._closing = contextlib.ExitStack()
        self._client, self._address, self._port = client, address, port
        self._pod, self._container_port = pod, container_port

    def __enter__(self) -> Self:
        pod_address = self._pod.ip6 if ":" in self._address else self._pod.ip4
        with self._pod.socket("tcp", pod_address) as listening:
            listening.bind((pod_address, self._container_port))
            listening.listen()
            listening.settimeout(3)
            self._asking = self._closing.enter_context(self._client.socket("tcp", self._address))
            self._asking.settimeout(3)
            self._asking.connect((self._address, self._port))
            self._answering = self._closing.enter_context(listening.accept()[0])
            self._answering.settimeout(3)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def goes_on(self) -> bool:
        """Tell whether each end still hears the other."""
        return _hears(self._asking.send, self._answering) and _hears(self._answering.send, self._asking)


def _hears(send: Callable[[bytes], int], hearing: socket.socket) -> bool:
    try:
        send(b"still there?")
        return hearing.recv(64) == b"still there?"
    except OSError:
        return False
