"""As much of torch, and of a GPU, as the client uses: tensors are numpy arrays, device memory is
this process's, and a handle is its address."""

import ctypes
import struct
import types

import numpy as np

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

    def __init__(self, array, device, bf16=False):
        self.array, self.device, self._bf16 = array, device, bf16

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
                      dtype == "bfloat16")

    def copy_(self, other):
        assert other.dtype == self.dtype and other.device == self.device
        self.array[...] = other.array

    def clone(self):
        return Tensor(self.array.copy(), self.device, self._bf16)

    def detach(self):
        return self

    def contiguous(self):
        return Tensor(np.ascontiguousarray(self.array), self.device, self._bf16)

    def cpu(self):
        return Tensor(self.array, Device("cpu"), self._bf16)

    def to(self, device):
        return Tensor(self.array.copy(), device, self._bf16)

    def numpy(self):
        assert not self.is_cuda and not self._bf16
        return self.array

    def data_ptr(self):
        return self.array.ctypes.data


def _as_tensor(place, device):
    interface = place.__cuda_array_interface__
    address, read_only = interface["data"]
    kind, shape = np.dtype(interface["typestr"]), interface["shape"]
    count = int(np.prod(shape)) * kind.itemsize
    memory = (ctypes.c_byte * count).from_address(address)
    assert not read_only
    return Tensor(np.frombuffer(memory, kind).reshape(shape), device)


class _Scope:
    def __init__(self, device):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def module():
    """What goes into sys.modules["torch"]."""
    torch = types.ModuleType("torch")
    torch.Tensor, torch.device, torch.as_tensor = Tensor, Device, _as_tensor
    torch.from_numpy = lambda array: Tensor(array, Device("cpu"))
    for name in ("float32", "float16", "bfloat16", "int32", "int16", "uint8", "float64"):
        setattr(torch, name, name)
    torch.cuda = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: len(GPUS), device=_Scope,
        current_device=lambda: 0,
        current_stream=lambda device: types.SimpleNamespace(synchronize=lambda: None),
        get_device_properties=lambda device: types.SimpleNamespace(
            uuid=GPUS[device.index].removeprefix("GPU-")))
    return torch


class Driver:
    """In place of cuda_ipc.driver()."""

    def __init__(self):
        self.sizes = {}     # of what exists, by address
        self.open_now = []  # addresses
        self.refuse = None  # an exception

    def open(self, handle):
        if self.refuse is not None:
            raise self.refuse
        (address,) = struct.unpack_from("<Q", handle)
        self.open_now.append(address)
        return address, self.sizes[address]

    def close(self, address):
        self.open_now.remove(address)
