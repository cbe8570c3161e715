"""Writes a Hugging Face directory of many gigabytes quickly: a safetensors file for each group of
tensors, by several threads, and the index over them."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Callable

import torch

KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

Tensors = dict[str, torch.Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def write(directory: pathlib.Path, config: dict, groups: list[Callable[[], Tensors]],
          threads: int | None = None) -> int:
    """Bytes of the weights. groups: each makes the tensors of one file, on any device. The
    directory appears, in the place of an old one, when it is complete."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    with concurrent.futures.ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        written = list(pool.map(lambda file, make: _write_file(partial / file, make()),
                                files, groups))
    total = sum(sum(sizes.values()) for sizes in written)
    (partial / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, sizes in zip(files, written) for name in sizes},
    }, indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return total


def _write_file(path: pathlib.Path, tensors: Tensors) -> dict[str, int]:
    """Bytes of each tensor."""
    header, sizes, offset = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, tensor in tensors.items():
        sizes[name] = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().cpu().view(torch.uint8).numpy().data)
    return sizes
