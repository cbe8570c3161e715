"""How tensors travel: what a client and its server agree on, and when a call may do without."""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc

from . import shm
from .errors import PrefilldError
from .tensors import invalid
from .v1 import kv_handoff_service_pb2 as kv

TRANSPORTS = {"grpc": kv.TRANSPORT_GRPC, "posix_shm": kv.TRANSPORT_POSIX_SHM}
_NAMES = {value: name for name, value in TRANSPORTS.items()}


def transport_name(value: int) -> str:
    """ "grpc" also for what the contract leaves open."""
    return _NAMES.get(value, "grpc")


class Transport:
    """The transport of one call: `name` is the one in use, "grpc" or "posix_shm"."""

    def __init__(self, name: str, pinned: bool, forget: Callable[[], None]):
        self.name = name
        self.fell_back = False
        self._pinned = pinned
        self._forget = forget

    @property
    def mapped(self) -> bool:
        return self.name == "posix_shm"

    @property
    def value(self) -> kv.Transport:
        """The wire's."""
        return TRANSPORTS[self.name]

    def falls_back(self, failure: PrefilldError) -> bool:
        """True: `failure` was about shared memory, and from now on `name` is "grpc". The server has
        no segment for the call, it offers none any more, or it cannot be opened from here. Never
        with a transport that the user chose."""
        if not self.mapped or self._pinned or not (
                failure.code is grpc.StatusCode.FAILED_PRECONDITION
                or failure.reason == "shm_memory"):
            return False
        self.name = "grpc"
        self.fell_back = True
        self._forget()
        return True


class Negotiator:
    """What client and server agreed on: asked when it is first needed, and again when the server
    is another process, or when it did not hold. Safe to share between threads."""

    def __init__(self, negotiate: Callable[[kv.NegotiateRequest, float], kv.NegotiateResponse],
                 wanted: str | None):
        """negotiate: the RPC, with its timeout in seconds. wanted: a transport; None: the best
        both have. INVALID_ARGUMENT: there is no such transport."""
        if wanted is not None and wanted not in TRANSPORTS:
            raise invalid(f"transport {wanted!r} is not one of {', '.join(TRANSPORTS)}")
        self._negotiate = negotiate
        self._wanted = wanted
        self._lock = threading.Lock()
        self._agreed: str | None = None  # None: to be asked
        self._boot_id = ""               # of the server that was asked

    @property
    def destination(self) -> kv.Transport:
        """For KvDestination.transport: what was pinned, else the server's choice. Not what was
        agreed on: whoever pulls the cache may see another /dev/shm than this process."""
        return kv.TRANSPORT_UNSPECIFIED if self._wanted is None else TRANSPORTS[self._wanted]

    def request(self) -> kv.NegotiateRequest:
        """With what this process accepts; the caller may add to it."""
        return kv.NegotiateRequest(
            transports=[] if self._wanted is None else [TRANSPORTS[self._wanted]],
            shm_domain=shm.domain())

    def choose(self, timeout: float, boot_id: str = "", *, possible: bool = True) -> Transport:
        """For one call. Blocks while it asks, `timeout` seconds at most.

        boot_id: of the server, where that is known. possible: False where the call is one that
            posix_shm cannot serve; grpc then, unless posix_shm is pinned.
        FAILED_PRECONDITION, UNIMPLEMENTED: posix_shm is pinned and not possible.
        """
        pinned = self._wanted is not None
        if self._wanted == "grpc" or not (possible or pinned):
            return Transport("grpc", pinned, self._forget)
        with self._lock:
            if self._agreed is None or boot_id not in ("", self._boot_id):
                self._agreed, self._boot_id = self._ask(timeout)
            return Transport(self._agreed, pinned, self._forget)

    def _ask(self, timeout: float) -> tuple[str, str]:
        request = self.request()
        try:
            answer = self._negotiate(request, timeout)
        except PrefilldError as failure:
            if self._wanted is None and failure.code is grpc.StatusCode.UNIMPLEMENTED:
                return "grpc", ""  # a server that has nothing to negotiate
            raise
        name = transport_name(answer.transport)
        if name == "posix_shm" and answer.shm_domain != request.shm_domain:
            name = "grpc"  # names of another /dev/shm mean nothing here
        if self._wanted not in (None, name):
            raise PrefilldError(grpc.StatusCode.FAILED_PRECONDITION,
                                f"the server answered {name} when asked for {self._wanted}")
        return name, answer.boot_id

    def _forget(self) -> None:
        with self._lock:
            self._agreed = None
