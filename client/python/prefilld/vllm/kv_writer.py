"""Writes pulled K and V into vLLM's paged KV cache: on CPUs by vLLM's own operator (its blocks are
packed for the instruction set), on GPUs by index, in whatever form the cache has."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

# Writes K and V, [kv_heads, tokens, head_dim], to the slots.
Write = Callable[[torch.Tensor, torch.Tensor, "Slots"], None]

TORCH_TYPES = {np.dtype("<f4"): torch.float32, np.dtype("<f2"): torch.float16,
               np.dtype("<u2"): torch.bfloat16}  # numpy has no bfloat16: its bits are uint16
KV_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Slots:
    """Where the tokens `first`, `first` + 1, ... of a request lie, the same in every layer.
    block_ids: of all its blocks, from token 0."""

    def __init__(self, block_ids: Sequence[int], block_size: int, first: int, count: int):
        tokens = torch.arange(first, first + count)
        self._blocks = torch.tensor(block_ids, dtype=torch.int64)[tokens // block_size]
        self._offsets = tokens % block_size
        self._block_size = block_size
        # [count] int64, on the host: block * block_size + offset.
        self.tokens = self._blocks * block_size + self._offsets
        begin = min(-first % block_size, count)
        self.whole = slice(begin, begin + (count - begin) // block_size * block_size)
        self._places: dict[torch.device, Places] = {}

    def on(self, device: torch.device) -> Places:
        """Sent there once: a layer is written in less time than this takes."""
        if device not in self._places:
            others = torch.ones(len(self._blocks), dtype=torch.bool)
            others[self.whole] = False
            self._places[device] = Places(*(index.to(device) for index in (
                self._blocks[self.whole][::self._block_size], self._blocks[others],
                self._offsets[others])))
        return self._places[device]


@dataclasses.dataclass(frozen=True)
class Places:
    blocks: torch.Tensor   # that are filled, by the tokens Slots.whole
    others: torch.Tensor   # the block of each token before and behind them
    offsets: torch.Tensor  # and its place in that


def as_tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The array's memory as a tensor, read-only memory included (nobody writes to it here). What
    lies on a GPU is one already."""
    if isinstance(array, torch.Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(TORCH_TYPES[array.dtype])


def cpu_writer(cache: torch.Tensor, layer: Any) -> Write:
    """cache: [blocks, kv_heads, block_size, 2 * head_dim], of vLLM's CPU backend. layer: its
    Attention, which knows how the backend packs a block (`isa`)."""
    from vllm import _custom_ops

    blocks, heads, block_size, width = cache.shape
    keys, values = cache.view(blocks, heads, 2 * block_size, width // 2).chunk(2, dim=2)

    def write(k: torch.Tensor, v: torch.Tensor, slots: Slots) -> None:
        _custom_ops.cpu_attn_reshape_and_cache(
            k.transpose(0, 1), v.transpose(0, 1), keys, values, slots.tokens, layer.isa)

    return write


def strided_writer(cache: torch.Tensor, kv_heads: int, head_dim: int) -> Write:
    """For every form in which a block's rows are plain [.., head_dim] rows, on any device. K and V
    that lie on the cache's own are copied once, to where they belong, and nothing waits for it."""
    keys, values = map(_widest, block_views(cache, kv_heads, head_dim))
    block_size = keys.shape[1]

    def write(k: torch.Tensor, v: torch.Tensor, slots: Slots) -> None:
        # Whole blocks at once are faster than their tokens: a GPU's, by a fifth.
        places, whole = slots.on(cache.device), slots.whole
        for blocks, rows in ((keys, k), (values, v)):
            tokens = rows.to(cache.device, cache.dtype).view(blocks.dtype).transpose(0, 1)
            if len(places.blocks):
                blocks.index_copy_(0, places.blocks,
                                   tokens[whole].unflatten(0, (-1, block_size)))
            if len(places.others):
                blocks[places.others, places.offsets] = torch.cat(
                    (tokens[:whole.start], tokens[whole.stop:]))

    return write


def _widest(rows: torch.Tensor) -> torch.Tensor:
    """The same bytes in the widest elements that rows are made of: to place an element by index
    takes as long for 16 bytes as for 2."""
    for wide in (torch.complex128, torch.int64):
        with contextlib.suppress(RuntimeError):  # of another width, or not at a multiple of it
            return rows.view(wide)
    return rows


def block_views(cache: torch.Tensor, kv_heads: int,
                head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as [blocks, block_size, kv_heads, head_dim] views of vLLM's cache of one layer, read
    off its shape; strides stay as they are, so NHD and HND memory are the same to us. The forms:

    (2, blocks, block, heads, d), (blocks, 2, block, heads, d); heads before block in either;
    (blocks, heads, block, 2d), (blocks, block, heads, 2d): K, then V, in the last axis.

    Where heads and block size are equal the first reading of each line is taken. ValueError for
    any other form."""
    shape = tuple(cache.shape)
    if cache.dim() == 4 and shape[3] == 2 * head_dim and kv_heads in shape[1:3]:
        packed = cache.transpose(1, 2) if shape[1] == kv_heads else cache
        return packed[..., :head_dim], packed[..., head_dim:]
    if cache.dim() == 5 and shape[4] == head_dim and kv_heads in shape[2:4]:
        # A cache of two blocks could be either; no engine has so few.
        axis = 0 if shape[0] == 2 else 1
        if shape[axis] == 2:
            keys, values = cache.unbind(axis)
            if shape[3] != kv_heads:
                keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            return keys, values
    raise ValueError(f"a KV cache of shape {shape} is of no form known here, for {kv_heads} kv "
                     f"heads of {head_dim}")
