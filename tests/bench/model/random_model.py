"""A Hugging Face directory with random weights and the shape of a real model, for measuring speed.

    python tests/bench/model/random_model.py --shape=llama-3.1-8b --dir=/dev/shm/llama
        [--layers=N] [--dtype=bf16] [--seed=0]

--shape: a name below, or a config.json of a llama, qwen2, qwen3, mistral or glm of any size. The
weights are normal with a deviation of 0.02, what a layer adds to the residual smaller with the
number of layers, as before training: activations stay finite, attention is diffuse. Made on the
GPU where there is one: 16 GB take some ten seconds.

Disk (of /dev/shm: memory): 2 bytes a parameter, in f32 4: llama-3.1-8b 16 GB, qwen2-7b 15, qwen3-8b
16, glm-4-9b 19, yi-9b-200k 18. Memory of the GPU, or of the host without one: up to 7 GB.
"""

import argparse
import functools
import json
import math
import pathlib
import sys
import time

import needs

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False,
    "pretraining_tp": 1, "tie_word_embeddings": False, "use_cache": True,
}
QWEN = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "use_cache": True, "use_sliding_window": False,
}
SHAPES = {
    "llama-3.1-8b": LLAMA | {
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "vocab_size": 128256,
    },
    "yi-9b-200k": LLAMA | {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 262144, "num_attention_heads": 32,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 5000000.0, "vocab_size": 64000,
    },
    "qwen2-7b": QWEN | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rope_theta": 1000000.0, "sliding_window": 131072, "vocab_size": 152064,
    },
    "qwen3-8b": QWEN | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "vocab_size": 151936,
    },
    "glm-4-9b": {
        "architectures": ["GlmForCausalLM"], "model_type": "glm", "attention_bias": True,
        "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 13696, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 151552,
    },
}


def arguments() -> argparse.Namespace:
    parser = needs.parser(__doc__)
    add = parser.add_argument
    add("--shape", required=True, help=f"{', '.join(SHAPES)}, or a config.json")
    add("--dir", type=pathlib.Path, required=True, help="to be written")
    add("--layers", type=int, help="other than the model has")
    add("--dtype", choices=("f32", "bf16", "f16"), default="bf16", help="%(default)s")
    add("--seed", type=int, default=0, help="%(default)s")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules("numpy", "torch")

import torch
from checkpoint_files import DTYPES, Tensors, dtype_name, write


class RandomModel:
    def __init__(self, config: dict, dtype: torch.dtype, seed: int):
        self.config, self.dtype, self.seed = config, dtype, seed
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.hidden, self.inner = config["hidden_size"], config["intermediate_size"]
        self.layers = config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        self.head_dim = config.get("head_dim") or self.hidden // heads
        self.q_width = heads * self.head_dim
        self.kv_width = (config.get("num_key_value_heads") or heads) * self.head_dim

    def groups(self) -> list:
        """What checkpoint_files.write takes: a file a layer, and one for what is no layer's."""
        return [self.outside, *(functools.partial(self.layer, i) for i in range(self.layers))]

    def outside(self) -> Tensors:
        normal = self._normal(self.layers)
        vocabulary = self.config["vocab_size"]
        tensors = {"model.embed_tokens.weight": normal(vocabulary, self.hidden),
                   "model.norm.weight": 1 + normal(self.hidden)}
        if not self.config.get("tie_word_embeddings"):
            tensors["lm_head.weight"] = normal(vocabulary, self.hidden)
        return tensors

    def layer(self, i: int) -> Tensors:
        normal, family = self._normal(i), self.config["model_type"]
        prefix = f"model.layers.{i}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        to_residual = 1 / math.sqrt(2 * self.layers)
        tensors = {prefix + "input_layernorm.weight": 1 + normal(self.hidden),
                   prefix + "post_attention_layernorm.weight": 1 + normal(self.hidden),
                   attention + "q_proj.weight": normal(self.q_width, self.hidden),
                   attention + "k_proj.weight": normal(self.kv_width, self.hidden),
                   attention + "v_proj.weight": normal(self.kv_width, self.hidden),
                   attention + "o_proj.weight": normal(self.hidden, self.q_width) * to_residual,
                   mlp + "down_proj.weight": normal(self.hidden, self.inner) * to_residual}
        if family == "qwen2" or self.config.get("attention_bias"):
            for name, width in (("q", self.q_width), ("k", self.kv_width), ("v", self.kv_width)):
                tensors[f"{attention}{name}_proj.bias"] = normal(width)
        if family == "llama" and self.config.get("attention_bias"):
            tensors[attention + "o_proj.bias"] = normal(self.hidden)
        if family == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{attention}{name}.weight"] = 1 + normal(self.head_dim)
        if family == "glm":
            tensors[mlp + "gate_up_proj.weight"] = normal(2 * self.inner, self.hidden)
        else:
            tensors[mlp + "gate_proj.weight"] = normal(self.inner, self.hidden)
            tensors[mlp + "up_proj.weight"] = normal(self.inner, self.hidden)
        if self.config.get("mlp_bias"):
            for name, width in (("gate", self.inner), ("up", self.inner), ("down", self.hidden)):
                tensors[f"{mlp}{name}_proj.bias"] = normal(width)
        return tensors

    def _normal(self, group: int):
        """Draws of one group: the same whichever thread makes it first."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 4096 + group)

        def normal(*shape: int) -> torch.Tensor:
            return 0.02 * torch.randn(shape, generator=generator, device=self.device,
                                      dtype=self.dtype)
        return normal


def config_of(shape: str) -> dict:
    if shape in SHAPES:
        return dict(SHAPES[shape])
    path = pathlib.Path(shape)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        sys.exit(f"random_model: {shape} is no config.json and none of {', '.join(SHAPES)}")
    return json.loads(path.read_text())


def main() -> None:
    args = ARGUMENTS
    config = config_of(args.shape)
    config.pop("dtype", None)
    config["torch_dtype"] = dtype_name(DTYPES[args.dtype])
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    begin = time.perf_counter()
    model = RandomModel(config, DTYPES[args.dtype], args.seed)
    size = write(args.dir, config, model.groups())
    print(f"{args.dir}: {config['num_hidden_layers']} layers, {size * 1e-9:.2f} GB in "
          f"{time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
