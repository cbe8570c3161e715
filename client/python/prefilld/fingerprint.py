"""The fingerprint of a model directory, computed on this side: equal to prefilld's for the same
model (Model.fingerprint), so that a decode engine can tell that the KV it pulls is of the weights
it runs. Needs config.json and *.safetensors, no other package."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import mmap
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np

_PIECE_BYTES = 64 << 20
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# What a config of the family leaves out: rms_norm_eps, the share of a head that turns; and the
# channels that turn together.
_LLAMA = (1e-6, 1.0, "half")
_FAMILIES = {"glm": (1.5625e-07, 0.5, "interleaved")}


@functools.lru_cache(maxsize=8)
def fingerprint(directory: str | pathlib.Path) -> str:
    """SHA-256 (hex) over the model's id and revision, the shape of its KV, its norms' epsilon, its
    rope, and name, dtype, shape and CRC32C of every tensor. Reads every weight once (about a
    second a GiB when the files are in memory). OSError, ValueError or KeyError when the directory
    is no such model."""
    root = pathlib.Path(directory)
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    tensors = sorted(_tensors(root))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    dtype = _DTYPES.get(config.get("dtype") or config.get("torch_dtype") or "")
    if dtype is None:
        dtype = next(kind for name, kind, _, _ in tensors if name == "model.embed_tokens.weight")
    default_eps, _, _ = _FAMILIES.get(config["model_type"], _LLAMA)
    eps = float(np.float32(config.get("rms_norm_eps") or default_eps))
    text = (
        f"id {_escape(config.get('_name_or_path') or '')}\n"
        f"revision {_escape(config.get('_commit_hash') or '')}\n"
        f"layers {config['num_hidden_layers']} "
        f"kv_heads {config.get('num_key_value_heads') or heads} head_dim {head_dim} "
        f"dtype {dtype} eps {eps:.9g}\n"
        "rope {theta:.17g} {scaling} {factor:.17g} {low:.17g} {high:.17g} {original}\n".format(
            **_rope(config)))
    rotary_dim, pairing = _rotary(config, head_dim)
    if (rotary_dim, pairing) != (head_dim, "half"):
        text += f"rotary_dim {rotary_dim} {pairing}\n"
    text += _yarn(config)
    for name, kind, shape, crc in tensors:
        text += f"{_escape(name)} {kind} [{','.join(map(str, shape))}] {crc:08x}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def _rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Both forms of config.json: rope_scaling beside rope_theta, or rope_parameters."""
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = fields.get("rope_type") or fields.get("type") or "default"
    return fields | {"scaling": "none" if kind == "default" else kind}


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    fields, longest = _rope_fields(config), config["max_position_embeddings"]
    scaling = fields["scaling"]
    low, high, original, factor = 1.0, 4.0, 8192, fields.get("factor") or 1.0
    if scaling == "llama3":
        low, high = fields["low_freq_factor"], fields["high_freq_factor"]
        original = fields["original_max_position_embeddings"]
    elif scaling == "dynamic":
        original = longest
    elif scaling == "yarn":
        original = fields.get("original_max_position_embeddings") or longest
        factor = fields.get("factor") or longest / original
    return {"theta": float(fields.get("rope_theta") or config.get("rope_theta") or 10000.0),
            "scaling": scaling, "factor": float(factor), "low": float(low), "high": float(high),
            "original": original}


def _yarn(config: dict[str, Any]) -> str:
    """What yarn alone has: the line that says it, or nothing."""
    fields = _rope_fields(config)
    if fields["scaling"] != "yarn":
        return ""
    factor = _rope(config)["factor"]

    def of_scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
    attention = fields.get("attention_factor")
    if attention is None:
        attention = (of_scale(mscale) / of_scale(mscale_all_dim) if mscale and mscale_all_dim
                     else of_scale(1))
    truncate = fields.get("truncate")
    return (f"yarn {float(fields.get('beta_fast') or 32):.17g} "
            f"{float(fields.get('beta_slow') or 1):.17g} "
            f"{int(truncate is None or truncate)} {float(np.float32(attention)):.9g}\n")


def _rotary(config: dict[str, Any], head_dim: int) -> tuple[int, str]:
    """The channels of a head that turn, and which of them turn together."""
    _, default_share, pairing = _FAMILIES.get(config["model_type"], _LLAMA)
    share = (_rope_fields(config).get("partial_rotary_factor")
             or config.get("partial_rotary_factor") or default_share)
    return int(head_dim * share), pairing


def _tensors(root: pathlib.Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, CRC32C) of every tensor of the files that the index names, or of all."""
    index = root / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        with open(root / name, "rb") as file, \
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            (header_bytes,) = struct.unpack_from("<Q", data)
            header = json.loads(data[8:8 + header_bytes])
            for tensor, entry in header.items():
                if tensor == "__metadata__":
                    continue
                begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
                yield tensor, entry["dtype"], tuple(entry["shape"]), _crc32c(data, begin, end)


def _crc32c(data: mmap.mmap, begin: int, end: int) -> int:
    crc = 0
    for at in range(begin, end, _PIECE_BYTES):
        crc = google_crc32c.extend(crc, data[at:min(at + _PIECE_BYTES, end)])
    return crc


def _escape(text: str) -> str:
    """As absl::CEscape: what is not printable ASCII becomes an octal escape."""
    special = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "'": "\\'", "\\": "\\\\"}
    return "".join(special.get(chr(byte)) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}")
                   for byte in text.encode())
