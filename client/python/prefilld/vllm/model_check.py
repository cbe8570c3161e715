"""Is prefilld's model the one this engine runs? Compared by name, by field and by weights."""

from __future__ import annotations

import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from ..fingerprint import fingerprint
from ..tensors import DTYPES
from ..v1 import model_service_pb2
from .kv_writer import KV_DTYPES
from .settings import refused

logger = init_logger("vllm.prefilld")

# prefilld's type of a cache -> what vLLM's may be: the same, or one that float32 is rounded to.
_ROUNDED_TO = {"f32": ("f32", "f16", "bf16"), "f16": ("f16",), "bf16": ("bf16",)}


class ModelCheck:
    """Thread-safe. Each model of a server is compared once, as long as its fingerprint stays."""

    def __init__(self, config: VllmConfig):
        """ValueError for a set-up that no KV from outside fits."""
        model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
        for name, value in (("tensor_parallel_size", parallel.tensor_parallel_size),
                            ("pipeline_parallel_size", parallel.pipeline_parallel_size)):
            if value != 1:
                raise ValueError(f"PrefilldConnector: {name} {value} is not supported, only 1")
        if str(cache.cache_dtype) not in ("auto", str(model.dtype).removeprefix("torch.")):
            raise ValueError(f"PrefilldConnector: kv cache dtype {cache.cache_dtype} is not "
                             "supported, only auto")
        if model.dtype not in KV_DTYPES:
            raise ValueError(f"PrefilldConnector: dtype {model.dtype} is not supported, only "
                             f"{', '.join(map(str, KV_DTYPES))}")
        rope = _rope(model.hf_text_config)
        if rope["rope_scaling"] == "dynamic":
            raise ValueError("PrefilldConnector: rope scaling dynamic is not supported: vLLM turns "
                             "all prompts alike, prefilld and transformers each by its length")
        self.dtype = KV_DTYPES[model.dtype]
        self._facts = {
            "layers": model.get_num_layers(parallel),
            "kv_heads": model.get_total_num_kv_heads(),
            "head_dim": model.get_head_size(),
            "vocab_size": model.get_vocab_size(),
            "hidden_size": model.get_hidden_size(),
            **rope,
        }
        self._directory = _directory(model)
        # Read while the engine starts, for no load to wait for it.
        self._ours = None if self._directory is None else ThreadPoolExecutor(1).submit(
            fingerprint, self._directory)
        self._lock = threading.Lock()
        self._matched: set[str] = set()  # fingerprints

    def check(self, model: model_service_pb2.Model) -> None:
        """PrefilldError FAILED_PRECONDITION names every field that differs."""
        with self._lock:
            if model.fingerprint in self._matched:
                return
            self._compare(model)
            self._matched.add(model.fingerprint)

    def _compare(self, model: model_service_pb2.Model) -> None:
        rope = model.kv_layout.rope_state
        theirs = {"rope_theta": rope.theta, "rope_scaling": rope.scaling}
        different = [
            f"{name} is {value} here, {theirs.get(name, getattr(model, name, None))} there"
            for name, value in self._facts.items()
            if theirs.get(name, getattr(model, name, None)) != value]
        kind = next((name for name, (wire, _) in DTYPES.items() if wire == model.data_type), "?")
        if self.dtype not in _ROUNDED_TO.get(kind, ()):
            different.append(f"the KV cache is {self.dtype} here, {kind} there")
        if different:
            raise refused(f"prefilld's model {model.name!r} is not this engine's: "
                          + "; ".join(different))
        if self._ours is None:
            logger.warning("prefilld: the weights of %r cannot be compared with this engine's (no "
                           "safetensors directory here); its shape is the same", model.name)
            return
        try:
            ours = self._ours.result()
        except (OSError, ValueError, KeyError) as error:
            logger.warning("prefilld: the weights of %r cannot be compared with %s: %s",
                           model.name, self._directory, error)
            return
        if ours != model.fingerprint:
            raise refused(f"prefilld's model {model.name!r} has other weights or parameters than "
                          f"{self._directory}: fingerprint {ours} here, {model.fingerprint} there")


def _rope(config: Any) -> dict[str, Any]:
    """As prefilld reports it: theta, and the scaling or none."""
    fields = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = fields.get("rope_type") or fields.get("type") or "default"
    theta = fields.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    return {"rope_theta": float(theta), "rope_scaling": "none" if kind == "default" else kind}


def _directory(model: Any) -> pathlib.Path | None:
    """Where this engine's weights lie, if they are files that can be compared."""
    path = pathlib.Path(model.model)
    if not path.is_dir():
        try:
            from huggingface_hub import snapshot_download
            path = pathlib.Path(snapshot_download(model.model, revision=model.revision,
                                                  local_files_only=True))
        except Exception:  # whatever the hub's client raises: there is no such snapshot
            return None
    return path if any(path.glob("*.safetensors")) else None
