"""How tensors travel: what a client and its server agree on, and when a call may do without."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

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
    no_room: str = ""         # the server's reason when it has no such memory for a call


# What this client can use; a server that offers something else is answered without.
TRANSPORTS = {
    "grpc": TransportRow(kv.TRANSPORT_GRPC),
    "posix_shm": TransportRow(kv.TRANSPORT_POSIX_SHM, mapped=True, no_room="SHM_MEMORY"),
    "cuda_ipc": TransportRow(kv.TRANSPORT_CUDA_IPC, on_device=True, no_room="KV_MEMORY"),
}
_NAMES = {row.value: name for name, row in TRANSPORTS.items()}
_REASONS = kv.TransportRefusal.Reason
_ASK_S = 10.0     # for a transport in the place of another
_TRIED_AGAIN_S = 30.0
_ASKS_MAX = 3     # at a time: with what was refused, without, and after what is refused now


def transport_name(value: int) -> str:
    """ "grpc" also for what the contract leaves open."""
    return _NAMES.get(value, "grpc")


def cannot_be_opened(failure: PrefilldError) -> bool:
    """Memory that the server offers cannot be opened from here."""
    return failure.reason in _REASONS.keys()


@dataclasses.dataclass(frozen=True)
class _Agreement:
    name: str           # one of TRANSPORTS
    boot_id: str = ""   # of the server that was asked
    socket: str = ""    # where it hands out device memory
    until: float = math.inf  # of time.monotonic


class _Trial(NamedTuple):
    boot_id: str = ""   # of the server whose memory was tried
    refusal: kv.TransportRefusal | None = None   # what is against it, if anything is
    passing: bool = False   # and may be no more the next time


_UNTRIED = _Trial()


class Transport:
    """The transport of one call: `name` is the one in use, one of TRANSPORTS."""

    def __init__(self, agreement: _Agreement, device: Any, pinned: bool,
                 instead: Callable[[str, PrefilldError], str]):
        self.name = agreement.name
        self.socket = agreement.socket
        self.device = device    # torch's; of `on_device`
        self.fell_back = False
        self._pinned = pinned
        self._instead = instead

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
        """True: `failure` was about shared memory, and from now on `name` is another: in the place
        of cuda_ipc what there is without a GPU, else "grpc". The server has no memory for the call,
        or not for a prompt of this length, it offers none any more, or it cannot be opened from
        here. Never with a transport that the user chose."""
        too_long = self.on_device and any(field == "token_ids" for field, _ in failure.violations)
        if self.name == "grpc" or self._pinned or not (
                too_long or failure.code is grpc.StatusCode.FAILED_PRECONDITION
                or failure.reason == TRANSPORTS[self.name].no_room):
            return False
        self.name = self._instead(self.name, failure)
        self.fell_back = True
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
        # By the GPU that tensors lie on or are wanted on, None where there is none, and whether for
        # caches.
        self._agreed: dict[tuple[Any, bool], _Agreement] = {}
        self._tried: dict[Any, _Trial] = {}  # by the GPU

    def destination(self, transport: Transport) -> kv.Transport:
        """For KvDestination.transport: what was pinned, or a GPU's memory, which is had by asking
        alone; else the server's choice. Not what was agreed on: whoever pulls the cache may see
        another /dev/shm than this process."""
        if self._wanted is not None:
            return TRANSPORTS[self._wanted].value
        if self._tried.get(None, _UNTRIED).refusal is not None:
            return kv.TRANSPORT_GRPC  # this process could not open a segment
        return transport.value if transport.on_device else kv.TRANSPORT_UNSPECIFIED

    def request(self, device: Any = None) -> kv.NegotiateRequest:
        """With what this process accepts; the caller may add to it. device: the GPU that tensors
        lie on or are wanted on; default: any, where cuda_ipc is pinned."""
        request = kv.NegotiateRequest(
            transports=[] if self._wanted is None else [TRANSPORTS[self._wanted].value],
            shm_domain=shm.domain())
        gpus = [] if self._wanted not in (None, "cuda_ipc") else (
            cuda_ipc.uuids_within_reach(device) if device is not None
            else cuda_ipc.uuids() if self._wanted == "cuda_ipc" else [])
        if gpus:
            request.cuda_ipc_domain = cuda_ipc.domain()
            request.device_uuids.extend(gpus)
        return request

    def choose(self, timeout: float, boot_id: str = "", *, possible: bool = True,
               device: Any = None, model: str = "") -> Transport:
        """For one call. Blocks while it asks, `timeout` seconds at most, and while it tries what
        the server offers (cuda_ipc.probe), once for a server and GPU.

        boot_id: of the server, where that is known. possible: False where the call is one that
            shared memory cannot serve; grpc then, unless another is pinned. device: the GPU,
            torch's, that tensors lie on or are wanted on; only for one cuda_ipc is possible. model:
            whose cache is wanted there.
        FAILED_PRECONDITION, UNIMPLEMENTED: a transport is pinned and not possible.
        """
        pinned = self._wanted is not None
        if self._wanted == "cuda_ipc" and device is None:
            raise PrefilldError(grpc.StatusCode.UNIMPLEMENTED,
                                "transport cuda_ipc carries attend() of torch tensors that lie on "
                                "one GPU, and caches to the GPU that device= names; for anything "
                                "else take another client")
        if self._wanted == "grpc" or not (possible or pinned):
            return Transport(_Agreement("grpc"), None, pinned, self._nothing_else)
        if self._wanted == "posix_shm":
            device = None
        key = (device, device is not None and model != "")
        with self._lock:
            agreement = self._agreed.get(key)
            if (agreement is None or boot_id not in ("", agreement.boot_id)
                    or time.monotonic() >= agreement.until):
                agreement = self._agreed[key] = self._agree(timeout, device, model)
        return Transport(agreement, device, pinned, lambda name, failure: self._instead(
            key, agreement, name, failure))

    def _agree(self, timeout: float, device: Any, model: str) -> _Agreement:
        """Asks until there is an answer that can be used, or raises why a pinned one cannot be.
        What only failed this time, as with a socket that is full, is tried again later."""
        until = math.inf
        if self._tried.get(device, _UNTRIED).passing:
            del self._tried[device]
        for _ in range(_ASKS_MAX):
            request = self.request(device)
            if device is not None:
                request.model = model
            boot_id, refusal = self._tried.get(device, _UNTRIED)[:2]
            if refusal is not None:
                request.refused.append(refusal)
            try:
                answer = self._negotiate(request, timeout)
            except PrefilldError as failure:
                if self._wanted is None and failure.code is grpc.StatusCode.UNIMPLEMENTED:
                    return _Agreement("grpc")  # a server that has nothing to negotiate
                raise
            if refusal is not None and answer.boot_id != boot_id:
                del self._tried[device]  # another server: what did not go may go now
                continue
            if refusal is not None and TRANSPORTS[transport_name(refusal.transport)].mapped:
                self._tried[device] = _Trial(boot_id, refusal, passing=True)
                until = time.monotonic() + _TRIED_AGAIN_S
            name = self._usable(request, answer)
            if self._wanted not in (None, name):
                raise PrefilldError(grpc.StatusCode.FAILED_PRECONDITION,
                                    f"the server answered {name} when asked for {self._wanted}")
            if not TRANSPORTS[name].on_device:
                return _Agreement(name, answer.boot_id, until=until)
            try:
                if answer.boot_id != boot_id:
                    cuda_ipc.probe(answer.cuda_ipc_socket, device)
                    self._tried[device] = _Trial(answer.boot_id)
                return _Agreement(name, answer.boot_id, answer.cuda_ipc_socket)
            except PrefilldError as failure:
                if self._wanted is not None or not cannot_be_opened(failure):
                    raise
                self._refuse(device, answer.boot_id, name, failure,
                             failure.reason not in ("REASON_DRIVER", "REASON_PEER"))
                if self._tried[device].passing:
                    until = time.monotonic() + _TRIED_AGAIN_S
        return _Agreement("grpc")  # a server that is another one each time

    def _usable(self, request: kv.NegotiateRequest, answer: kv.NegotiateResponse) -> str:
        """What was answered, or grpc where that is not possible from here."""
        name = transport_name(answer.transport)
        if name == "posix_shm" and answer.shm_domain != request.shm_domain:
            return "grpc"  # names of another /dev/shm mean nothing here
        if name == "cuda_ipc" and (
                request.refused or answer.cuda_ipc_domain != request.cuda_ipc_domain
                or set(request.device_uuids).isdisjoint(answer.device_uuids)):
            return "grpc"  # nor does another host's memory, or that of a GPU out of reach
        return name

    def _refuse(self, device: Any, boot_id: str, name: str, failure: PrefilldError,
                passing: bool) -> None:
        self._tried[device] = _Trial(boot_id, kv.TransportRefusal(
            transport=TRANSPORTS[name].value, reason=_REASONS.Value(failure.reason)), passing)

    def _instead(self, key: tuple[Any, bool], agreement: _Agreement, name: str,
                 failure: PrefilldError) -> str:
        """The name of what a call goes on with after `failure` of `name`."""
        device, _ = key
        if not TRANSPORTS[name].on_device:
            with self._lock:
                for agreed in (key, (None, False)):  # the call may be here in the place of cuda_ipc
                    self._agreed.pop(agreed, None)
                if cannot_be_opened(failure):
                    for gpu in {device, None}:
                        self._refuse(gpu, agreement.boot_id, name, failure, passing=False)
            return "grpc"
        with self._lock:
            # No room, or a cache that lies elsewhere, says nothing of the next one. Memory that
            # cannot be opened, though it could be in the trial: what the driver says it will say
            # again, the rest is tried again.
            if failure.code is grpc.StatusCode.FAILED_PRECONDITION:
                self._agreed.pop(key, None)
            if failure.reason == "REASON_DRIVER":
                self._refuse(device, agreement.boot_id, name, failure, passing=False)
            elif cannot_be_opened(failure):
                self._tried.pop(device, None)
        try:
            return self.choose(_ASK_S, agreement.boot_id).name
        except PrefilldError:
            return "grpc"

    @staticmethod
    def _nothing_else(name: str, failure: PrefilldError) -> str:
        return "grpc"
