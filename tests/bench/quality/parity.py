"""Compares a prefill with transformers: K and V of every layer and the last logits.

    prefillctl prefill --model=NAME --tokens=ids.json --method=dense \
        --kv_out=kv.safetensors --logits_out=logits.safetensors
    python tests/bench/quality/parity.py --model-dir DIR --ids ids.json --kv kv.safetensors \
        [--logits logits.safetensors]

The reference is transformers in float32 with sdpa on the same weights. The bound is 1e-4 relative
Frobenius error for a float32 checkpoint; for one in half precision it is 1.5 times the error that
transformers itself has in that dtype. Exits with 1 when anything is outside.
"""

import argparse
import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

F32_BOUND = 1e-4
HALF_BOUND = 1.5  # times transformers' own error


def run(directory, dtype, token_ids):
    """name -> tensor: layers.{i}.k and .v [kv_heads, tokens, head_dim], logits [vocab]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype,
                                                 attn_implementation="sdpa").eval()
    with torch.inference_mode():
        out = model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
    tensors = {"logits": out.logits[0, -1]}
    for i, layer in enumerate(out.past_key_values.layers):
        tensors[f"layers.{i}.k"] = layer.keys[0]
        tensors[f"layers.{i}.v"] = layer.values[0]
    return tensors


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--ids", required=True, help="JSON array of token IDs")
    parser.add_argument("--kv", required=True, help="what prefillctl --kv_out wrote")
    parser.add_argument("--logits", help="what prefillctl --logits_out wrote")
    args = parser.parse_args()
    torch.set_num_threads(2)
    logging.disable_progress_bar()

    with open(args.ids, encoding="utf-8") as file:
        token_ids = json.load(file)
    got = load_file(args.kv)
    if args.logits:
        got["logits"] = load_file(args.logits)["logits"].flatten()
    want = run(args.model_dir, torch.float32, token_ids)
    if not args.logits:
        del want["logits"]
    if got.keys() != want.keys():
        sys.exit(f"parity: tensors differ: {sorted(got.keys() ^ want.keys())}")

    # The checkpoint's own dtype, in which transformers loads it when not told otherwise.
    dtype = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype="auto").dtype
    own = run(args.model_dir, dtype, token_ids) if dtype != torch.float32 else None

    print(f"{'tensor':<14} {'error':>10} {'bound':>10}")
    outside = 0
    worst = 0.0
    for name, expected in want.items():
        if got[name].shape != expected.shape:
            sys.exit(f"parity: {name} is {list(got[name].shape)}, not {list(expected.shape)}")
        error = relative_error(got[name], expected)
        bound = F32_BOUND if own is None else HALF_BOUND * relative_error(own[name], expected)
        inside = error <= bound  # false for NaN
        outside += not inside
        worst = max(worst, error / bound)
        print(f"{name:<14} {error:10.2e} {bound:10.2e}{'' if inside else '  OUTSIDE'}")
    print(f"parity: {'FAILED' if outside else 'OK'} dtype={str(dtype).removeprefix('torch.')} "
          f"tokens={len(token_ids)} tensors={len(want)} outside={outside} "
          f"worst={worst:.3f} of the bound")
    sys.exit(1 if outside else 0)


if __name__ == "__main__":
    main()
