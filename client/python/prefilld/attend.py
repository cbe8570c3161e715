"""One Attend call: upload q, k and v once admitted, take the outputs back."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Iterator, Sequence

import grpc
import numpy as np

from .errors import PrefilldError, Retry
from .sparsity import SparsityReport, Summary
from .tensors import (DTYPES, NUMPY_TYPES, Assembly, chunks, data_loss, dtype_name,
                      invalid, wire_bytes)
from .v1 import prefill_service_pb2, prefill_service_pb2_grpc, tensor_pb2

Progress = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class AttendResult:
    """Outputs of attend(). Without cu_seqlens `pattern` and `captured_mass` are [q_heads], with
    them [sequences, q_heads]; rows of blocks of all sequences are concatenated, key blocks count
    from the start of their sequence."""

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


class AttendCall:
    """Everything of one call that does not change between attempts."""

    def __init__(self, header: prefill_service_pb2.AttendHeader, tensors: dict[str, np.ndarray],
                 dtype: str | None, progress: Progress):
        self._q_type = tensors["q"].dtype
        self._payloads: list[memoryview] = []
        self._progress = progress
        for name, array in tensors.items():
            if array.ndim != 3 or array.size == 0:
                raise invalid(f"{name} has shape {array.shape}: expected three dimensions, "
                              "each at least 1")
            kind = dtype_name(array, dtype)
            header.tensors.add(name=name, data_type=DTYPES[kind][0], shape=array.shape)
            self._payloads.append(wire_bytes(array, kind))
        self._header = header

    def run(self, stub: prefill_service_pb2_grpc.PrefillServiceStub, retry: Retry) -> AttendResult:
        """Tries until it succeeds, is refused for good, or time is up."""
        while True:
            admitted: queue.SimpleQueue[bool] = queue.SimpleQueue()
            call = None
            try:
                call = stub.Attend(self._requests(admitted), timeout=retry.remaining())
                return self._receive(call, admitted)
            except grpc.RpcError as error:
                retry.after(PrefilldError.from_rpc(error))
            finally:
                if call is not None:
                    call.cancel()    # nothing to do when it ended by itself
                admitted.put(False)  # lets the thread that feeds the upload go

    def _requests(self, admitted: queue.SimpleQueue[bool]
                  ) -> Iterator[prefill_service_pb2.AttendRequest]:
        yield prefill_service_pb2.AttendRequest(header=self._header)
        if not admitted.get():  # not a byte before admission
            return
        total, sent = sum(map(len, self._payloads)), 0
        for index, payload in enumerate(self._payloads):
            for chunk in chunks(index, payload):
                yield prefill_service_pb2.AttendRequest(chunk=chunk)
                sent += len(chunk.data)
                self._progress(sent / total, "upload")
        self._progress(0.0, "compute")

    def _receive(self, call, admitted: queue.SimpleQueue[bool]) -> AttendResult:
        specs: Sequence[tensor_pb2.TensorSpec] = ()
        arrays: list[np.ndarray] = []
        assembly = Assembly(arrays)
        summary = None
        self._progress(0.0, "queue")
        for response in call:
            part = response.WhichOneof("part")
            if part == "admission":
                admitted.put(True)
            elif part == "outputs":
                specs = response.outputs.tensors
                arrays = [_allocate(spec) for spec in specs]
                assembly = Assembly(arrays)
            elif part == "chunk":
                assembly.accept(response.chunk)
                self._progress(assembly.fraction, "download")
            elif part == "summary":
                summary = Summary.from_message(response.summary)
        if summary is None or not arrays or not assembly.done:
            raise data_loss("the stream of Attend ended before its last output or its summary")

        outputs = {spec.name: array for spec, array in zip(specs, arrays)}
        if "o" not in outputs:
            raise data_loss(f"Attend returned {', '.join(outputs)}, but no o")
        return AttendResult(
            o=outputs["o"].view(self._q_type), lse=outputs.get("lse"),
            block_count=outputs.get("block_count"), block_index=outputs.get("block_index"),
            pattern=outputs.get("pattern"), captured_mass=outputs.get("captured_mass"),
            summary=summary)


def _allocate(spec: tensor_pb2.TensorSpec) -> np.ndarray:
    if spec.data_type not in NUMPY_TYPES or not spec.shape or min(spec.shape) < 1:
        raise data_loss(f"output {spec.name} has type {spec.data_type}, shape {list(spec.shape)}")
    return np.empty(tuple(spec.shape), NUMPY_TYPES[spec.data_type])
