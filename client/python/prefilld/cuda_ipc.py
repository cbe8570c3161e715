"""Tensors in the memory of a GPU that caller and server both use: the server makes the memory, and
this process opens it by its handle.

Nothing that the server says about memory is believed: a reference is checked against the handle's
size, the GPU, the extent of the memory and the size of the tensor before it becomes one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from .errors import PrefilldError
from .tensors import DTYPES, data_loss
from .torch_tensors import torch_type
from .v1 import tensor_pb2

_BOOT_ID = "/proc/sys/kernel/random/boot_id"  # of the kernel
_PID_NAMESPACE = "/proc/self/ns/pid"
_HANDLE_BYTES = 64
_ALIGNMENT = 64  # bytes, of every tensor in its memory
_LAZY_PEER_ACCESS = 1  # the only flag that the driver takes


def domain() -> str:
    """Tells two processes whether they can open each other's device memory: the kernel's boot id,
    ":", st_ino of the PID namespace. Empty where the system does not tell."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return f"{file.read().strip()}:{os.stat(_PID_NAMESPACE).st_ino}"
    except OSError:
        return ""


def uuid_of(tensors: Sequence[Any]) -> str:
    """The GPU that all of these torch tensors lie on, as the contract names it. Empty when they do
    not, or when this torch does not know (before 2.5)."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or not tensors[0].is_cuda:
        return ""
    return uuid(tensors[0].device)


def uuids() -> list[str]:
    """Of all GPUs that torch sees; none without torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [uuid(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def uuid(device: Any) -> str:
    """Of one of torch's GPUs."""
    properties = sys.modules["torch"].cuda.get_device_properties(device)
    found = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
    return found and f"GPU-{found}"


class Memory:
    """The device memory that one call was given, opened when the first tensor in it is asked for.
    Tensors in it must not be used after `close`."""

    def __init__(self, device: Any):
        """device: torch's, a GPU."""
        self._torch = sys.modules["torch"]
        self._device = device
        self._handle = b""
        self._begin = self._size = 0  # of what is open

    def tensor(self, reference: tensor_pb2.BufferRef, kind: str, shape: Sequence[int]) -> Any:
        """The tensor that lies at `reference`, without a copy.

        kind, shape: what it must be; kind is one of tensors.DTYPES.
        DATA_LOSS: the reference is no such tensor, or no place in the call's memory.
        FAILED_PRECONDITION: the memory cannot be opened by this process.
        """
        begin, length = reference.byte_offset, reference.byte_length
        count = int(np.prod(shape, dtype=object))  # of any size: a product must not wrap around
        if length != count * DTYPES[kind][1].itemsize or length == 0:
            raise data_loss(f"a tensor of {length} bytes where {kind} {list(shape)} is expected")
        if len(reference.cuda_ipc_handle) != _HANDLE_BYTES:
            raise data_loss(f"a handle of {len(reference.cuda_ipc_handle)} bytes")
        if reference.device_uuid != uuid(self._device):
            raise data_loss(f"memory of GPU {reference.device_uuid!r}, not of {self._device}")
        if begin % _ALIGNMENT != 0:
            raise data_loss(f"a tensor at byte {begin}, which is no multiple of {_ALIGNMENT}")
        if not self._handle:
            self._open(reference.cuda_ipc_handle)
        if reference.cuda_ipc_handle != self._handle:
            raise data_loss("a second handle: the tensors of a call lie in one piece of memory")
        if begin + length > self._size:
            raise data_loss(f"bytes {begin} to {begin + length} of memory that has {self._size}")
        place = _Place(self._begin + begin, kind, shape)
        tensor = self._torch.as_tensor(place, device=self._device)
        if tensor.data_ptr() != place.address:
            raise PrefilldError(grpc.StatusCode.FAILED_PRECONDITION,
                                "this torch copies what it should only look at")
        return tensor if tensor.dtype == torch_type(kind) else tensor.view(torch_type(kind))

    def synchronize(self) -> None:
        """Waits for what this thread has enqueued on the GPU."""
        self._torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Waits for copies that still read the memory, and lets go of it."""
        if not self._handle:
            return
        self.synchronize()
        self._handle = b""
        with self._torch.cuda.device(self._device):
            driver().close(self._begin)

    def _open(self, handle: bytes) -> None:
        with self._torch.cuda.device(self._device):
            self.synchronize()  # makes torch's context this thread's
            self._begin, self._size = driver().open(handle)
        self._handle = handle


class _Place:
    """Device memory, as torch.as_tensor takes it."""

    def __init__(self, address: int, kind: str, shape: Sequence[int]):
        self.address = address
        # There is no bfloat16 in this interface: its bits travel as int16.
        typestr = "<i2" if kind == "bf16" else DTYPES[kind][1].str
        self.__cuda_array_interface__ = {"shape": tuple(shape), "typestr": typestr,
                                         "data": (address, False), "version": 3}


class _Driver:
    """The three calls of the CUDA driver that torch does not offer."""

    class _Handle(ctypes.Structure):
        _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]

    def __init__(self):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        pointer, size = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t)
        self._cuda.cuIpcOpenMemHandle_v2.argtypes = [pointer, self._Handle, ctypes.c_uint]
        self._cuda.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
        self._cuda.cuMemGetAddressRange_v2.argtypes = [pointer, size, ctypes.c_uint64]

    def open(self, handle: bytes) -> tuple[int, int]:
        """(address, bytes). In the device's current context, as is `close`."""
        address, base, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
        self._check("opened", self._cuda.cuIpcOpenMemHandle_v2(
            address, self._Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS))
        try:
            self._check("measured", self._cuda.cuMemGetAddressRange_v2(base, size, address))
        except PrefilldError:
            self.close(address.value)
            raise
        return address.value, base.value + size.value - address.value

    def close(self, address: int) -> None:
        self._check("closed", self._cuda.cuIpcCloseMemHandle(address))

    def _check(self, what: str, error: int) -> None:
        if error != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(error, ctypes.byref(text))
            raise PrefilldError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"device memory of the server cannot be {what} here: "
                f"{(text.value or b'?').decode()} (CUresult {error})")


@functools.cache
def driver() -> _Driver:
    return _Driver()
