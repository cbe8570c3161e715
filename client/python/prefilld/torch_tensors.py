"""torch tensors beside numpy arrays: what they are on the wire, and where they lie. torch is never
imported from here: who passes a tensor has it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .tensors import DTYPES, invalid

# The wire's names of the types that outputs have.
_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i32": "int32", "u8": "uint8"}


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(tensor: Any, dtype: str | None) -> str:
    """As tensors.dtype_name."""
    for found in ("f32", "bf16", "f16"):
        if tensor.dtype == torch_type(found):
            if dtype not in (None, found):
                raise invalid(f"tensor of {tensor.dtype} does not hold dtype {dtype!r}")
            return found
    raise invalid(f"tensor of {tensor.dtype}: expected float32, float16 or bfloat16")


def torch_type(name: str) -> Any:
    """torch's type for one of tensors.DTYPES."""
    return getattr(sys.modules["torch"], _NAMES[name])


def wire_array(tensor: Any, name: str) -> np.ndarray:
    """As tensors.wire_array; copies what is on a GPU."""
    torch = sys.modules["torch"]
    host = tensor.detach().contiguous().cpu()
    raw = host.view(torch.int16) if name == "bf16" else host
    return raw.numpy().view(DTYPES[name][1])


def from_wire(array: np.ndarray, name: str, device: Any) -> Any:
    """The tensor on `device`; on the CPU it shares the array's memory."""
    torch = sys.modules["torch"]
    raw = torch.from_numpy(array.view(np.int16) if name == "bf16" else array)
    return (raw.view(torch.bfloat16) if name == "bf16" else raw).to(device)
