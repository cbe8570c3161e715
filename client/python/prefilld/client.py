"""PrefillClient: the way in."""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from . import cuda_ipc
from .attend import AttendCall, AttendResult, InPlaceAttend
from .connection import Connection
from .credentials import Credentials
from .errors import Cancellation, PrefilldError, Retry, RetryPolicy
from .prefill import Prefill
from .pull import KvPull, Lease
from .sparsity import Policy, SparsityReport, policy_message
from .tensors import data_type, invalid
from .transport import TRANSPORTS, Negotiator
from .v1 import (kv_handoff_service_pb2, kv_handoff_service_pb2_grpc, model_service_pb2,
                 model_service_pb2_grpc, prefill_service_pb2, prefill_service_pb2_grpc)

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    Tensor = np.ndarray | torch.Tensor

Progress = Callable[[float, str], None]

SHORT_CALL_S = 10.0    # deadline of calls that only ask or tell
LONG_CALL_S = 3600.0   # deadline of calls that compute or move tensors, unless one is given

_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
    # A server that hangs, or is gone without a word, is noticed while it has calls of ours.
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclasses.dataclass(frozen=True)
class Health:
    """live: the process answers. ready: it also accepts work."""

    live: bool
    ready: bool


def _no_progress(fraction: float, phase: str) -> None:
    pass


def _check_target(target: str) -> None:
    """INVALID_ARGUMENT for what gRPC would look up as a name, or knock at port 0 for."""
    scheme = re.match(r"(https?|grpcs?)://", target)
    if scheme:
        raise invalid(f"target {target!r}: HOST:PORT is enough, without {scheme[0]}")
    if not re.search(r"^unix(-abstract)?:|://|:\d+$", target):
        raise invalid(f"target {target!r} has no port; prefilld's is 50051 where none was chosen")


