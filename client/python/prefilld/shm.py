"""Tensors in memory of the host that caller and server share: the server makes it, hands out its
descriptor and names where they lie, and they are mapped instead of sent.

Nothing that the server says about memory is believed: a reference is checked against the extent of
the memory and the size of the tensor before it becomes one, and only memory that nobody can
truncate under us is mapped at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import queue
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from . import memory_socket
from .errors import PrefilldError, refused
from .tensors import data_loss
from .v1 import tensor_pb2

_NAME = re.compile(r"[0-9A-Za-z_-]{1,64}", re.ASCII)
_PROBE = "probe_shm"  # the name of some memory that is there to be tried
_ALIGNMENT = 64  # bytes, of every tensor in its memory
_F_GET_SEALS, _F_SEAL_SHRINK = 1034, 2  # linux/fcntl.h

# A read fault maps the 64 KiB around it (Linux's default), as far as they are in memory: a touch
# for each of those is cheaper than MAP_POPULATE, which goes page by page. And numpy lets other
# Python threads run only while it works on many elements (more than 500).
_TOUCH_BYTES = 1 << 16
_TOUCHES_AT_LEAST = 512

# A mapping needs no descriptor; before 3.13 the mmap module keeps one for each all the same.
_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def domain() -> str:
    """Tells two processes whether they can share memory of the host, and that they do it by
    descriptors. Empty where the system does not tell."""
    host = memory_socket.host()
    return host and f"memfd:{host}"


def probe(path: str) -> None:
    """Maps memory that is there to be tried and reads it: whatever cannot be done here fails now.
    Blocks, two seconds at most. path: of the server's socket.
    FAILED_PRECONDITION: with the reason, one of TransportRefusal.Reason's names.
    """
    with _map(path, _PROBE, writable=False) as mapping:
        mapping.read(1)


class Segments:
    """The memory that one call was given, mapped when the first tensor in it is asked for. It stays
    mapped until `close` and as long as an array in it, whatever becomes of the call, and is in use
    on the server until then. Safe to share between threads."""

    def __init__(self, path: str, writable: bool = False):
        """path: of the server's socket."""
        self._path, self._writable = path, writable
        self._lock = threading.Lock()
        self._mappings: dict[str, mmap.mmap] = {}
        self._closed = False

    def close(self) -> None:
        """From now on nothing is mapped, and only arrays keep their mapping."""
        with self._lock:
            self._closed = True
            self._mappings.clear()

    def array(self, reference: tensor_pb2.BufferRef, kind: np.dtype[Any],
              shape: Sequence[int]) -> np.ndarray:
        """The tensor that lies at `reference`, without a copy; read-only unless `writable`.

        kind, shape: what it must be.
        DATA_LOSS: the reference is no such tensor, or no place in the memory of its name.
        FAILED_PRECONDITION: the memory cannot be had or mapped by this process; with the reason,
            one of TransportRefusal.Reason's names.
        """
        length = reference.byte_length
        count = int(np.prod(shape, dtype=object))  # of any size: a product must not wrap around
        if length != count * kind.itemsize or length == 0:
            raise data_loss(f"a tensor of {length} bytes where {kind} {list(shape)} is expected")
        mapping = self._mapping_of(reference)
        return np.frombuffer(mapping, kind, count, reference.byte_offset).reshape(tuple(shape))

    def touch(self, reference: tensor_pb2.BufferRef) -> None:
        """Makes the tensor's pages known to this process, so that who reads it next takes no fault.
        Does nothing with a reference that `array` would refuse."""
        with contextlib.suppress(PrefilldError):
            mapping, length = self._mapping_of(reference), reference.byte_length
            stride = max(1, min(_TOUCH_BYTES, length // _TOUCHES_AT_LEAST))
            tensor = np.frombuffer(mapping, np.uint8, length, reference.byte_offset)
            np.bitwise_or.reduce(tensor[::stride])

    def _mapping_of(self, reference: tensor_pb2.BufferRef) -> mmap.mmap:
        """Holds the whole of what `reference` names."""
        name, begin, length = reference.name, reference.byte_offset, reference.byte_length
        if not _NAME.fullmatch(name):
            raise data_loss(f"{name!r} is no name of memory")
        if begin % _ALIGNMENT != 0:
            raise data_loss(f"a tensor at byte {begin}, which is no multiple of {_ALIGNMENT}")
        with self._lock:
            if self._closed:
                raise PrefilldError(grpc.StatusCode.CANCELLED, "the call is over")
            if name not in self._mappings:
                self._mappings[name] = _map(self._path, name, self._writable)
            mapping = self._mappings[name]
        if begin + length > len(mapping):
            raise data_loss(f"bytes {begin} to {begin + length} of memory that has {len(mapping)}")
        return mapping


def _map(path: str, name: str, writable: bool) -> mmap.mmap:
    """The whole memory of that name. The server is told when the mapping goes: the connection
    closes."""
    connection, descriptor, size = memory_socket.receive(path, name)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        _check(descriptor, size, name)
        mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection, **_NO_DESCRIPTOR)
    except BaseException as error:
        connection.close()
        if isinstance(error, (OSError, ValueError, OverflowError)):
            raise refused("REASON_SEGMENT", f"memory {name} of {size} bytes cannot be mapped here: "
                          f"{error}") from error
        raise
    finally:
        os.close(descriptor)
    weakref.finalize(mapping, connection.close)
    return mapping


def _check(descriptor: int, size: int, name: str) -> None:
    """That it has the pages that it is said to have, and will have them: a read of one that is gone
    would end this process. Pages of another size than the system's could run out."""
    try:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError:  # of no such file
        seals = 0
    found = os.fstat(descriptor).st_size
    if (not seals & _F_SEAL_SHRINK or found < size
            or os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE):
        raise refused("REASON_DESCRIPTOR", f"the descriptor of {name} is of {found} bytes where "
                      f"{size} were said, with seals {seals:#x}")


def read_ahead(stream: Iterable[tensor_pb2.TensorChunk],
               segments: Segments) -> Iterator[tensor_pb2.TensorChunk]:
    """Yields what `stream` yields and raises what it raises, but another thread reads it and
    touches the tensors as soon as they are named: who copies one does not wait for the next. The
    thread ends with the stream, so the stream must be cancelled when this is left early."""
    arrived: queue.SimpleQueue[tensor_pb2.TensorChunk | Exception | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for chunk in stream:
                segments.touch(chunk.buffer)
                arrived.put(chunk)
            arrived.put(None)
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=read, name="prefilld-read-ahead", daemon=True).start()
    while (item := arrived.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


class MappedTensors:
    """What Assembly is for chunks with bytes, for chunks that name where a tensor lies: one each,
    in order. After an error `index` still says what is good."""

    offset = 0  # no tensor is here in part

    def __init__(self, tensor: Callable[[tensor_pb2.BufferRef], Any], count: int, layer: int):
        """tensor: the one that lies at a reference. count: of tensors. layer: the one that every
        chunk must name."""
        self._tensor = tensor
        self._count = count
        self._layer = layer
        self.arrays: list[Any] = []  # those that are here

    @property
    def index(self) -> int:
        """The tensor that comes next."""
        return len(self.arrays)

    @property
    def done(self) -> bool:
        return self.index == self._count

    @property
    def fraction(self) -> float:
        return self.index / self._count

    def accept(self, chunk: tensor_pb2.TensorChunk) -> None:
        """Maps one tensor. DATA_LOSS when it is not the one that must come next,
        FAILED_PRECONDITION when it cannot be mapped by this process."""
        got = (chunk.layer, chunk.tensor_index, chunk.byte_offset)
        expected = (self._layer, self.index, 0)
        if got != expected or self.done:
            raise data_loss(f"chunk out of order: (layer, tensor, offset) {got}, "
                            f"expected {expected}")
        if not chunk.HasField("buffer") or chunk.data or not chunk.last:
            raise data_loss(f"the chunk at (layer, tensor, offset) {got} does not name where a "
                            "whole tensor lies")
        self.arrays.append(self._tensor(chunk.buffer))
