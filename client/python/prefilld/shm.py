"""Tensors in POSIX shared memory: a server on the same host names where they lie, and they are
mapped instead of sent.

Nothing that the server says about memory is believed: a reference is checked against the name's
form, the size of the file and the size of the tensor before a byte is mapped.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import queue
import re
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from .errors import PrefilldError
from .tensors import data_loss
from .v1 import tensor_pb2

_DIRECTORY = "/dev/shm"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"  # of the kernel
_NAME = re.compile(r"/prefilld-[0-9A-Za-z._-]{1,200}", re.ASCII)
_ALIGNMENT = 64  # bytes, of every tensor in its segment

# A read fault maps the 64 KiB around it (Linux's default), as far as they are in memory: a touch
# for each of those is cheaper than MAP_POPULATE, which goes page by page. And numpy lets other
# Python threads run only while it works on many elements (more than 500).
_TOUCH_BYTES = 1 << 16
_TOUCHES_AT_LEAST = 512

# A mapping needs no descriptor; before 3.13 the mmap module keeps one for each all the same.
_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def domain() -> str:
    """Tells two processes whether they see the same /dev/shm: the kernel's boot id, ":", st_dev of
    /dev/shm. Empty where there is none."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return f"{file.read().strip()}:{os.stat(_DIRECTORY).st_dev}"
    except OSError:
        return ""


class Segments:
    """The segments that one call was given, each mapped once, when the first tensor in it is asked
    for. A mapping lives until `close` and as long as an array in it, whatever becomes of the name.
    Safe to share between threads."""

    def __init__(self, writable: bool = False):
        self._writable = writable
        self._lock = threading.Lock()
        self._mappings: dict[str, mmap.mmap] = {}
        self._closed: list[weakref.ref[mmap.mmap]] = []

    def close(self) -> None:
        """From now on only arrays keep their mapping."""
        with self._lock:
            self._closed += map(weakref.ref, self._mappings.values())
            self._mappings.clear()

    @property
    def unmapped(self) -> bool:
        """Something was mapped, and nothing is any more."""
        with self._lock:
            return (bool(self._closed) and not self._mappings
                    and all(mapping() is None for mapping in self._closed))

    def array(self, reference: tensor_pb2.BufferRef, kind: np.dtype[Any],
              shape: Sequence[int]) -> np.ndarray:
        """The tensor that lies at `reference`, without a copy; read-only unless `writable`.

        kind, shape: what it must be.
        DATA_LOSS: the reference is no such tensor, or no place in a segment.
        FAILED_PRECONDITION: the segment cannot be opened or mapped by this process.
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
            raise data_loss(f"{name!r} is no name of a segment")
        if begin % _ALIGNMENT != 0:
            raise data_loss(f"a tensor at byte {begin}, which is no multiple of {_ALIGNMENT}")
        with self._lock:
            if name not in self._mappings:
                self._mappings[name] = _map(name, self._writable)
            mapping = self._mappings[name]
        if begin + length > len(mapping):
            raise data_loss(f"bytes {begin} to {begin + length} of segment {name}, which has "
                            f"{len(mapping)}")
        return mapping


def _map(name: str, writable: bool) -> mmap.mmap:
    """The whole segment."""
    flags = os.O_RDWR if writable else os.O_RDONLY
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        # Neither a link nor a pipe is followed or waited for.
        descriptor = os.open(_DIRECTORY + name,
                             flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
                raise data_loss(f"{name} is no segment: mode {found.st_mode:o}, "
                                f"{found.st_size} bytes")
            return mmap.mmap(descriptor, found.st_size, mmap.MAP_SHARED, protection,
                             **_NO_DESCRIPTOR)
        finally:
            os.close(descriptor)
    except OSError as error:
        ever = error.errno in (errno.EACCES, errno.EPERM)  # another user's, or a sandbox
        raise PrefilldError(grpc.StatusCode.FAILED_PRECONDITION,
                            f"segment {name} cannot be mapped here: {error}",
                            reason="REASON_SEGMENT" if ever else None) from error


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
