"""Prompts computed by prefilld, continued by transformers.

    from prefilld.hf import prefill_into_cache

    input_ids = tokenizer(text, return_tensors="pt").input_ids
    cache = prefill_into_cache(model, input_ids, target="127.0.0.1:50051", method="dense")
    out = model.generate(input_ids, past_key_values=cache, max_new_tokens=96)

Needs torch and transformers 5: pip install "prefilld[hf]". Nothing else of this package does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import grpc
import numpy as np

from .client import PrefillClient
from .errors import PrefilldError
from .fingerprint import fingerprint
from .sparsity import Policy, Summary
from .tensors import invalid
from .transport import cannot_be_opened
from .v1 import model_service_pb2, tensor_pb2

try:
    import torch
    from transformers import DynamicCache, PreTrainedModel
    from transformers.cache_utils import DynamicLayer
except ImportError as error:
    raise ImportError(f"prefilld.hf: {error}; pip install 'prefilld[hf]'") from error

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[float, str], None]
TokenIds = torch.Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]

_TORCH_TYPES = {
    tensor_pb2.DATA_TYPE_F32: torch.float32,
    tensor_pb2.DATA_TYPE_BF16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_F16: torch.float16,
}


@overload
def prefill_into_cache(
        model: PreTrainedModel, input_ids: TokenIds, *, client: PrefillClient | None = ...,
        target: str | None = ..., model_handle: str | None = ...,
        attention_mask: TokenIds | None = ..., check_weights: bool = ...,
        timeout: float | None = ..., progress: Progress | None = ...,
        return_summary: Literal[False] = ...,
        **policy: Unpack[Policy]) -> DynamicCache: ...


@overload
def prefill_into_cache(
        model: PreTrainedModel, input_ids: TokenIds, *, client: PrefillClient | None = ...,
        target: str | None = ..., model_handle: str | None = ...,
        attention_mask: TokenIds | None = ..., check_weights: bool = ...,
        timeout: float | None = ..., progress: Progress | None = ...,
        return_summary: Literal[True],
        **policy: Unpack[Policy]) -> tuple[DynamicCache, Summary | None]: ...


def prefill_into_cache(
        model: PreTrainedModel, input_ids: TokenIds, *, client: PrefillClient | None = None,
        target: str | None = None, model_handle: str | None = None,
        attention_mask: TokenIds | None = None, check_weights: bool = True,
        timeout: float | None = None, progress: Progress | None = None,
        return_summary: bool = False,
        **policy: Unpack[Policy]) -> DynamicCache | tuple[DynamicCache, Summary | None]:
    """Has prefilld compute a prompt; returns its KV cache for `model.generate` to go on from.

    The cache holds the first N - 1 of the N tokens: generate(input_ids, past_key_values=cache),
    given the same N tokens, computes the last one and goes on. generate appends to the cache; for
    a second run from the same prompt give it copy.deepcopy(cache).

    A model that lies on one GPU, which the server's GPU's memory can be reached from, gets no copy:
    the cache's tensors are views of that memory (transport cuda_ipc; Summary.transport tells). It
    is in use until the last of them has gone: generate replaces each, by one of torch's own, at the
    first token; so does copy.deepcopy, for the copy.

    model: on any device, in the checkpoint's own dtype. It is compared with the server's model
        before anything is computed: type, layers, heads, head_dim, vocabulary, dtype, RoPE.
    input_ids: [N] or [1, N], integers, N >= 1, none of them padding. One token: nothing is
        computed, the cache is empty.
    client: the connection to use; it stays open. Or
    target: HOST:PORT, for a connection of this call's own. One of the two must be given.
    model_handle: the model's name on the server; default: the only one it has loaded.
    attention_mask: [N] or [1, N]. Accepted so that a tokenizer's output can be passed on; it must
        be all ones.
    check_weights: also compare the fingerprint of the files that the model was loaded from, where
        model.name_or_path is a directory of safetensors. It reads them once a process, about a
        second a GiB. Without it both sides are trusted to have loaded the same checkpoint.
    timeout: seconds, of the computation and of the transfer together; default 3600.
    progress: as PrefillClient.prefill; the phase "pull" counts the layers that are here.
    return_summary: return (cache, Summary) instead; it says what was computed, how long each
        phase took and how the cache came. None for a prompt of one token.
    policy: what may be skipped, see Policy; method="dense" for the exact result.

    Raises PrefilldError: INVALID_ARGUMENT for a prompt that cannot be sent, FAILED_PRECONDITION,
    naming both sides' values, for a model that is not the server's or whose attention is not full
    in every layer, and what the server answers. The lease is released: consumed when every layer
    is here, else abandoned, which stops the computation.
    """
    if (client is None) == (target is None):
        raise TypeError("prefill_into_cache: give either client= or target=")
    ids = _token_ids(input_ids)
    _check_nothing_masked(model, ids, attention_mask)
    cache = _empty_cache(model)
    with PrefillClient(target) if client is None else contextlib.nullcontext(client) as server:
        info = _served_model(server, model_handle)
        _check_same_model(model, info)
        if check_weights:
            _check_same_weights(model, info)
        outside = ((ids < 0) | (ids >= info.vocab_size)).nonzero()[0]
        if outside.size:
            raise invalid(f"input_ids: token {ids[outside[0]]} at position {outside[0]} is not in "
                          f"the vocabulary, 0 to {info.vocab_size - 1}")
        if ids.size == 1:
            return (cache, None) if return_summary else cache

        devices = _layer_devices(model)
        options = {"widen": False, "timeout": timeout, "progress": progress, "device": devices[0]}
        for last in (False, True):
            try:
                with server.prefill(info.name, ids, **options, **policy) as prompt:
                    for layer in prompt:  # each while the next is computed
                        _fill(cache.layers[layer.index], layer.k, layer.v, devices[layer.index])
                    del layer  # of what was copied the last view: the memory is released next
                    return (cache, prompt.summary) if return_summary else cache
            except PrefilldError as error:  # a GPU's memory, found out with the first layer
                if last or not cannot_be_opened(error):
                    raise


def _token_ids(input_ids: TokenIds) -> np.ndarray:
    """[N] int64, N >= 1."""
    try:
        ids = torch.as_tensor(input_ids).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise invalid(f"input_ids is not a list or tensor of token IDs: {error}") from error
    if ids.dim() == 2 and len(ids) != 1:
        raise invalid(f"input_ids has shape {list(ids.shape)}: one prompt at a time, [N] or [1, N]")
    if ids.dim() not in (1, 2):
        raise invalid(f"input_ids has shape {list(ids.shape)}: expected [N] or [1, N]")
    if ids.numel() == 0:
        raise invalid("input_ids is empty: a prompt has at least one token")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise invalid(f"input_ids is of {ids.dtype}, not of integers")
    return ids.reshape(-1).to(torch.int64).numpy()


def _check_nothing_masked(model: PreTrainedModel, ids: np.ndarray,
                          attention_mask: TokenIds | None) -> None:
    """prefilld reads every token; so must generate. Without an attention_mask it masks the
    padding token, unless that is an end token as well."""
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask).cpu().reshape(-1)
        if len(mask) != len(ids):
            raise invalid(f"attention_mask has {len(mask)} elements, input_ids {len(ids)}")
        if not bool((mask == 1).all()):
            raise invalid(f"attention_mask hides {int((mask != 1).sum())} of {len(ids)} tokens: "
                          "prefilld reads every token; remove the padding")
        return
    config = getattr(model, "generation_config", None)
    padding = getattr(config, "pad_token_id", None)
    ends = getattr(config, "eos_token_id", None)
    if padding is None or padding in (ends if isinstance(ends, list) else [ends]):
        return
    at = (ids == padding).nonzero()[0]
    if at.size:
        raise invalid(f"input_ids has the padding token {padding} at position {at[0]}, which "
                      "generate would mask and prefilld reads: remove it, or give an "
                      "attention_mask of ones, here and to generate")


def _empty_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache transformers would make for this model, if prefilld can fill it."""
    obstacles = {
        "an encoder-decoder": model.config.is_encoder_decoder,
        "quantised": getattr(model, "hf_quantizer", None) is not None,
        "changed by adapters": hasattr(model, "peft_config"),
        "split by tensor parallelism": (getattr(model, "_tp_size", None) or 1) > 1,
    }
    for what, is_so in obstacles.items():
        if is_so:
            raise _mismatch(f"the model is {what}: prefilld computes a plain checkpoint")
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise _mismatch(f"layer {i} of the model keeps a {type(layer).__name__}: prefilld "
                            "fills caches of models with full attention in every layer")
    return cache


