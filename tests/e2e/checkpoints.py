"""Small random llama checkpoints, written on the spot, whole or broken on purpose."""

import json
import pathlib

import numpy as np

from e2e import safetensors_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}


def shapes(config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    result = {"model.embed_tokens.weight": (config["vocab_size"], hidden),
              "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        result |= {layer + "input_layernorm.weight": (hidden,),
                   layer + "post_attention_layernorm.weight": (hidden,),
                   layer + "self_attn.q_proj.weight": (q, hidden),
                   layer + "self_attn.k_proj.weight": (kv, hidden),
                   layer + "self_attn.v_proj.weight": (kv, hidden),
                   layer + "self_attn.o_proj.weight": (hidden, q),
                   layer + "mlp.gate_proj.weight": (inner, hidden),
                   layer + "mlp.up_proj.weight": (inner, hidden),
                   layer + "mlp.down_proj.weight": (hidden, inner)}
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (config["vocab_size"], hidden)
    return result


def random_weights(config, seed=0):
    """Projections to q and k are large enough that attention is not uniform."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            weights[name] = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        else:
            gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
            scale = gain / np.sqrt(shape[1])
            weights[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return weights


def write(directory, seed=0, **changes):
    """(config, weights) of a new model directory."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    weights = random_weights(config, seed)
    write_config(directory, config)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[config["torch_dtype"]]
    safetensors_file.save(directory / "model.safetensors",
                          {name: (array, kind) for name, array in weights.items()})
    return config, weights


def write_config(directory, config):
    (pathlib.Path(directory) / "config.json").write_text(json.dumps(config))


class Checkpoint:
    """A model directory with what is in it."""

    def __init__(self, directory, config, weights):
        self.directory, self.config, self.weights = directory, config, weights

    @classmethod
    def create(cls, directory, seed=0, **changes):
        return cls(directory, *write(directory, seed, **changes))

    def tokens(self, count, seed=0):
        """Random token IDs with repetitions, so that attention has something to find."""
        rng = np.random.default_rng([seed, count])
        phrase = rng.integers(0, self.config["vocab_size"], 48)
        ids = rng.integers(0, self.config["vocab_size"], count)
        for begin in range(0, count - len(phrase), 160):
            ids[begin:begin + len(phrase)] = phrase
        return ids.tolist()

    def kv_bytes(self, tokens):
        """Of the whole cache of a prompt, in float32."""
        c = self.config
        return 2 * 4 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] * tokens