class PrefillClient:
    """A connection to one prefilld. Safe to share between threads; close it, or use `with`.

    Every call has a deadline (`timeout`, seconds, over all attempts) and raises PrefilldError.
    Calls are tried again, with back-off, on UNAVAILABLE, and on RESOURCE_EXHAUSTED when the server
    says that it helps, always with the same request_id, so that nothing is computed twice.

    `progress(fraction, phase)` is called from the library's threads: keep it quick. Each phase
    ("queue", "upload", "compute", "download" of attend; "queue", "compute", "pull" of prefill)
    counts from 0 to 1; compute and pull of a prefill overlap.

    `transport` is how K, V and the tensors of attend travel. "grpc": in the calls, with checksums.
    "posix_shm": not at all; they lie in shared memory of the server's host, and arrays are views
    of it. "cuda_ipc": not at all either; they lie in the memory of the server's GPU, for callers
    that work on it or on one that reaches it: K and V are torch tensors there, views of that
    memory, for calls that name the GPU (device=); torch tensors of attend are copied there and
    back by the GPU. Default: the best that both have for a call, negotiated, and tried, at the
    first that needs it; where a call cannot use it after all, it goes on over another. A transport
    that was named is never left: calls raise what the server said, FAILED_PRECONDITION or
    UNIMPLEMENTED.
    """

    def __init__(self, target: str, *, credentials: Credentials | None = None,
                 retry: RetryPolicy = RetryPolicy(), transport: str | None = None):
        """target: HOST:PORT. credentials: default: the environment's, see Credentials.from_env;
        Credentials() is none at all. transport: "grpc", "posix_shm" or "cuda_ipc"; default:
        negotiated."""
        self._negotiator = Negotiator(self._negotiate, transport)
        _check_target(target)
        self._target = target
        self._credentials = Credentials.from_env() if credentials is None else credentials
        self._channel = Connection(target, self._credentials, _CHANNEL_OPTIONS)
        self._policy = retry
        self._prefill = prefill_service_pb2_grpc.PrefillServiceStub(self._channel)
        self._handoff = kv_handoff_service_pb2_grpc.KvHandoffServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._check_health = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda name: b"\x0a" + bytes([len(name)]) + name.encode(),
            response_deserializer=lambda reply: reply == b"\x08\x01")  # status: SERVING

    def __enter__(self) -> PrefillClient:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; running calls end with CANCELLED."""
        self._channel.close()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dtype: str | None = None,
               softmax_scale: float | None = None, cu_seqlens_q: Sequence[int] | None = None,
               cu_seqlens_k: Sequence[int] | None = None, priority: int = 0,
               return_lse: bool = False, return_block_index: bool = False,
               request_id: str | None = None, timeout: float | None = None,
               progress: Progress | None = None, **policy: Unpack[Policy]) -> AttendResult:
        """Attention over the caller's tensors, causal, queries at the end of the keys.

        q: [total_q, q_heads, head_dim]; k, v: [total_k, kv_heads, head_dim]. All float32, float16
            or bfloat16: torch tensors, or numpy arrays, where bfloat16 is an ml_dtypes array, or
            uint16 together with dtype="bf16".
        softmax_scale: default 1 / sqrt(head_dim).
        cu_seqlens_q, cu_seqlens_k: [sequences + 1], from 0, where several sequences lie one after
            the other.
        policy: what may be skipped, see Policy.
        """
        header = _attend_header(
            softmax_scale=softmax_scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            priority=priority, return_lse=return_lse, return_block_index=return_block_index,
            request_id=request_id, **policy)
        call = AttendCall(header, {"q": q, "k": k, "v": v}, dtype, progress or _no_progress)
        retry = self._retry(timeout)
        transport = self._negotiator.choose(retry.remaining(), device=call.gpu)
        return call.run(self._prefill, retry, transport)

    def attend_in_place(self, q_shape: Sequence[int], kv_shape: Sequence[int], dtype: str, *,
                        device: Any = "cuda", timeout: float | None = None,
                        progress: Progress | None = None, **options: Any) -> InPlaceAttend:
        """Attention over tensors that the caller makes where the server computes: on a GPU that
        both use, without a copy. See InPlaceAttend.

        dtype: "f32", "f16" or "bf16". device: torch's. options: as attend's, from softmax_scale on.
        FAILED_PRECONDITION: the server computes on another GPU or host, or offers no cuda_ipc.
        """
        header = _attend_header(**options)
        for name, shape in (("q", q_shape), ("k", kv_shape), ("v", kv_shape)):
            header.tensors.add(name=name, data_type=data_type(dtype), shape=shape)
        retry = self._retry(timeout)
        device = cuda_ipc.gpu(device)
        transport = self._negotiator.choose(retry.remaining(), device=device)
        if not transport.on_device:
            raise PrefilldError(grpc.StatusCode.FAILED_PRECONDITION,
                                "cuda_ipc is not possible with this server and "
                                f"{device or 'no GPU'}")
        return InPlaceAttend(self._prefill, header, transport, retry.remaining(),
                             progress or _no_progress)

    def prefill(self, model: str, token_ids: Sequence[int] | np.ndarray, *, retain: bool = True,
                kv_dtype: str | None = None, widen: bool = True, lease_ttl: float | None = None,
                return_logits: bool = False, priority: int = 0, request_id: str | None = None,
                timeout: float | None = None, progress: Progress | None = None, device: Any = None,
                cancellation: Cancellation | None = None,
                **policy: Unpack[Policy]) -> Prefill:
        """Runs a prompt through a model; returns once it is admitted. See Prefill.

        token_ids: at least one, each below the model's vocab_size.
        retain: keep the whole cache on the server until it is released or expires. False: a layer
            is freed once it is pulled, so that a cache larger than the server's memory can pass;
            over grpc.
        kv_dtype: "f32", "f16" or "bf16"; default: the cache's own type. Another is converted, so
            it comes over grpc.
        widen: numpy has no bfloat16, so K and V of that type become float32; False leaves the
            bits, as uint16.
        lease_ttl: seconds; default and limit are the server's.
        timeout: of the computation and of the pull, together.
        cancellation: ends it from another thread, also before this has returned, with CANCELLED.
        device: torch's, or its name. K and V are wanted on this GPU, and come as torch tensors of
            the cache's own type where that is possible without sending them (cuda_ipc; see
            Prefill.transport and Layer); elsewhere as without it. The server's memory is tried
            before the prompt is sent; where the cache's own cannot be opened all the same, nobody
            can have it: FAILED_PRECONDITION, and the next prompt goes another way.
        """
        wanted = data_type(kv_dtype)
        request = prefill_service_pb2.PrefillRequest(
            request_id=request_id or str(uuid.uuid4()), model=model,
            token_ids=_integers(token_ids), sparsity=policy_message(policy), priority=priority,
            return_logits=return_logits)
        request.destination.retain = retain
        request.destination.layout.data_type = wanted
        if lease_ttl is not None:
            request.destination.lease_ttl.FromNanoseconds(int(lease_ttl * 1e9))
        report = progress or _no_progress
        retry = self._retry(timeout)
        info = self.model(model)
        gpu, own_type = cuda_ipc.gpu(device), wanted in (0, info.data_type)
        # Before work: a pinned one may not be possible, a GPU's memory must be asked for.
        asked = self._negotiator.choose(retry.remaining(), possible=retain and own_type, device=gpu,
                                        model=model)
        request.destination.transport = self._negotiator.destination(asked)

        def falls_back(failure: PrefilldError) -> bool:
            if not asked.on_device or not asked.falls_back(failure):
                return False
            request.destination.transport = self._negotiator.destination(asked)
            return True

        def pull(lease: Lease, admitted: str) -> KvPull:
            transport = self._negotiator.choose(
                retry.remaining(), lease.boot_id, possible=admitted != "grpc" and own_type,
                device=gpu if TRANSPORTS[admitted].on_device else None, model=model)
            return KvPull(self._handoff, lease, info, wanted, widen, transport,
                          self._retry(retry.remaining()), report)

        return Prefill(self._prefill, request, info, retry, report, pull, falls_back, self.renew,
                       self.release, cancellation)

    def pull(self, lease: Lease, model: str, *, kv_dtype: str | None = None, widen: bool = True,
             timeout: float | None = None, progress: Progress | None = None,
             device: Any = None) -> KvPull:
        """Pulls a cache that somebody else had computed. Iterate the answer for its Layers, then
        `release` the lease. device: as prefill's; for a cache that was asked for so (see
        Prefill.transport)."""
        wanted, info, retry = data_type(kv_dtype), self.model(model), self._retry(timeout)
        transport = self._negotiator.choose(retry.remaining(), lease.boot_id,
                                            possible=wanted in (0, info.data_type),
                                            device=cuda_ipc.gpu(device), model=model)
        return KvPull(self._handoff, lease, info, wanted, widen, transport, retry,
                      progress or _no_progress)

    def renew(self, lease: Lease, ttl: float | None = None) -> Lease:
        """Starts the lease's TTL anew. ttl: seconds; default: the lease's own."""
        request = kv_handoff_service_pb2.RenewLeaseRequest(
            lease=lease.name, generation=lease.generation)
        if ttl is not None:
            request.ttl.FromNanoseconds(int(ttl * 1e9))
        renewed = Lease.from_message(self._ask(self._handoff.RenewLease, request))
        return dataclasses.replace(lease, ttl=renewed.ttl)

    def release(self, lease: Lease, consumed: bool = True) -> None:
        """Ends the lease. consumed=False: abandoned; stops a computation that still runs. What of
        its cache is mapped stays as it is, and in use on the server, until nobody has it any more.
        """
        self._ask(self._handoff.ReleaseLease, kv_handoff_service_pb2.ReleaseLeaseRequest(
            lease=lease.name, generation=lease.generation,
            reason=(kv_handoff_service_pb2.RELEASE_REASON_CONSUMED if consumed
                    else kv_handoff_service_pb2.RELEASE_REASON_ABANDONED)))

    def health(self) -> Health:
        """Asks once; an unreachable server is neither live nor ready."""
        def serving(service: str) -> bool:
            try:
                return self._check_health(service, timeout=SHORT_CALL_S)
            except grpc.RpcError:
                return False
        return Health(live=serving(""), ready=serving("prefilld.v1.PrefillService"))

    def models(self) -> list[model_service_pb2.Model]:
        """What the server has loaded."""
        request = model_service_pb2.ListModelsRequest()
        return list(self._ask(self._models.ListModels, request).models)

    def model(self, name: str) -> model_service_pb2.Model:
        """One of models(). NOT_FOUND when it is not loaded."""
        return self._ask(self._models.GetModel, model_service_pb2.GetModelRequest(name=name))

    def sparsity_report(self, request_id: str) -> SparsityReport:
        """Of one of the server's last finished requests."""
        return SparsityReport.from_message(self._ask(
            self._prefill.GetSparsityReport,
            prefill_service_pb2.GetSparsityReportRequest(request_id=request_id)))

    def negotiate(self, model: str = "", *, fingerprint: str = "",
                  kv_dtype: str | None = None) -> kv_handoff_service_pb2.NegotiateResponse:
        """Transport, layout, fingerprint and limits the server would use. FAILED_PRECONDITION when
        it cannot serve `kv_dtype` or the client's transport, or has another model than
        `fingerprint` under that name."""
        request = self._negotiator.request()
        request.model, request.fingerprint = model, fingerprint
        request.layout.data_type = data_type(kv_dtype)
        return self._negotiate(request, SHORT_CALL_S)

    def _negotiate(self, request: kv_handoff_service_pb2.NegotiateRequest,
                   timeout: float) -> kv_handoff_service_pb2.NegotiateResponse:
        return self._ask(self._handoff.Negotiate, request, min(timeout, SHORT_CALL_S))

    def _retry(self, timeout: float | None) -> Retry:
        return Retry(self._policy, LONG_CALL_S if timeout is None else timeout, self._why_not)

    def _why_not(self) -> PrefilldError | None:
        return self._credentials.why_not(self._target)

    def _ask(self, method: Callable[..., Any], request: Any, timeout: float = SHORT_CALL_S) -> Any:
        """A short unary call, with retries."""
        retry = self._retry(timeout)
        while True:
            try:
                return method(request, timeout=retry.remaining())
            except grpc.RpcError as error:
                retry.after(PrefilldError.from_rpc(error))


def _attend_header(*, softmax_scale: float | None = None,
                   cu_seqlens_q: Sequence[int] | None = None,
                   cu_seqlens_k: Sequence[int] | None = None, priority: int = 0,
                   return_lse: bool = False, return_block_index: bool = False,
                   request_id: str | None = None,
                   **policy: Unpack[Policy]) -> prefill_service_pb2.AttendHeader:
    """All but the tensors."""
    return prefill_service_pb2.AttendHeader(
        request_id=request_id or str(uuid.uuid4()), sparsity=policy_message(policy),
        softmax_scale=softmax_scale, cu_seqlens_q=_integers(cu_seqlens_q),
        cu_seqlens_k=_integers(cu_seqlens_k), priority=priority, return_lse=return_lse,
        return_block_index=return_block_index)


def _integers(values: Sequence[int] | np.ndarray | None) -> list[int]:
    """numpy integers are not what protobuf takes."""
    return [] if values is None else np.asarray(values).tolist()
