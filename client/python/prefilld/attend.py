"""One Attend call: hand over q, k and v once admitted, take the outputs back."""

from __future__ import annotations

import dataclasses
import math
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from . import cuda_ipc, torch_tensors, tensors as numpy_tensors
from .errors import PrefilldError, Retry
from .shm import Segments
from .sparsity import SparsityReport, Summary
from .tensors import DTYPES, NUMPY_TYPES, Assembly, chunks, data_loss, invalid, type_name
from .transport import TRANSPORTS, Transport, transport_name
from .v1 import prefill_service_pb2, prefill_service_pb2_grpc, tensor_pb2

Progress = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class AttendResult:
    """Outputs of attend(). Without cu_seqlens `pattern` and `captured_mass` are [q_heads], with
    them [sequences, q_heads]; rows of blocks of all sequences are concatenated, key blocks count
    from the start of their sequence.

    Where q was a torch tensor all of them are, on q's device. Over posix_shm the arrays are views
    of one piece of shared memory, which nobody else uses any more: all of it, q, k and v included,
    is in use until the last of them is gone. Over cuda_ipc they are the caller's own; those of
    InPlaceAttend are views, as over posix_shm."""

    o: np.ndarray                      # [total_q, q_heads, head_dim], of q's type
    lse: np.ndarray | None             # [q_heads, total_q] float32, natural log
    block_count: np.ndarray | None     # [q_heads, q_blocks] int32
    block_index: np.ndarray | None     # [q_heads, q_blocks, max] int32, ascending, then -1
    pattern: np.ndarray | None         # uint8, index into PATTERNS
    captured_mass: np.ndarray | None   # float32
    summary: Summary

    @property
    def report(self) -> SparsityReport:
        return self.summary.report

    @property
    def request_id(self) -> str:
        return self.summary.request_id

    @property
    def transport(self) -> str:
        """The one that was used: "grpc", "posix_shm" or "cuda_ipc"."""
        return self.summary.transport

    def clone(self, device: Any = None) -> AttendResult:
        """The same with torch tensors of its own. device: where; default: where they are."""
        tensors = {name: tensor.to(device or tensor.device, copy=True)
                   for name, tensor in vars(self).items() if torch_tensors.is_tensor(tensor)}
        return dataclasses.replace(self, **tensors)


