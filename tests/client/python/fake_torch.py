"""As much of torch, and of a GPU, as the client uses: tensors are numpy arrays, and device memory
is a file that the fake driver maps (see fake_handout)."""

import ctypes
import mmap
import types

import numpy as np
from prefilld.cuda_driver import Mapped
from prefilld.errors import refused

GPUS = ["GPU-0", "GPU-1"]


class Device:
    def __init__(self, name, index=None):
        self.type, _, number = str(name).partition(":")
        self.index = int(number) if number else index

    def __eq__(self, other):
        return (self.type, self.index) == (other.type, other.index)

    def __hash__(self):
        return hash((self.type, self.index))

    def __str__(self):
        return self.type if self.index is None else f"{self.type}:{self.index}"


class Tensor:
    """bf16: the bits, in int16, mean bfloat16."""

    def __init__(self, array, device, bf16=False, storage=None):
        self.array, self.device, self._bf16, self._storage = array, device, bf16, storage

    @property
    def dtype(self):
        return "bfloat16" if self._bf16 else self.array.dtype.name

    shape = property(lambda self: self.array.shape)
    ndim = property(lambda self: self.array.ndim)
    nbytes = property(lambda self: self.array.nbytes)
    is_cuda = property(lambda self: self.device.type == "cuda")

    def view(self, dtype):
        assert self.array.itemsize == 2
        return Tensor(self.array.view(np.int16 if dtype == "bfloat16" else dtype), self.device,
                      dtype == "bfloat16", self._storage)

    def copy_(self, other):
        assert other.dtype == self.dtype
        self.array[...] = other.array

    def detach(self):
        return self

    def contiguous(self):
        return Tensor(np.ascontiguousarray(self.array), self.device, self._bf16)

    def cpu(self):
        return Tensor(self.array, Device("cpu"), self._bf16)

    def to(self, device, copy=False):
        if device == self.device and not copy:
            return self
        return Tensor(self.array.copy(), device, self._bf16)

    def numpy(self):
        assert not self.is_cuda and not self._bf16
        return self.array

    def data_ptr(self):
        return self.array.ctypes.data


def _as_tensor(place, device, driver):
    """On the GPU whose memory it is; a view, which holds `place`."""
    interface = place.__cuda_array_interface__
    address, read_only = interface["data"]
    kind, shape = np.dtype(interface["typestr"]), interface["shape"]
    count = int(np.prod(shape)) * kind.itemsize
    memory = (ctypes.c_byte * count).from_address(address)
    assert not read_only
    return Tensor(np.frombuffer(memory, kind).reshape(shape), Device("cuda", driver.owner),
                  storage=place).to(device)


def module(driver):
    """What goes into sys.modules["torch"]. driver: a Driver."""
    torch = types.ModuleType("torch")
    torch.Tensor, torch.device = Tensor, Device
    torch.as_tensor = lambda place, device: _as_tensor(place, device, driver)
    torch.from_numpy = lambda array: Tensor(array, Device("cpu"))
    for name in ("float32", "float16", "bfloat16", "int32", "int16", "uint8", "float64"):
        setattr(torch, name, name)
    torch.cuda = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: len(GPUS), current_device=lambda: 0,
        current_stream=lambda device: types.SimpleNamespace(synchronize=lambda: None),
        can_device_access_peer=lambda device, peer: {device, peer} in driver.peers,
        get_device_properties=lambda device: types.SimpleNamespace(
            uuid=GPUS[device.index].removeprefix("GPU-")))
    return torch


class Driver:
    """In place of cuda_ipc.driver()."""

    def __init__(self):
        self.owner = 1      # the GPU whose memory all of it is
        self.peers = []     # sets of two that reach each other
        self.mapped = []    # now
        self.refuse = []    # exceptions of the next mappings; None: a mapping that goes well
        self._kept = []     # so that a tensor used too late is wrong, not a crash

    def map(self, descriptor, size, gpu):
        failure = self.refuse.pop(0) if self.refuse else None
        if failure is not None:
            raise failure
        try:
            self._kept.append(mmap.mmap(descriptor, size))
        except (OSError, ValueError) as error:
            raise refused("REASON_DESCRIPTOR", f"no such memory: {error}") from error
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._kept[-1]))
        self.mapped.append(Mapped(address, size, tuple(dict.fromkeys((gpu, self.owner)))))
        return self.mapped[-1]

    def unmap(self, memory):
        self.mapped.remove(memory)

    def write(self, memory, offset, data):
        ctypes.memmove(memory.address + offset, data, len(data))

    def read(self, memory, offset, size):
        return ctypes.string_at(memory.address + offset, size)
