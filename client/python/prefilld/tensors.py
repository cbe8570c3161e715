"""Tensors between numpy and the wire: dtypes, and the chunks that carry the bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import grpc
import numpy as np

from .errors import PrefilldError
from .v1 import tensor_pb2

CHUNK_BYTES = 1 << 20  # the contract's largest

# The names that arguments use, and numpy's type for the bytes (numpy has no bfloat16).
DTYPES: dict[str, tuple[tensor_pb2.DataType, np.dtype[Any]]] = {
    "f32": (tensor_pb2.DATA_TYPE_F32, np.dtype("<f4")),
    "bf16": (tensor_pb2.DATA_TYPE_BF16, np.dtype("<u2")),
    "f16": (tensor_pb2.DATA_TYPE_F16, np.dtype("<f2")),
    "i32": (tensor_pb2.DATA_TYPE_I32, np.dtype("<i4")),
    "u8": (tensor_pb2.DATA_TYPE_U8, np.dtype("u1")),
}
NUMPY_TYPES: dict[int, np.dtype[Any]] = dict(DTYPES.values())


def data_type(name: str | None) -> tensor_pb2.DataType:
    """The wire's type of "f32", "bf16" or "f16"; unspecified for None."""
    if name is None:
        return tensor_pb2.DATA_TYPE_UNSPECIFIED
    if name not in ("f32", "bf16", "f16"):
        raise invalid(f"dtype {name!r} is not one of f32, bf16, f16")
    return DTYPES[name][0]


def type_name(kind: int) -> str:
    """The name in DTYPES of one of the wire's types that is in NUMPY_TYPES."""
    return next(name for name, (value, _) in DTYPES.items() if value == kind)


def invalid(message: str) -> PrefilldError:
    return PrefilldError(grpc.StatusCode.INVALID_ARGUMENT, message)


def data_loss(message: str) -> PrefilldError:
    return PrefilldError(grpc.StatusCode.DATA_LOSS, message)


def dtype_name(array: np.ndarray, dtype: str | None) -> str:
    """What the elements are: from the array's type, or `dtype` for bfloat16 kept as uint16. An
    ml_dtypes.bfloat16 array is recognised by its name; the package is not needed."""
    if array.dtype.name == "bfloat16":
        found = "bf16"
    elif array.dtype == np.uint16 and dtype == "bf16":
        found = "bf16"
    elif array.dtype in (np.dtype(np.float32), np.dtype(np.float16)):
        found = "f32" if array.dtype.itemsize == 4 else "f16"
    else:
        raise invalid(f"array of {array.dtype}: expected float32, float16, bfloat16, or uint16 "
                      "with dtype='bf16'")
    if dtype not in (None, found):
        raise invalid(f"array of {array.dtype} does not hold dtype {dtype!r}")
    return found


def wire_array(array: np.ndarray, name: str) -> np.ndarray:
    """The array with the wire's type of element, without a copy where it has that already."""
    raw = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    return raw.astype(DTYPES[name][1], copy=False)


def widen_bf16(raw: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def chunks(index: int, data: memoryview) -> Iterator[tensor_pb2.TensorChunk]:
    """The chunks of one tensor, in order, each with its checksum."""
    for offset in range(0, len(data), CHUNK_BYTES):
        piece = bytes(data[offset:offset + CHUNK_BYTES])
        yield tensor_pb2.TensorChunk(
            tensor_index=index, byte_offset=offset, crc32c=google_crc32c.value(piece),
            last=offset + len(piece) == len(data), data=piece)


class Assembly:
    """Fills tensors from their chunks. A chunk is checked before a byte of it is kept: position,
    length, end mark, checksum. After an error `index` and `offset` still say what is good, so a
    transfer can go on from there."""

    def __init__(self, arrays: Sequence[np.ndarray], layer: int = 0):
        """arrays: C-contiguous, filled in place. layer: the one that every chunk must name."""
        self.arrays = arrays
        self._targets = [array.data.cast("B") for array in arrays]
        self._layer = layer
        self.index = 0    # the tensor that comes next
        self.offset = 0   # bytes of it that are here

    @property
    def done(self) -> bool:
        return self.index == len(self._targets)

    @property
    def fraction(self) -> float:
        """Bytes here / bytes in all."""
        sizes = [len(target) for target in self._targets]
        return (sum(sizes[:self.index]) + self.offset) / sum(sizes)

    def accept(self, chunk: tensor_pb2.TensorChunk) -> None:
        """Keeps one chunk. PrefilldError DATA_LOSS when it is not the one that must come next."""
        if self.done:
            raise data_loss("a chunk came after the last tensor")
        got = (chunk.layer, chunk.tensor_index, chunk.byte_offset)
        expected = (self._layer, self.index, self.offset)
        if got != expected:
            raise data_loss(f"chunk out of order: (layer, tensor, offset) {got}, "
                            f"expected {expected}")
        target = self._targets[self.index]
        end = self.offset + len(chunk.data)
        if not chunk.data or end > len(target):
            raise data_loss(f"chunk of {len(chunk.data)} bytes at offset {self.offset} of a tensor "
                            f"of {len(target)} bytes")
        if chunk.last != (end == len(target)):
            raise data_loss(f"end mark {chunk.last} at byte {end} of {len(target)}")
        if google_crc32c.value(chunk.data) != chunk.crc32c:
            raise data_loss(f"checksum of the chunk at (layer, tensor, offset) {got} does not "
                            "match")
        target[self.offset:end] = chunk.data
        self.offset = end
        if chunk.last:
            self.index, self.offset = self.index + 1, 0
