"""Which blocks the CPU and the GPU select on the same Q and K of a real prompt.

    python tests/bench/model/masks.py --model=DIR --ids=ids.json [--tokens=8192] [--layers=0,7,14]
        [--methods=joint,flexprefill] [--json=FILE]

transformers computes Q, K and V of the layers on the GPU, after the rotary embedding, in the
checkpoint's dtype; a server on either device attends with them. Printed for a layer and method: the
IoU of the blocks of all heads, |both| / |either|, that of the worst head, and the density. Exits
with 1 where the IoU of a layer is below 0.999.

Needs torch and transformers 5. GPU memory: the weights, K and V, and 1 GB; the host keeps Q, K and
V of --layers: of Llama-3.1-8B's shape 0.1 GB a layer and 8,192 tokens.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import needs


def arguments() -> argparse.Namespace:
    parser = needs.model_parser(__doc__)
    add = parser.add_argument
    add("--ids", type=pathlib.Path, metavar="FILE", help="JSON array of token IDs; else random")
    add("--tokens", type=int, default=8192, help="of the prompt (%(default)s)")
    add("--layers", type=lambda text: [int(word) for word in text.split(",")], default=[0, 7, 14],
        metavar="N,...", help="counted from 0 (0,7,14)")
    add("--methods", type=lambda text: text.split(","), default=["joint", "flexprefill"],
        metavar="NAME,...", help="that select (joint,flexprefill)")
    add("--json", type=pathlib.Path, metavar="FILE", help="the same, to be written")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules(*needs.CLIENT, *needs.TRANSFORMERS["cuda"])
    needs.server()

import numpy as np
import torch
from served import token_ids
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench import Server, progress  # first of served's path
from prefilld import PrefillClient
from report import table

BOUND = 0.999


def layers_of(args, ids: np.ndarray) -> dict[int, tuple[torch.Tensor, ...]]:
    """Q, K and V of each layer, [tokens, heads, head_dim] on the host."""
    taken = {}

    def attention(module, query, key, value, *rest, **options):
        if module.layer_idx in args.layers:
            taken[module.layer_idx] = tuple(
                tensor[0].transpose(0, 1).contiguous().cpu() for tensor in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype="auto", attn_implementation="sdpa", device_map="cuda").eval()
    with torch.inference_mode():
        model(torch.as_tensor(ids, device="cuda")[None], use_cache=True, logits_to_keep=1,
              past_key_values=DynamicCache(config=model.config))
    missing = set(args.layers) - taken.keys()
    if missing:
        sys.exit(f"masks: the model has no layers {sorted(missing)}")
    return taken


def mask(index: np.ndarray) -> np.ndarray:
    """[heads, q_blocks, k_blocks] of [heads, q_blocks, ascending block numbers, then -1]."""
    heads, rows, _ = index.shape
    out = np.zeros((heads, rows, rows + 1), bool)
    np.put_along_axis(out, np.where(index < 0, rows, index).astype(np.int64), True, axis=2)
    return out[:, :, :rows]


def measure(args, tensors, clients: list[PrefillClient], method: str) -> dict:
    results = [client.attend(*tensors, method=method, return_block_index=True)
               for client in clients]
    cpu, cuda = (mask(result.block_index) for result in results)
    both, either = (counts.sum(axis=(1, 2)) for counts in (cpu & cuda, cpu | cuda))
    return {"iou": both.sum() / either.sum(), "worst_head": (both / either).min(),
            "density": results[1].report.mean_density}


def main() -> int:
    args = ARGUMENTS
    progress("masks: Q, K and V by transformers")
    layers = layers_of(args, token_ids(args.ids, args.tokens, args.model))
    torch.cuda.empty_cache()
    records = []
    with tempfile.TemporaryDirectory() as logs:
        with Server("--backend=cpu", log_path=pathlib.Path(logs) / "cpu") as cpu, \
                Server("--backend=cuda", log_path=pathlib.Path(logs) / "cuda") as cuda, \
                PrefillClient(cpu.target) as on_cpu, PrefillClient(cuda.target) as on_cuda:
            for layer, tensors in sorted(layers.items()):
                for method in args.methods:
                    progress(f"masks: layer {layer}, {method}")
                    records.append({"layer": layer, "method": method,
                                    **measure(args, tensors, [on_cpu, on_cuda], method)})
    columns = ["layer", "method", "iou", "worst_head", "density"]
    print(table(columns, [[record[column] for column in columns] for record in records]))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1, default=float))
    return 0 if all(record["iou"] >= BOUND for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
