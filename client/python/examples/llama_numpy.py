"""A small Llama in numpy that decodes from a KV cache somebody else filled.

An independent reading of the same checkpoint: it shares no code with the server. It needs K after
RoPE, which is how prefilld stores it, and works one token at a time. The weights of a token's
matrices are read once per token, so a step costs about (weights + cache) / memory bandwidth.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from safetensors.numpy import load_file


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + eps) * weight


class LayerCache:
    """One layer's keys and values with room to grow: [kv_heads, capacity, head_dim]."""

    def __init__(self, k: np.ndarray, v: np.ndarray, tokens: int, capacity: int):
        heads, _, dim = k.shape
        self.k = np.empty((heads, capacity, dim), np.float32)
        self.v = np.empty((heads, capacity, dim), np.float32)
        self.k[:, :tokens], self.v[:, :tokens] = k[:, :tokens], v[:, :tokens]
        self.tokens = tokens

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        self.k[:, self.tokens], self.v[:, self.tokens] = k, v
        self.tokens += 1


class Llama:
    """The decoder. Weights stay float32; q/k/v and gate/up are joined, so that a layer is four
    matrix-vector products."""

    def __init__(self, model_dir: str | pathlib.Path):
        path = pathlib.Path(model_dir)
        config = json.loads((path / "config.json").read_text())
        if config.get("rope_scaling") or not config["tie_word_embeddings"]:
            raise ValueError("llama_numpy reads tied embeddings without rope scaling only")
        self.layers: int = config["num_hidden_layers"]
        self.q_heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["head_dim"]
        self.eps: float = config["rms_norm_eps"]
        self.eos: int = config["eos_token_id"]
        self._frequencies = config["rope_theta"] ** (
            -np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)

        tensors = load_file(path / "model.safetensors")
        self._embedding = tensors["model.embed_tokens.weight"]
        self._final_norm = tensors["model.norm.weight"]
        self._weights = []
        for i in range(self.layers):
            def w(name: str) -> np.ndarray:
                return tensors[f"model.layers.{i}.{name}.weight"]
            self._weights.append({
                "norm": w("input_layernorm"),
                "qkv": np.concatenate([w(f"self_attn.{n}_proj") for n in "qkv"]),
                "o": w("self_attn.o_proj"),
                "mlp_norm": w("post_attention_layernorm"),
                "gate_up": np.concatenate([w("mlp.gate_proj"), w("mlp.up_proj")]),
                "down": w("mlp.down_proj"),
            })

    def step(self, token: int, position: int, caches: Iterable[LayerCache]) -> np.ndarray:
        """Logits [vocab] after `token` at `position`; appends its K and V to each layer's cache.
        `caches` may be a generator: a layer's cache is asked for when its turn comes."""
        x = self._embedding[token]
        angles = position * self._frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        for weights, cache in zip(self._weights, caches, strict=True):
            x = x + self._attention(weights, x, cos, sin, cache)
            x = x + self._mlp(weights, x)
        return self._embedding @ rms_norm(x, self._final_norm, self.eps)

    def greedy(self, last_token: int, caches: Iterator[LayerCache], tokens: int,
               count: int) -> Iterator[int]:
        """Yields `count` token IDs, each the likeliest after the ones before. The caches hold the
        prompt's first tokens - 1 positions; its last token is computed here."""
        kept: list[LayerCache] = []

        def keep():
            for cache in caches:
                kept.append(cache)
                yield cache

        logits = self.step(last_token, tokens - 1, keep())
        for i in range(count):
            token = int(np.argmax(logits))
            yield token
            if i + 1 < count:
                logits = self.step(token, tokens + i, kept)

    def _attention(self, weights, x, cos, sin, cache: LayerCache) -> np.ndarray:
        heads, groups, dim = self.q_heads, self.kv_heads, self.head_dim
        rows = (weights["qkv"] @ rms_norm(x, weights["norm"], self.eps)).reshape(-1, dim)
        rotated, values = rows[:heads + groups], rows[heads + groups:]
        half = dim // 2
        x0, x1 = rotated[:, :half], rotated[:, half:]
        rotated = np.concatenate([x0 * cos - x1 * sin, x1 * cos + x0 * sin], axis=1)
        cache.append(rotated[heads:], values)

        q = rotated[:heads].reshape(groups, heads // groups, dim) * np.float32(dim ** -0.5)
        out = np.empty_like(q)
        for g in range(groups):
            scores = q[g] @ cache.k[g, :cache.tokens].T
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[g] = (scores @ cache.v[g, :cache.tokens]) / scores.sum(axis=1, keepdims=True)
        return weights["o"] @ out.reshape(-1)

    def _mlp(self, weights, x) -> np.ndarray:
        gate, up = np.split(weights["gate_up"] @ rms_norm(x, weights["mlp_norm"], self.eps), 2)
        return weights["down"] @ (gate / (1 + np.exp(-gate)) * up)
