"""What the CUDA driver does with memory that another process has made (cuMemCreate): it is imported
by its descriptor, and mapped. By ctypes: neither torch nor the CUDA toolkit is needed.

Every call makes the GPU's primary context, which is torch's, that of the calling thread while it
runs. From any thread. GPUs are named by their number, as torch numbers them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import threading
from collections.abc import Iterator

from .errors import PrefilldError, refused

_ON_A_DEVICE = 1       # CU_MEM_LOCATION_TYPE_DEVICE
_FILE_DESCRIPTOR = 1   # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_READ_AND_WRITE = 3    # CU_MEM_ACCESS_FLAGS_PROT_READWRITE: the driver has no read-only mappings
_MINIMUM = 0           # CU_MEM_ALLOC_GRANULARITY_MINIMUM
_INVALID = (1, 400)    # CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_HANDLE


class _Location(ctypes.Structure):  # CUmemLocation
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationFlags(ctypes.Structure):
    _fields_ = [("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte),
                ("usage", ctypes.c_ushort), ("reserved", ctypes.c_ubyte * 4)]


class _Properties(ctypes.Structure):  # CUmemAllocationProp, 32 bytes since CUDA 10.2
    _fields_ = [("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", _Location),
                ("win32_meta_data", ctypes.c_void_p), ("flags", _AllocationFlags)]


class _Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_U64, _SIZE, _INT, _ANY = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
_OUT = ctypes.POINTER
# Addresses and handles are 64 bits, sizes size_t; every call returns a CUresult.
_SIGNATURES = {
    "cuInit": [ctypes.c_uint],
    "cuGetErrorString": [_INT, _OUT(ctypes.c_char_p)],
    "cuDeviceGet": [_OUT(_INT), _INT],
    "cuDevicePrimaryCtxRetain": [_OUT(_ANY), _INT],
    "cuCtxPushCurrent_v2": [_ANY],
    "cuCtxPopCurrent_v2": [_OUT(_ANY)],
    "cuCtxSynchronize": [],
    "cuMemImportFromShareableHandle": [_OUT(_U64), _ANY, _INT],
    "cuMemGetAllocationPropertiesFromHandle": [_OUT(_Properties), _U64],
    "cuMemGetAllocationGranularity": [_OUT(_SIZE), _OUT(_Properties), _INT],
    "cuMemAddressReserve": [_OUT(_U64), _SIZE, _SIZE, _U64, ctypes.c_ulonglong],
    "cuMemAddressFree": [_U64, _SIZE],
    "cuMemMap": [_U64, _SIZE, _SIZE, _U64, ctypes.c_ulonglong],
    "cuMemSetAccess": [_U64, _SIZE, _OUT(_Access), _SIZE],
    "cuMemUnmap": [_U64, _SIZE],
    "cuMemRelease": [_U64],
    "cuMemcpyHtoD_v2": [_U64, _ANY, _SIZE],
    "cuMemcpyDtoH_v2": [_ANY, _U64, _SIZE],
}


@dataclasses.dataclass(frozen=True)
class Mapped:
    address: int
    size: int               # bytes
    gpus: tuple[int, ...]   # that reach it: the one it was mapped for, and the one it is of


class Driver:
    """Calls fail with FAILED_PRECONDITION, reason REASON_DRIVER, or REASON_DESCRIPTOR where what is
    to be imported is not what was said."""

    def __init__(self):
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
            for name, arguments in _SIGNATURES.items():
                getattr(self._cuda, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise refused("REASON_DRIVER", f"there is no CUDA driver here: {error}") from error
        self._lock = threading.RLock()  # a collector of garbage may come to unmap within it
        self._contexts: dict[int, ctypes.c_void_p] = {}  # retained until the process ends
        self._call("cuInit", 0)

    def map(self, descriptor: int, size: int, gpu: int) -> Mapped:
        """Maps the memory of which `descriptor` is, all `size` bytes, for this GPU. The descriptor
        stays the caller's, and may be closed then."""
        with self._on(gpu), contextlib.ExitStack() as imported:
            handle = _U64()
            self._call("cuMemImportFromShareableHandle", handle, descriptor, _FILE_DESCRIPTOR)
            imported.callback(self._cuda.cuMemRelease, handle)  # a mapping keeps the memory itself
            properties, unit = _Properties(), _SIZE()
            self._call("cuMemGetAllocationPropertiesFromHandle", properties, handle)
            self._call("cuMemGetAllocationGranularity", unit, properties, _MINIMUM)
            if properties.location.type != _ON_A_DEVICE or size % max(1, unit.value) != 0:
                raise refused("REASON_DESCRIPTOR",
                              f"memory of {size} bytes at a location of type "
                              f"{properties.location.type}: multiples of {unit.value} bytes on a "
                              "GPU are mapped")
            gpus = tuple(dict.fromkeys((gpu, properties.location.id)))
            with contextlib.ExitStack() as undo:
                address = _U64()
                self._call("cuMemAddressReserve", address, size, 0, 0, 0)
                undo.callback(self._cuda.cuMemAddressFree, address, size)
                self._call("cuMemMap", address, size, 0, handle, 0)
                undo.callback(self._cuda.cuMemUnmap, address, size)
                access = (_Access * len(gpus))(*(
                    _Access(_Location(_ON_A_DEVICE, one), _READ_AND_WRITE) for one in gpus))
                self._call("cuMemSetAccess", address, size, access, len(gpus))
                undo.pop_all()
        return Mapped(address.value, size, gpus)

    def unmap(self, memory: Mapped) -> None:
        """Waits for all that these GPUs were given to do, which may still read the memory, then
        lets go of it. Fails never: what a GPU that broke down still maps ends with the process."""
        for gpu in memory.gpus:
            with contextlib.suppress(PrefilldError), self._on(gpu):
                self._cuda.cuCtxSynchronize()
        self._cuda.cuMemUnmap(memory.address, memory.size)
        self._cuda.cuMemAddressFree(memory.address, memory.size)

    def write(self, memory: Mapped, offset: int, data: bytes) -> None:
        """Returns when the bytes are there."""
        with self._on(memory.gpus[0]):
            self._call("cuMemcpyHtoD_v2", memory.address + offset, data, len(data))
            self._call("cuCtxSynchronize")

    def read(self, memory: Mapped, offset: int, size: int) -> bytes:
        with self._on(memory.gpus[0]):
            data = ctypes.create_string_buffer(size)
            self._call("cuMemcpyDtoH_v2", data, memory.address + offset, size)
            return data.raw

    @contextlib.contextmanager
    def _on(self, gpu: int) -> Iterator[None]:
        """With the GPU's primary context."""
        with self._lock:
            if gpu not in self._contexts:
                device, context = _INT(), _ANY()
                self._call("cuDeviceGet", device, gpu)
                self._call("cuDevicePrimaryCtxRetain", context, device)
                self._contexts[gpu] = context
        self._call("cuCtxPushCurrent_v2", self._contexts[gpu])
        try:
            yield
        finally:
            self._cuda.cuCtxPopCurrent_v2(_ANY())

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._cuda, name)(*arguments)
        if error != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(error, text)
            not_as_said = error in _INVALID and name in ("cuMemImportFromShareableHandle",
                                                         "cuMemMap")
            raise refused(
                "REASON_DESCRIPTOR" if not_as_said else "REASON_DRIVER",
                f"device memory of the server cannot be used here: {name}: "
                f"{(text.value or b'?').decode()} (CUresult {error})")


@functools.cache
def driver() -> Driver:
    """This process's. FAILED_PRECONDITION where there is none."""
    return Driver()