class AttendCall:
    """Everything of one call that does not change between attempts."""

    def __init__(self, header: prefill_service_pb2.AttendHeader, tensors: dict[str, Any],
                 dtype: str | None, progress: Progress):
        """tensors: all numpy arrays, or all torch tensors."""
        self._tensors = list(tensors.values())
        torch = [torch_tensors.is_tensor(tensor) for tensor in self._tensors]
        if any(torch) and not all(torch):
            raise invalid("q, k and v are neither all numpy arrays nor all torch tensors")
        self._types = torch_tensors if any(torch) else numpy_tensors
        self._device = self._tensors[0].device if any(torch) else None
        self._kinds: list[str] = []
        self._progress = progress
        for name, tensor in tensors.items():
            if tensor.ndim != 3 or min(tensor.shape) < 1:
                raise invalid(f"{name} has shape {tuple(tensor.shape)}: expected three dimensions, "
                              "each at least 1")
            self._kinds.append(self._types.dtype_name(tensor, dtype))
            header.tensors.add(name=name, data_type=DTYPES[self._kinds[-1]][0], shape=tensor.shape)
        self._header = header
        self._payloads: list[np.ndarray] = []  # as on the wire, but strided as the caller's
        self._total = sum(math.prod(spec.shape) * DTYPES[kind][1].itemsize
                          for spec, kind in zip(header.tensors, self._kinds))

    @property
    def gpu(self) -> Any:
        """The one that all tensors lie on, torch's device, or None."""
        return None if self._device is None else cuda_ipc.gpu_of(self._tensors)

    def run(self, stub: prefill_service_pb2_grpc.PrefillServiceStub, retry: Retry,
            transport: Transport) -> AttendResult:
        """Tries until it succeeds, is refused for good, or time is up. transport: this call's own.
        """
        while True:
            try:
                if transport.on_device:
                    return self._run_on_device(stub, retry.remaining(), transport)
                return self._run(stub, retry.remaining(), transport)
            except (grpc.RpcError, PrefilldError) as error:
                failure = (error if isinstance(error, PrefilldError)
                           else PrefilldError.from_rpc(error))
                if transport.falls_back(failure):
                    continue
                if failure is error and not isinstance(error.__cause__, grpc.RpcError):
                    raise  # found on this side: the same would come again
                retry.after(failure)

    def _run_on_device(self, stub: prefill_service_pb2_grpc.PrefillServiceStub,
                       timeout: float, transport: Transport) -> AttendResult:
        with InPlaceAttend(stub, self._header, transport, timeout, self._progress) as call:
            written = 0
            for place, tensor in zip((call.q, call.k, call.v), self._tensors):
                place.copy_(tensor)
                written += tensor.nbytes
                self._progress(written / self._total, "upload")
            return call.run().clone(self._device)

    def _run(self, stub: prefill_service_pb2_grpc.PrefillServiceStub, timeout: float,
             transport: Transport) -> AttendResult:
        if not self._payloads:
            self._payloads = [self._types.wire_array(tensor, kind)
                              for tensor, kind in zip(self._tensors, self._kinds)]
        self._header.transport = transport.value
        admitted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        call = stub.Attend(self._requests(admitted), timeout=timeout)
        try:
            return self._receive(call, admitted, transport)
        finally:
            call.cancel()        # nothing to do when it ended by itself
            admitted.put(False)  # lets the thread that feeds the upload go

    def _requests(self, admitted: queue.SimpleQueue[bool]
                  ) -> Iterator[prefill_service_pb2.AttendRequest]:
        mapped = TRANSPORTS[transport_name(self._header.transport)].mapped
        yield prefill_service_pb2.AttendRequest(header=self._header)
        if not admitted.get():  # not a byte before admission
            return
        if mapped:  # by now every tensor is in its place
            yield prefill_service_pb2.AttendRequest(written=prefill_service_pb2.TensorsWritten())
        else:
            yield from self._chunks()
        self._progress(0.0, "compute")

    def _chunks(self) -> Iterator[prefill_service_pb2.AttendRequest]:
        sent = 0
        for index, payload in enumerate(self._payloads):
            for chunk in chunks(index, np.ascontiguousarray(payload).data.cast("B")):
                yield prefill_service_pb2.AttendRequest(chunk=chunk)
                sent += len(chunk.data)
                self._progress(sent / self._total, "upload")

    def _write(self, buffers: Sequence[tensor_pb2.BufferRef], segments: Segments) -> None:
        """Puts every tensor where the server wants it."""
        if len(buffers) != len(self._payloads):
            raise data_loss(f"{len(buffers)} buffers for {len(self._payloads)} tensors")
        written = 0
        for buffer, payload in zip(buffers, self._payloads):
            segments.array(buffer, payload.dtype, payload.shape)[...] = payload
            written += payload.nbytes
            self._progress(written / self._total, "upload")

    def _receive(self, call, admitted: queue.SimpleQueue[bool],
                 transport: Transport) -> AttendResult:
        specs: Sequence[tensor_pb2.TensorSpec] = ()
        arrays: list[np.ndarray] = []
        assembly = Assembly(arrays)
        segments = Segments(transport.socket, writable=True)
        summary = None
        self._progress(0.0, "queue")
        for response in call:
            part = response.WhichOneof("part")
            if part == "admission":
                if transport.mapped:
                    self._write(response.admission.buffers, segments)
                admitted.put(True)
            elif part == "outputs":
                specs = response.outputs.tensors
                if transport.mapped:
                    arrays = _map(response.outputs, segments)
                    self._progress(1.0, "download")
                else:
                    arrays = [np.empty(*_shape_and_type(spec)) for spec in specs]
                    assembly = Assembly(arrays)
            elif part == "chunk":
                assembly.accept(response.chunk)
                self._progress(assembly.fraction, "download")
            elif part == "summary":
                summary = Summary.from_message(response.summary, transport.name)
        if summary is None or not arrays or not (transport.mapped or assembly.done):
            raise data_loss("the stream of Attend ended before its last output or its summary")

        outputs = {spec.name: array for spec, array in zip(specs, arrays)}
        if self._device is not None:
            outputs = {spec.name: torch_tensors.from_wire(array, _kind(spec), self._device)
                       for spec, array in zip(specs, arrays)}
        result = _result(outputs, summary)
        return (result if self._device is not None
                else dataclasses.replace(result, o=result.o.view(self._tensors[0].dtype)))


