"""Tensors in the memory of a GPU that caller and server both use: the server makes the memory and
hands out its descriptor, and this process maps it.

Nothing that the server says about memory is believed: a reference is checked against the name, the
GPU, the extent of the memory and the size of the tensor before it becomes one.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import memory_socket
from .cuda_driver import Driver, Mapped, driver
from .errors import refused
from .tensors import DTYPES, data_loss
from .torch_tensors import torch_type
from .v1 import tensor_pb2

_ALIGNMENT = 64  # bytes, of every tensor in its memory
_GPUS_MAX = 64   # that the contract takes
_PROBE = "probe"  # the name of some memory that is there to be tried


def domain() -> str:
    """Tells two processes whether they can share device memory: the kernel's boot id. Empty where
    the system does not tell."""
    return memory_socket.host()


def gpu(device: Any) -> Any:
    """torch's device, with its number, if it is a GPU, else None. device: torch's, a name of one,
    or None. Imports torch for a name."""
    if device is None:
        return None
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def gpu_of(tensors: Sequence[Any]) -> Any:
    """The GPU that all of these torch tensors lie on, else None."""
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 and tensors[0].is_cuda else None


def uuids() -> list[str]:
    """Of all GPUs that torch sees; none without torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [uuid(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def uuids_within_reach(device: Any) -> list[str]:
    """Of this GPU, then of those whose memory it reaches. None where this torch does not know
    (before 2.5)."""
    torch = sys.modules["torch"]
    peers = [torch.device("cuda", index) for index in range(torch.cuda.device_count())
             if index != device.index
             and torch.cuda.can_device_access_peer(device.index, index)]
    found = [uuid(one) for one in (device, *peers)]
    return found[:_GPUS_MAX] if all(found) else []


def uuid(device: Any) -> str:
    """Of one of torch's GPUs, as the contract names it."""
    properties = sys.modules["torch"].cuda.get_device_properties(device)
    found = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
    return found and f"GPU-{found}"


def synchronize(*devices: Any) -> None:
    """Waits for what this thread has enqueued on these GPUs, torch's devices."""
    for device in set(devices):
        sys.modules["torch"].cuda.current_stream(device).synchronize()


def probe(path: str, device: Any) -> None:
    """Maps memory that is there to be tried, writes to it and reads that again: whatever cannot be
    done here fails now. Blocks, two seconds at most and what the driver takes.

    path: of the server's socket. device: torch's, a GPU.
    FAILED_PRECONDITION: with the reason, one of TransportRefusal.Reason's names.
    """
    mapping = _Mapping(path, _PROBE, device.index)
    try:
        token = secrets.token_bytes(_ALIGNMENT)
        place = secrets.randbelow(mapping.memory.size // _ALIGNMENT) * _ALIGNMENT  # others try too
        mapping.driver.write(mapping.memory, place, token)
        if mapping.driver.read(mapping.memory, place, _ALIGNMENT) != token:
            raise refused("REASON_DRIVER", f"what was written to the server's memory on {device} "
                          "is not what was read")
    finally:
        mapping.close()


class Memory:
    """The device memory that one call was given, mapped when the first tensor in it is asked for.
    It stays mapped until `close` and as long as a tensor in it, whatever becomes of the call, and
    is in use on the server until then."""

    def __init__(self, path: str, device: Any):
        """path: of the server's socket. device: torch's, a GPU; the one to work on."""
        self._torch = sys.modules["torch"]
        self._path, self._device = path, device
        self._within_reach = uuids_within_reach(device)
        self._name = ""
        self._mapping: _Mapping | None = None

    def open(self, name: str) -> None:
        """Maps it before the first tensor is asked for. FAILED_PRECONDITION as `tensor`."""
        if self._mapping is None:
            self._mapping = _Mapping(self._path, name, self._device.index)
            self._name = name

    def tensor(self, reference: tensor_pb2.BufferRef, kind: str, shape: Sequence[int]) -> Any:
        """The tensor that lies at `reference`, without a copy. It is on the GPU whose memory it is:
        `device`, or one that `device` reaches.

        kind, shape: what it must be; kind is one of tensors.DTYPES.
        DATA_LOSS: the reference is no such tensor, or no place in the call's memory.
        FAILED_PRECONDITION: the memory cannot be mapped by this process; with the reason, one of
            TransportRefusal.Reason's names.
        """
        begin, length = reference.byte_offset, reference.byte_length
        count = int(np.prod(shape, dtype=object))  # of any size: a product must not wrap around
        if length != count * DTYPES[kind][1].itemsize or length == 0:
            raise data_loss(f"a tensor of {length} bytes where {kind} {list(shape)} is expected")
        if reference.device_uuid not in self._within_reach:
            raise data_loss(f"memory of GPU {reference.device_uuid!r}, which {self._device} does "
                            "not reach")
        if begin % _ALIGNMENT != 0:
            raise data_loss(f"a tensor at byte {begin}, which is no multiple of {_ALIGNMENT}")
        if not reference.name or self._name not in ("", reference.name):
            raise data_loss(f"memory {reference.name!r}: the tensors of a call lie in one piece of "
                            f"memory, {self._name!r}")
        self.open(reference.name)
        assert self._mapping is not None
        if begin + length > self._mapping.memory.size:
            raise data_loss(f"bytes {begin} to {begin + length} of memory that has "
                            f"{self._mapping.memory.size}")
        place = _Place(self._mapping, begin, kind, shape)
        owner = self._mapping.memory.gpus[-1]  # elsewhere torch would copy
        tensor = self._torch.as_tensor(place, device=self._torch.device("cuda", owner))
        if tensor.data_ptr() != place.address:
            raise refused("REASON_DRIVER", "this torch copies what it should only look at")
        return tensor if tensor.dtype == torch_type(kind) else tensor.view(torch_type(kind))

    def close(self) -> None:
        """From now on only tensors keep the memory mapped."""
        self._mapping = None


class _Mapping:
    """Memory of the server's in this process, until the last who holds this has gone. Then, on that
    thread, it is unmapped and the server told so: the connection closes. So too when the
    interpreter ends."""

    def __init__(self, path: str, name: str, gpu_number: int):
        self.driver = driver()
        connection, descriptor, size = memory_socket.receive(path, name)
        try:
            self.memory = self.driver.map(descriptor, size, gpu_number)
        except BaseException:
            connection.close()
            raise
        finally:
            os.close(descriptor)
        self.close = weakref.finalize(self, _unmap, self.driver, self.memory, connection)


def _unmap(by: Driver, memory: Mapped, connection: socket.socket) -> None:
    try:
        by.unmap(memory)
    finally:
        connection.close()


class _Place:
    """Device memory, as torch.as_tensor takes it. torch holds it as long as the tensor's storage,
    and so the mapping."""

    def __init__(self, mapping: _Mapping, begin: int, kind: str, shape: Sequence[int]):
        self.mapping = mapping
        self.address = mapping.memory.address + begin
        # There is no bfloat16 in this interface: its bits travel as int16.
        typestr = "<i2" if kind == "bf16" else DTYPES[kind][1].str
        self.__cuda_array_interface__ = {"shape": tuple(shape), "typestr": typestr,
                                         "data": (self.address, False), "version": 3}
