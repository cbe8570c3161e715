"""safetensors in twenty lines: 8 bytes of header length, a JSON header, the tensors' bytes."""

import json
import pathlib
import struct

import numpy as np

from spec import inputs

KINDS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.int32, "U8": np.uint8,
         "I64": np.int64}


def save(path, tensors):
    """tensors: {name: array or (array of float32, "BF16")}."""
    header, payload, offset = {}, [], 0
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        if kind is None:
            kind = next(k for k, t in KINDS.items() if t == array.dtype and k != "BF16")
        data = inputs.to_bf16_bits(array) if kind == "BF16" else array.astype(KINDS[kind])
        data = np.ascontiguousarray(data).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape),
                        "data_offsets": [offset, offset + len(data)]}
        payload.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(payload))


def load(path, as_float32=True):
    """{name: array}; BF16 and F16 are widened to float32 unless told otherwise."""
    raw = pathlib.Path(path).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    tensors = {}
    for name, entry in json.loads(raw[8:8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        array = np.frombuffer(raw[8 + length + begin:8 + length + end], KINDS[entry["dtype"]])
        array = array.reshape(entry["shape"])
        if as_float32 and entry["dtype"] == "BF16":
            array = inputs.from_bf16_bits(array)
        elif as_float32 and entry["dtype"] == "F16":
            array = array.astype(np.float32)
        tensors[name] = array
    return tensors
