"""A channel to one server: its calls carry the token, and what is connected anew is connected with
the files of the credentials as they are then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from .credentials import Credentials


class Connection:
    """As generated stubs use a grpc.Channel. Safe to share between threads. Once a certificate's
    file has changed calls go over a new connection; those that run end on the old one."""

    def __init__(self, target: str, credentials: Credentials,
                 options: Sequence[tuple[str, Any]] = ()):
        """INVALID_ARGUMENT: the credentials cannot be used for this target."""
        credentials.check(target)
        self._target, self._credentials = target, credentials
        self._options = [*options, *credentials.channel_options()]
        self._lock = threading.Lock()
        self._closed = False
        self._calls: dict[tuple[str, str], Callable[..., Any]] = {}  # of the current channel
        self._connect()

    def close(self) -> None:
        """Calls that run end as CANCELLED, later ones are a ValueError."""
        with self._lock:
            self._closed = True
        self._channel.close()

    def unary_unary(self, path: str, *how: Any, **options: Any) -> Callable[..., Any]:
        return self._method("unary_unary", path, how, options)

    def unary_stream(self, path: str, *how: Any, **options: Any) -> Callable[..., Any]:
        return self._method("unary_stream", path, how, options)

    def stream_unary(self, path: str, *how: Any, **options: Any) -> Callable[..., Any]:
        return self._method("stream_unary", path, how, options)

    def stream_stream(self, path: str, *how: Any, **options: Any) -> Callable[..., Any]:
        return self._method("stream_stream", path, how, options)

    def _connect(self) -> None:
        self._stamp = self._credentials.stamp()
        secret = self._credentials.channel_credentials()
        self._channel = (
            grpc.insecure_channel(self._target, options=self._options) if secret is None
            else grpc.secure_channel(self._target, secret, options=self._options))
        self._calls.clear()

    def _method(self, kind: str, path: str, how: tuple[Any, ...],
                options: dict[str, Any]) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None = None) -> Any:
            with self._lock:
                if self._closed:  # gRPC's channel would crash
                    raise ValueError(f"the connection to {self._target} is closed")
                if self._credentials.stamp() != self._stamp:
                    self._connect()
                if (kind, path) not in self._calls:
                    self._calls[kind, path] = getattr(self._channel, kind)(path, *how, **options)
                method = self._calls[kind, path]
            return method(request, timeout=timeout, metadata=self._credentials.metadata())

        return call