def _served_model(client: PrefillClient, handle: str | None) -> model_service_pb2.Model:
    served = client.models()
    names = ", ".join(model.name for model in served) or "none"
    if handle is None:
        if len(served) != 1:
            raise _mismatch(f"the server has {len(served)} models ({names}): choose one with "
                            "model_handle=")
        return served[0]
    for model in served:
        if model.name == handle:
            return model
    raise PrefilldError(grpc.StatusCode.NOT_FOUND,
                        f"the server has no model {handle!r}; it has: {names}")


def _check_same_model(model: PreTrainedModel, info: model_service_pb2.Model) -> None:
    """Compares all that the server tells of its model."""
    config = model.config.get_text_config(decoder=True)
    rope = info.kv_layout.rope_state
    if not rope.applied or rope.position_base != 0:
        raise _mismatch(f"model {info.name!r} stores K with rope applied = {rope.applied}, from "
                        f"position {rope.position_base}; transformers needs True, 0")
    own_rope = getattr(config, "rope_parameters", None) or {}
    own_scaling = own_rope.get("rope_type", "default")
    heads = config.num_attention_heads
    pairs: dict[str, tuple[Any, Any]] = {
        "model_type": (info.model_type, config.model_type),
        "layers": (info.layers, config.num_hidden_layers),
        "q_heads": (info.q_heads, heads),
        "kv_heads": (info.kv_heads, getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": (info.head_dim,
                     getattr(config, "head_dim", None) or config.hidden_size // heads),
        "hidden_size": (info.hidden_size, config.hidden_size),
        "vocab_size": (info.vocab_size, config.vocab_size),
        "dtype": (_TORCH_TYPES.get(info.data_type, info.data_type), model.dtype),
        "rope theta": (rope.theta, own_rope.get("rope_theta")),
        "rope scaling": (rope.scaling, "none" if own_scaling == "default" else own_scaling),
    }
    own_revision = getattr(config, "_commit_hash", None)
    if info.revision and own_revision:
        pairs["revision"] = (info.revision, own_revision)
    different = [f"{name} is {there} there, {here} here"
                 for name, (there, here) in pairs.items() if there != here]
    if different:
        raise _mismatch(f"the server's model {info.name!r} is not this one: "
                        + "; ".join(different))


def _check_same_weights(model: PreTrainedModel, info: model_service_pb2.Model) -> None:
    """A model that was not loaded from files that can be compared passes."""
    directory = model.name_or_path
    if not os.path.isdir(directory):
        return
    try:
        own = fingerprint(directory)
    except (OSError, ValueError, KeyError):  # not a directory of safetensors
        return
    if own != info.fingerprint:
        raise _mismatch(f"the server's model {info.name!r} was loaded from other files than "
                        f"{directory}: fingerprint is {info.fingerprint} there, {own} here; "
                        "check_weights=False if only the configurations' names differ")


def _layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each layer computes, and so wants its keys and values."""
    devices = [next(layer.parameters()).device for layer in model.get_decoder().layers]
    if torch.device("meta") in devices:
        raise _mismatch(f"layer {devices.index(torch.device('meta'))} of the model is on the meta "
                        "device: offloaded models are not supported")
    return devices


def _fill(layer: DynamicLayer, k: Any, v: Any, device: torch.device) -> None:
    """Makes K and V [kv_heads, N, head_dim] what the layer keeps. Not by DynamicLayer.update,
    which would copy them."""
    keys, values = _tensor(k, device), _tensor(v, device)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _tensor(layer: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """[kv_heads, N, head_dim] as [1, kv_heads, N - 1, head_dim]. On the same device it shares the
    memory. Shared memory of the server's, which is read-only, is copied: torch has no such tensors,
    and would crash when somebody writes to one."""
    if isinstance(layer, np.ndarray):
        layer = torch.from_numpy(layer if layer.flags.writeable else layer.copy())
        if layer.dtype is torch.uint16:  # numpy's stand-in for bfloat16
            layer = layer.view(torch.bfloat16)
    return layer.to(device)[None, :, :-1]


def _mismatch(message: str) -> PrefilldError:
    return PrefilldError(grpc.StatusCode.FAILED_PRECONDITION, message)
