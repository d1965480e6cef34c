"""A client of the Container Runtime Interface: what a kubelet says to a runtime, as dictionaries.

``cri.proto`` is compiled when a client is made, into descriptors instead of code, so that nothing generated is kept.
"""

from __future__ import annotations

import importlib.util
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("grpc", "grpc_tools", "google.protobuf")  # of grpcio, grpcio-tools, protobuf
SERVICES = ("RuntimeService", "ImageService")
CHANNEL_OPTIONS = [
    ("grpc.default_authority", "localhost"),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]
DEADLINE = 60  # seconds


def is_installed() -> bool:
    """Tell whether the Python packages that this client needs are there."""
    try:
        return all(importlib.util.find_spec(package) for package in PACKAGES)
    except ModuleNotFoundError:
        return False


class CRIError(Exception):
    """The runtime refused a call; the message is what a kubelet puts into the pod's events."""


@cache
def _pool() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool
    from grpc_tools import protoc

    proto = Path(__file__).with_name("cri.proto")
    with tempfile.NamedTemporaryFile() as descriptors:
        arguments = ["protoc", f"-I{proto.parent}", f"--descriptor_set_out={descriptors.name}", proto.name]
        if protoc.main(arguments):
            raise AssertionError(arguments)
        files = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


class CRI:
    """A connection to a runtime's socket; calls wait for a runtime that is starting."""

    def __init__(self, socket: Path) -> None:
        import grpc

        self._channel = grpc.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)

    def call(self, method: str, **fields: Any) -> dict[str, Any]:
        """Send the request with these fields, and return the response's fields that are set."""
        import grpc
        from google.protobuf import json_format, message_factory

        descriptor = next(
            service.methods_by_name[method]
            for service in (_pool().FindServiceByName(f"runtime.v1.{name}") for name in SERVICES)
            if method in service.methods_by_name
        )
        send = self._channel.unary_unary(
            f"/{descriptor.containing_service.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(descriptor.output_type).FromString,
        )
        request = json_format.ParseDict(fields, message_factory.GetMessageClass(descriptor.input_type)())
        try:
            response = send(request, timeout=DEADLINE, wait_for_ready=True)
        except grpc.RpcError as error:
            raise CRIError(error.details()) from error
        answer: dict[str, Any] = json_format.MessageToDict(response, preserving_proto_field_name=True)
        return answer

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._channel.close()