class InPlaceAttend:
    """One Attend in the server's memory on a GPU that this process reaches (cuda_ipc): nothing is
    copied. Use it as a context manager: on entry the call is admitted and `q`, `k` and `v` are
    tensors to fill; `run` computes; on exit the call is over. The tensors stay valid as long as
    somebody holds them, and one of them keeps the call's whole memory, which counts as taken on the
    server (--attend_memory). A call that is idle for too long is given up (--upload_timeout).

    From any thread, one at a time. Not tried again. Raises what `attend` does."""

    def __init__(self, stub: prefill_service_pb2_grpc.PrefillServiceStub,
                 header: prefill_service_pb2.AttendHeader, transport: Transport, timeout: float,
                 progress: Progress):
        """header: complete but for the transport. transport: one that is on a device."""
        header.transport = transport.value
        self._transport = transport
        self._stub, self._header, self._timeout = stub, header, timeout
        self._progress = progress
        self._requests: queue.SimpleQueue[prefill_service_pb2.AttendRequest | None] = (
            queue.SimpleQueue())
        self._memory = cuda_ipc.Memory(transport.socket, transport.device)
        self._complete = False

    def __enter__(self) -> InPlaceAttend:
        self._call = self._stub.Attend(iter(self._requests.get, None), timeout=self._timeout)
        self._requests.put(prefill_service_pb2.AttendRequest(header=self._header))
        self._progress(0.0, "queue")
        try:
            buffers = self._receive("admission").buffers
            if len(buffers) != len(self._header.tensors):
                raise data_loss(f"{len(buffers)} buffers for {len(self._header.tensors)} tensors")
            self.q, self.k, self.v = (
                self._memory.tensor(buffer, *_kind_and_shape(spec))
                for buffer, spec in zip(buffers, self._header.tensors))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._memory.close()
        for name in ("q", "k", "v"):
            vars(self).pop(name, None)
        self._requests.put(None)
        try:
            if self._complete:
                for _ in self._call:
                    pass
        except grpc.RpcError as error:
            raise PrefilldError.from_rpc(error) from error
        finally:
            self._call.cancel()  # nothing to do when it ended by itself

    def run(self) -> AttendResult:
        """Computes what q, k and v hold by the order of the current stream. Once. The tensors of
        the result lie in the server's memory."""
        cuda_ipc.synchronize(self._transport.device, self.q.device)
        self._requests.put(prefill_service_pb2.AttendRequest(
            written=prefill_service_pb2.TensorsWritten()))
        self._progress(0.0, "compute")
        outputs = self._receive("outputs")
        if len(outputs.buffers) != len(outputs.tensors):
            raise data_loss(f"{len(outputs.buffers)} buffers for {len(outputs.tensors)} outputs")
        tensors = {spec.name: self._memory.tensor(buffer, *_kind_and_shape(spec))
                   for spec, buffer in zip(outputs.tensors, outputs.buffers)}
        self._progress(1.0, "download")
        summary = Summary.from_message(self._receive("summary"), self._transport.name)
        self._complete = True
        return _result(tensors, summary)

    def _receive(self, expected: str) -> Any:
        try:
            response = next(self._call, None)
        except grpc.RpcError as error:
            raise PrefilldError.from_rpc(error) from error
        part = None if response is None else response.WhichOneof("part")
        if part != expected:
            raise data_loss(f"Attend sent {part} instead of its {expected}")
        return getattr(response, part)


def _result(outputs: dict[str, Any], summary: Summary) -> AttendResult:
    if "o" not in outputs:
        raise data_loss(f"Attend returned {', '.join(outputs)}, but no o")
    return AttendResult(
        o=outputs["o"], lse=outputs.get("lse"), block_count=outputs.get("block_count"),
        block_index=outputs.get("block_index"), pattern=outputs.get("pattern"),
        captured_mass=outputs.get("captured_mass"), summary=summary)


def _kind(spec: tensor_pb2.TensorSpec) -> str:
    """Its name in DTYPES."""
    _shape_and_type(spec)
    return type_name(spec.data_type)


def _kind_and_shape(spec: tensor_pb2.TensorSpec) -> tuple[str, tuple[int, ...]]:
    return _kind(spec), tuple(spec.shape)


def _shape_and_type(spec: tensor_pb2.TensorSpec) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if spec.data_type not in NUMPY_TYPES or not spec.shape or min(spec.shape) < 1:
        raise data_loss(f"output {spec.name} has type {spec.data_type}, shape {list(spec.shape)}")
    return tuple(spec.shape), NUMPY_TYPES[spec.data_type]


def _map(outputs: prefill_service_pb2.OutputSpecs, segments: Segments) -> list[np.ndarray]:
    if len(outputs.buffers) != len(outputs.tensors):
        raise data_loss(f"{len(outputs.buffers)} buffers for {len(outputs.tensors)} outputs")
    arrays = []
    for spec, buffer in zip(outputs.tensors, outputs.buffers):
        shape, kind = _shape_and_type(spec)
        arrays.append(segments.array(buffer, kind, shape))
    return arrays
