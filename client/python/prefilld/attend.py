"""One Attend call: hand over q, k and v once admitted, take the outputs back."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from .errors import PrefilldError, Retry
from .shm import Segments
from .sparsity import SparsityReport, Summary
from .tensors import (DTYPES, NUMPY_TYPES, Assembly, chunks, data_loss, dtype_name,
                      invalid, wire_array)
from .transport import TRANSPORTS, Transport
from .v1 import prefill_service_pb2, prefill_service_pb2_grpc, tensor_pb2

Progress = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class AttendResult:
    """Outputs of attend(). Without cu_seqlens `pattern` and `captured_mass` are [q_heads], with
    them [sequences, q_heads]; rows of blocks of all sequences are concatenated, key blocks count
    from the start of their sequence.

    Over posix_shm the arrays are views of one piece of shared memory, which nobody else uses any
    more: all of it, q, k and v included, is in use until the last of them is gone."""

    o: np.ndarray                      # [total_q, q_heads, head_dim], of q's type
    lse: np.ndarray | None             # [q_heads, total_q] float32, natural log
    block_count: np.ndarray | None     # [q_heads, q_blocks] int32
    block_index: np.ndarray | None     # [q_heads, q_blocks, max] int32, ascending, then -1
    pattern: np.ndarray | None         # uint8, index into PATTERNS
    captured_mass: np.ndarray | None   # float32
    summary: Summary
    transport: str = "grpc"            # the one that was used, "grpc" or "posix_shm"

    @property
    def report(self) -> SparsityReport:
        return self.summary.report

    @property
    def request_id(self) -> str:
        return self.summary.request_id


class AttendCall:
    """Everything of one call that does not change between attempts."""

    def __init__(self, header: prefill_service_pb2.AttendHeader, tensors: dict[str, np.ndarray],
                 dtype: str | None, progress: Progress):
        self._q_type = tensors["q"].dtype
        self._payloads: list[np.ndarray] = []  # as on the wire, but strided as the caller's
        self._progress = progress
        for name, array in tensors.items():
            if array.ndim != 3 or array.size == 0:
                raise invalid(f"{name} has shape {array.shape}: expected three dimensions, "
                              "each at least 1")
            kind = dtype_name(array, dtype)
            header.tensors.add(name=name, data_type=DTYPES[kind][0], shape=array.shape)
            self._payloads.append(wire_array(array, kind))
        self._header = header
        self._total = sum(payload.nbytes for payload in self._payloads)

    def run(self, stub: prefill_service_pb2_grpc.PrefillServiceStub, retry: Retry,
            transport: Transport) -> AttendResult:
        """Tries until it succeeds, is refused for good, or time is up. transport: this call's own.
        """
        while True:
            self._header.transport = transport.value
            admitted: queue.SimpleQueue[bool] = queue.SimpleQueue()
            call = None
            try:
                call = stub.Attend(self._requests(admitted), timeout=retry.remaining())
                return self._receive(call, admitted, transport)
            except (grpc.RpcError, PrefilldError) as error:
                failure = (error if isinstance(error, PrefilldError)
                           else PrefilldError.from_rpc(error))
                if transport.falls_back(failure):
                    continue
                if failure is error:  # found on this side: the same would come again
                    raise
                # The server may not have seen yet that the call over posix_shm is over.
                retry.after(failure, resumable=transport.fell_back
                            and failure.code is grpc.StatusCode.ALREADY_EXISTS)
            finally:
                if call is not None:
                    call.cancel()    # nothing to do when it ended by itself
                admitted.put(False)  # lets the thread that feeds the upload go

    def _requests(self, admitted: queue.SimpleQueue[bool]
                  ) -> Iterator[prefill_service_pb2.AttendRequest]:
        mapped = self._header.transport == TRANSPORTS["posix_shm"]
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
        segments = Segments(writable=True)
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
                summary = Summary.from_message(response.summary)
        if summary is None or not arrays or not (transport.mapped or assembly.done):
            raise data_loss("the stream of Attend ended before its last output or its summary")

        outputs = {spec.name: array for spec, array in zip(specs, arrays)}
        if "o" not in outputs:
            raise data_loss(f"Attend returned {', '.join(outputs)}, but no o")
        return AttendResult(
            o=outputs["o"].view(self._q_type), lse=outputs.get("lse"),
            block_count=outputs.get("block_count"), block_index=outputs.get("block_index"),
            pattern=outputs.get("pattern"), captured_mass=outputs.get("captured_mass"),
            summary=summary, transport=transport.name)


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
