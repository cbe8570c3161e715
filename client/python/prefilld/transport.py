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
    mapped: bool = False      # tensors lie in memory of the host
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
_OF_MAPPINGS = ("REASON_DRIVER", "REASON_SEGMENT")
_FOR_GOOD = ("REASON_DRIVER", "REASON_PEER")  # what is so will be so the next time
_ASKS_MAX = 4     # at a time: with what was refused, without, and after each that is refused now


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
    socket: str = ""    # where it hands out memory
    until: float = math.inf  # of time.monotonic


class _Trial(NamedTuple):
    boot_id: str        # of the server whose memory was tried
    refusal: kv.TransportRefusal | None = None   # what is against it, if anything is
    until: float = math.inf  # of time.monotonic: then it may go


class Transport:
    """The transport of one call: `name` is the one in use, one of TRANSPORTS."""

    def __init__(self, agreement: _Agreement, device: Any, pinned: bool,
                 instead: Callable[[str, PrefilldError], str]):
        self.name = agreement.name
        self.socket = agreement.socket
        self.device = device    # torch's; of `on_device`
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
        self._tried: dict[tuple[str, Any], _Trial] = {}  # by _memory

    def destination(self, transport: Transport) -> kv.Transport:
        """For KvDestination.transport: what was pinned, or a GPU's memory, which is had by asking
        alone; else the server's choice. Not what was agreed on: whoever pulls the cache may reach a
        socket that this process does not."""
        if self._wanted is not None:
            return TRANSPORTS[self._wanted].value
        refusal = self._refusals(None).get(_memory("posix_shm", None))
        if refusal is not None and refusal.reason != _REASONS.REASON_SOCKET:
            return kv.TRANSPORT_GRPC
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
        the server offers (shm.probe, cuda_ipc.probe), once for a server and GPU.

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
        for _ in range(_ASKS_MAX):
            request = self.request(device)
            if device is not None:
                request.model = model
            refusals = self._refusals(device)
            request.refused.extend(refusals.values())
            try:
                answer = self._negotiate(request, timeout)
            except PrefilldError as failure:
                if self._wanted is None and failure.code is grpc.StatusCode.UNIMPLEMENTED:
                    return _Agreement("grpc")  # a server that has nothing to negotiate
                raise
            others = [memory for memory in refusals
                      if self._tried[memory].boot_id != answer.boot_id]
            for memory in others:
                del self._tried[memory]  # another server: what did not go may go now
            if others:
                continue
            name = self._usable(request, answer)
            if self._wanted not in (None, name):
                raise PrefilldError(grpc.StatusCode.FAILED_PRECONDITION,
                                    f"the server answered {name} when asked for {self._wanted}")
            until = min((self._tried[memory].until for memory in refusals), default=math.inf)
            try:
                self._try(name, device, answer)
                return _Agreement(name, answer.boot_id, answer.memory_socket, until)
            except PrefilldError as failure:
                if self._wanted is not None or not cannot_be_opened(failure):
                    raise
                self._refuse(_memory(name, device), answer.boot_id, failure)
        return _Agreement("grpc")  # a server that is another one each time

    def _usable(self, request: kv.NegotiateRequest, answer: kv.NegotiateResponse) -> str:
        """What was answered, or grpc where that is not possible from here."""
        name = transport_name(answer.transport)
        if answer.transport in [refusal.transport for refusal in request.refused]:
            return "grpc"
        if name == "posix_shm" and answer.shm_domain != request.shm_domain:
            return "grpc"  # another host's memory, or memory that is shared in another way
        if name == "cuda_ipc" and (
                answer.cuda_ipc_domain != request.cuda_ipc_domain
                or set(request.device_uuids).isdisjoint(answer.device_uuids)):
            return "grpc"  # nor is that of a GPU out of reach
        return name

    def _try(self, name: str, device: Any, answer: kv.NegotiateResponse) -> None:
        """Maps what the server has there for that, once. FAILED_PRECONDITION: it cannot be."""
        memory = _memory(name, device)
        tried = self._tried.get(memory)
        if name == "grpc" or (tried is not None and tried.refusal is None
                              and tried.boot_id == answer.boot_id):
            return
        if TRANSPORTS[name].on_device:
            cuda_ipc.probe(answer.memory_socket, device)
        else:
            shm.probe(answer.memory_socket)
        self._tried[memory] = _Trial(answer.boot_id)

    def _refusals(self, device: Any) -> dict[tuple[str, Any], kv.TransportRefusal]:
        """Of the memory that calls with this GPU could have, what could not be opened of late."""
        now = time.monotonic()
        tried = {memory: self._tried.get(memory)
                 for memory in (_memory("posix_shm", None), _memory("cuda_ipc", device))}
        return {memory: trial.refusal for memory, trial in tried.items()
                if trial is not None and trial.refusal is not None and now < trial.until}

    def _refuse(self, memory: tuple[str, Any], boot_id: str, failure: PrefilldError) -> None:
        self._tried[memory] = _Trial(
            boot_id,
            kv.TransportRefusal(transport=TRANSPORTS[memory[0]].value,
                                reason=_REASONS.Value(failure.reason)),
            math.inf if failure.reason in _FOR_GOOD else time.monotonic() + _TRIED_AGAIN_S)

    def _instead(self, key: tuple[Any, bool], agreement: _Agreement, name: str,
                 failure: PrefilldError) -> str:
        """The name of what a call goes on with after `failure` of `name`."""
        device, _ = key
        memory, on_device = _memory(name, device), TRANSPORTS[name].on_device
        with self._lock:
            # That a GPU has no room, or a cache lies elsewhere, says nothing of the next one.
            if not on_device or failure.code is grpc.StatusCode.FAILED_PRECONDITION:
                self._agreed.pop(key, None)
            if not on_device:
                self._agreed.pop((None, False), None)  # it may be here in the place of cuda_ipc
            # Memory that cannot be opened, though it could be in the trial: what the system says of
            # a mapping it will say again; the rest, a name that has ended, say, is tried again.
            if failure.reason in _OF_MAPPINGS:
                self._refuse(memory, agreement.boot_id, failure)
            elif cannot_be_opened(failure):
                self._tried.pop(memory, None)
        if not on_device:
            return "grpc"
        try:
            return self.choose(_ASK_S, agreement.boot_id).name
        except PrefilldError:
            return "grpc"

    @staticmethod
    def _nothing_else(name: str, failure: PrefilldError) -> str:
        return "grpc"


def _memory(name: str, device: Any) -> tuple[str, Any]:
    """What a trial is of: the memory of a transport, and for which GPU."""
    return name, device if TRANSPORTS[name].on_device else None
