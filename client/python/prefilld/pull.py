"""Pulling a leased KV cache, layer by layer, through broken connections."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from . import cuda_ipc
from .errors import PrefilldError, Retry
from .shm import MappedTensors, Segments, read_ahead
from .tensors import NUMPY_TYPES, Assembly, data_loss, type_name, widen_bf16
from .transport import Transport, cannot_be_opened
from .v1 import (kv_handoff_service_pb2, kv_handoff_service_pb2_grpc, model_service_pb2,
                 tensor_pb2)

Progress = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class Lease:
    """A claim on a KV cache. All that another process needs to pull it, besides the server's
    address and the model's name: hand it over as JSON with dataclasses.asdict."""

    name: str
    generation: int
    boot_id: str
    layers: int
    tokens: int
    ttl: float   # seconds, from the moment the server answered

    @classmethod
    def from_message(cls, message: kv_handoff_service_pb2.Lease) -> Lease:
        return cls(name=message.name, generation=message.generation, boot_id=message.boot_id,
                   layers=message.layers, tokens=message.tokens,
                   ttl=message.ttl.ToTimedelta().total_seconds())


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a cache. K is stored after RoPE.

    Over posix_shm k and v are read-only views of the server's memory (of bfloat16 that is widened:
    copies). They stay as they are after the lease has ended; but the memory of the whole cache,
    all layers of it, is in use, and counted by the server, until the last view is gone.

    Over cuda_ipc they are torch tensors on the GPU that was asked for, of the cache's own type:
    views of the server's memory, in which nobody writes but who has them. (Where the server
    computes on another GPU of the host: copies.) They too keep the memory of the whole cache in use
    until the last view is gone. Then the thread that lets go of it waits for the GPU, which may
    still read.
    """

    index: int
    k: Any   # np.ndarray or torch.Tensor, [kv_heads, tokens, head_dim]
    v: Any   # the same
    density: float | None = None         # of its attention, mean over heads; None: not known here
    captured_mass: float | None = None   # mean over heads; None: not known here, or not measured


class KvPull:
    """Iterate it, once: yields Layer after Layer as the server has them. Breaks of the connection
    and damaged chunks are retried from the last good byte. One thread iterates; `cancel` may come
    from any. The lease is renewed meanwhile, but neither taken nor released here."""

    def __init__(self, stub: kv_handoff_service_pb2_grpc.KvHandoffServiceStub, lease: Lease,
                 model: model_service_pb2.Model, data_type: tensor_pb2.DataType, widen: bool,
                 transport: Transport, retry: Retry, progress: Progress):
        """data_type: what to ask for, 0 for the cache's own. widen: bfloat16 becomes float32,
        else it stays uint16; of numpy arrays. transport: this call's own."""
        self._stub = stub
        self._lease = lease
        self._shape = (model.kv_heads, lease.tokens, model.head_dim)
        self._asked = data_type
        self._data_type = data_type or model.data_type
        self._widen = widen and self._data_type == tensor_pb2.DATA_TYPE_BF16
        self._transport = transport
        self._retry = retry
        self._progress = progress
        self._segments = Segments(transport.socket)
        self._memory: cuda_ipc.Memory | None = None  # on a GPU
        self._call: Any = None  # grpc's own, which has no public type
        self._cancelled = False
        self.layers_done = 0

    @property
    def complete(self) -> bool:
        """Every layer was yielded."""
        return self.layers_done == self._lease.layers

    @property
    def transport(self) -> str:
        """The one in use, "grpc", "posix_shm" or "cuda_ipc"."""
        return self._transport.name

    def cancel(self) -> None:
        """Ends the iteration with CANCELLED."""
        self._cancelled = True
        self._retry.cancel()
        if self._call is not None:
            self._call.cancel()

    def __iter__(self) -> Iterator[Layer]:
        with contextlib.closing(self), _renewed(self._stub, self._lease):
            assembly = self._next_layer()
            while not self.complete:
                try:
                    self._call = self._open(assembly)
                    if self._cancelled:
                        self._call.cancel()
                    mapped = self._transport.mapped
                    for chunk in read_ahead(self._call, self._segments) if mapped else self._call:
                        assembly.accept(chunk)
                        self._retry.progressed()
                        self._progress(
                            (self.layers_done + assembly.fraction) / self._lease.layers, "pull")
                        if assembly.done:
                            layer = self._layer(assembly.arrays)
                            self.layers_done += 1
                            if not self.complete:
                                assembly = self._next_layer()
                            yield layer
                            if self.complete:
                                break
                    else:
                        raise data_loss(f"the pull ended after {self.layers_done} of "
                                        f"{self._lease.layers} layers")
                except (grpc.RpcError, PrefilldError) as error:
                    failure = (error if isinstance(error, PrefilldError)
                               else PrefilldError.from_rpc(error))
                    on_device = self._transport.on_device
                    if self._transport.falls_back(failure):
                        if on_device and cannot_be_opened(failure):
                            raise failure from failure.__cause__  # there it lies, or nowhere
                        assembly = self._next_layer()
                    else:  # of damaged chunks the good ones before are kept
                        self._retry.after(
                            failure, resumable=failure.code is grpc.StatusCode.DATA_LOSS)
                finally:
                    if self._call is not None:
                        self._call.cancel()

    def open_ahead(self, reference: tensor_pb2.BufferRef) -> None:
        """Maps the whole cache, where it lies on the GPU, before its first layer is computed. What
        cannot be done now fails when that layer comes."""
        if self._transport.on_device:
            with contextlib.suppress(PrefilldError):
                self._device_memory().open(reference.name)

    def close(self) -> None:
        """From now on only arrays and tensors keep memory of the server's mapped."""
        self._segments.close()
        self._memory = None

    def _open(self, at: Assembly | MappedTensors) -> Any:
        return self._stub.PullKv(kv_handoff_service_pb2.PullKvRequest(
            lease=self._lease.name, generation=self._lease.generation,
            boot_id=self._lease.boot_id, first_layer=self.layers_done,
            layout=kv_handoff_service_pb2.KvLayout(data_type=self._asked),
            resume_tensor_index=at.index, resume_byte_offset=at.offset,
            transport=self._transport.value,
        ), timeout=self._retry.remaining())

    def _next_layer(self) -> Assembly | MappedTensors:
        kind = NUMPY_TYPES[self._data_type]
        if self._transport.on_device:
            return MappedTensors(self._on_device, count=2, layer=self.layers_done)
        if self._transport.mapped:
            return MappedTensors(
                lambda reference: self._segments.array(reference, kind, self._shape),
                count=2, layer=self.layers_done)
        return Assembly([np.empty(self._shape, kind) for _ in range(2)], layer=self.layers_done)

    def _device_memory(self) -> cuda_ipc.Memory:
        if self._memory is None:
            self._memory = cuda_ipc.Memory(self._transport.socket, self._transport.device)
        return self._memory

    def _on_device(self, reference: tensor_pb2.BufferRef) -> Any:
        tensor = self._device_memory().tensor(reference, type_name(self._data_type), self._shape)
        return tensor.to(self._transport.device)  # itself, but for another GPU's memory

    def _layer(self, arrays: Sequence[Any]) -> Layer:
        widen = self._widen and isinstance(arrays[0], np.ndarray)
        k, v = map(widen_bf16, arrays) if widen else arrays
        return Layer(index=self.layers_done, k=k, v=v)


@contextlib.contextmanager
def _renewed(stub: kv_handoff_service_pb2_grpc.KvHandoffServiceStub,
             lease: Lease) -> Iterator[None]:
    """Renews the lease three times a TTL while the block runs. A failure is left for the pull to
    find: it has the better error."""
    stop = threading.Event()
    period = min(max(lease.ttl / 3, 0.05), 3600.0)  # seconds; a lease may come from anywhere

    def renew() -> None:
        request = kv_handoff_service_pb2.RenewLeaseRequest(
            lease=lease.name, generation=lease.generation)
        while not stop.wait(period):
            with contextlib.suppress(grpc.RpcError):
                stub.RenewLease(request, timeout=period)

    thread = threading.Thread(target=renew, name="prefilld-renew", daemon=True)
    if lease.ttl > 0:
        thread.start()
    try:
        yield
    finally:
        stop.set()
