"""How tensors travel: what a client and its server agree on, and when a call may do without."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import grpc

from . import cuda_ipc, shm
from .errors import PrefilldError
from .tensors import invalid
from .v1 import kv_handoff_service_pb2 as kv


@dataclasses.dataclass(frozen=True)
class TransportRow:
    value: kv.Transport       # the wire's
    mapped: bool = False      # tensors lie in segments of shared memory
    on_device: bool = False   # they lie in memory of a GPU


# What this client can use; a server that offers something else is answered without.
TRANSPORTS = {
    "grpc": TransportRow(kv.TRANSPORT_GRPC),
    "posix_shm": TransportRow(kv.TRANSPORT_POSIX_SHM, mapped=True),
    "cuda_ipc": TransportRow(kv.TRANSPORT_CUDA_IPC, on_device=True),
}
_NAMES = {row.value: name for name, row in TRANSPORTS.items()}


def transport_name(value: int) -> str:
    """ "grpc" also for what the contract leaves open."""
    return _NAMES.get(value, "grpc")


class Transport:
    """The transport of one call: `name` is the one in use, one of TRANSPORTS."""

    def __init__(self, name: str, pinned: bool, forget: Callable[[], None]):
        self.name = name
        self.fell_back = False
        self._pinned = pinned
        self._forget = forget

    @property
    def mapped(self) -> bool:
        return TRANSPORTS[self.name].mapped

    @property
    def on_device(self) -> bool:
        return TRANSPORTS[self.name].on_device

    @property
    def value(self) -> kv.Transport:
        """The wire's."""
        return TRANSPORTS[self.name].value

    def falls_back(self, failure: PrefilldError) -> bool:
        """True: `failure` was about shared memory, and from now on `name` is "grpc". The server has
        no memory for the call, it offers none any more, or it cannot be opened from here. Never
        with a transport that the user chose."""
        if self.name == "grpc" or self._pinned or not (
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
        # By the GPU that the tensors lie on, "" where they do not or where there are none: name,
        # and the boot_id of the server that was asked.
        self._agreed: dict[str, tuple[str, str]] = {}

    @property
    def destination(self) -> kv.Transport:
        """For KvDestination.transport: what was pinned, else the server's choice. Not what was
        agreed on: whoever pulls the cache may see another /dev/shm than this process."""
        return kv.TRANSPORT_UNSPECIFIED if self._wanted is None else TRANSPORTS[self._wanted].value

    def request(self, gpu: str = "") -> kv.NegotiateRequest:
        """With what this process accepts; the caller may add to it. gpu: where the tensors of an
        attend lie; default: any GPU, where cuda_ipc is pinned."""
        request = kv.NegotiateRequest(
            transports=[] if self._wanted is None else [TRANSPORTS[self._wanted].value],
            shm_domain=shm.domain())
        if gpu or self._wanted == "cuda_ipc":
            request.cuda_ipc_domain = cuda_ipc.domain()
            request.device_uuids.extend([gpu] if gpu else cuda_ipc.uuids())
        return request

    def choose(self, timeout: float, boot_id: str = "", *, possible: bool = True,
               gpu: str = "") -> Transport:
        """For one call. Blocks while it asks, `timeout` seconds at most.

        boot_id: of the server, where that is known. possible: False where the call is one that
            posix_shm cannot serve; grpc then, unless posix_shm is pinned. gpu: the one that the
            tensors of an attend lie on; only these can go by cuda_ipc.
        FAILED_PRECONDITION, UNIMPLEMENTED: a transport is pinned and not possible.
        """
        pinned = self._wanted is not None
        if self._wanted == "cuda_ipc" and not gpu:
            raise PrefilldError(grpc.StatusCode.UNIMPLEMENTED,
                                "transport cuda_ipc carries attend() of torch tensors that lie on "
                                "one GPU; for anything else take another client")
        if self._wanted == "grpc" or not (possible or pinned):
            return Transport("grpc", pinned, lambda: None)
        if self._wanted == "posix_shm":
            gpu = ""
        with self._lock:
            if gpu not in self._agreed or boot_id not in ("", self._agreed[gpu][1]):
                self._agreed[gpu] = self._ask(timeout, gpu)
            return Transport(self._agreed[gpu][0], pinned, lambda: self._forget(gpu))

    def _ask(self, timeout: float, gpu: str) -> tuple[str, str]:
        request = self.request(gpu)
        try:
            answer = self._negotiate(request, timeout)
        except PrefilldError as failure:
            if self._wanted is None and failure.code is grpc.StatusCode.UNIMPLEMENTED:
                return "grpc", ""  # a server that has nothing to negotiate
            raise
        name = transport_name(answer.transport)
        if name == "posix_shm" and answer.shm_domain != request.shm_domain:
            name = "grpc"  # names of another /dev/shm mean nothing here
        if name == "cuda_ipc" and (answer.cuda_ipc_domain != request.cuda_ipc_domain
                                   or gpu not in answer.device_uuids):
            name = "grpc"  # nor do handles of another host's memory, or another GPU's
        if self._wanted not in (None, name):
            raise PrefilldError(grpc.StatusCode.FAILED_PRECONDITION,
                                f"the server answered {name} when asked for {self._wanted}")
        return name, answer.boot_id

    def _forget(self, gpu: str) -> None:
        with self._lock:
            self._agreed.pop(gpu, None)
