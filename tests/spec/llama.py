"""A llama prefill in double-precision numpy: an independent reading of the model's mathematics.

Pre-norm RMSNorm, rotate-half RoPE (plain, linear or llama3 scaling), grouped heads, SwiGLU. The
attention of every layer runs over the block index that the policy chooses from the model's own
activations, so that the KV of a sparse prefill has a reference too.
"""

import math

import numpy as np

from spec import sparse_attention


def prefill(config, weights, token_ids, policy):
    """([k], [v], logits): per layer [kv_heads, tokens, d] after RoPE; logits of the last position.

    config: the dict of config.json; weights: {name of the checkpoint: array}.
    """
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    q_heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", q_heads)
    d = config.get("head_dim") or config["hidden_size"] // q_heads
    eps = config["rms_norm_eps"]
    tokens = len(token_ids)
    angles = np.arange(tokens)[:, None] * inverse_frequency(config, d)[None, :]

    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    x = w["model.embed_tokens.weight"][np.asarray(token_ids)]
    keys, values = [], []
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = rms_norm(x, w[layer + "input_layernorm.weight"], eps)
        q = rotate(linear(layer + "self_attn.q_proj", h).reshape(tokens, q_heads, d), angles)
        k = rotate(linear(layer + "self_attn.k_proj", h).reshape(tokens, kv_heads, d), angles)
        v = linear(layer + "self_attn.v_proj", h).reshape(tokens, kv_heads, d)
        o = sparse_attention.run(q, k, v, policy).o
        x = x + linear(layer + "self_attn.o_proj", o.reshape(tokens, q_heads * d))
        h = rms_norm(x, w[layer + "post_attention_layernorm.weight"], eps)
        gate = linear(layer + "mlp.gate_proj", h)
        x = x + linear(layer + "mlp.down_proj",
                       gate / (1 + np.exp(-gate)) * linear(layer + "mlp.up_proj", h))
        keys.append(k.transpose(1, 0, 2))
        values.append(v.transpose(1, 0, 2))
    last = rms_norm(x[-1], w["model.norm.weight"], eps)
    tied = config.get("tie_word_embeddings", False)
    return keys, values, w["model.embed_tokens.weight" if tied else "lm_head.weight"] @ last


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rotate(x, angles):
    """RoPE on pairs (i, i + d/2) of x [tokens, heads, d]; angles [tokens, d/2]."""
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def inverse_frequency(config, d):
    """[d/2] radians per position, after the config's rope scaling."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}  # beside rope_scaling, or with it
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    frequency = rope["rope_theta"] ** (-np.arange(0, d, 2) / d)
    if kind == "default":
        return frequency
    if kind == "linear":
        return frequency / rope["factor"]
    if kind != "llama3":
        raise ValueError(f"no rope scaling {kind}")
    # Long wavelengths are stretched, short ones kept, those between blended.
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = original * frequency / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * frequency / rope["factor"] + blend * frequency
