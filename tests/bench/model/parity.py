"""K, V and logits of a served model beside transformers on the same weights.

    python tests/bench/model/parity.py --model=DIR --ids=ids.json [--tokens=16384]
        [--backend=cuda] [--transport=cuda_ipc] [--chunk=4096] [--decode=96] [--json=FILE]

The prompt, the file's first --tokens, goes through prefilld (method dense, started here) and
through transformers, sdpa, on the same device. The reference is transformers in float32. The bound
on the relative Frobenius error of each tensor (K and V of every layer, the last logits) is 1e-4
for a float32 checkpoint; for one in half precision it is 1.5 times the error that transformers
itself has in that dtype. --chunk: transformers reads so many tokens at a time, where memory is
short. --rows prints every tensor, else the worst of each kind.

--decode=N: transformers, in the checkpoint's dtype, goes on greedily for N tokens from the cache
pulled from prefilld and from its own prefill: how many tokens are alike, and the time to the first
of both. Over cuda_ipc that cache is the server's memory on the GPU, without a copy. In half
precision two right caches may come to differ; a float32 checkpoint must not.

Exits with 1 when anything is outside.

Needs torch and transformers 5. GPU memory: the weights in float32 (of 8B parameters 32 GB) and the
prompt's K and V beside them; with --decode the checkpoint's weights twice. The host keeps three
copies of K and V in float32: of Llama-3.1-8B's shape at 16,384 tokens 13 GB.
"""

import argparse
import json
import pathlib
import sys
import time

import needs


def arguments() -> argparse.Namespace:
    parser = needs.model_parser(__doc__)
    add = parser.add_argument
    add("--ids", type=pathlib.Path, metavar="FILE", help="JSON array of token IDs; else random")
    add("--tokens", type=int, help="of the prompt; default: all of --ids")
    add("--backend", choices=("cuda", "cpu"), default="cuda", help="of both (%(default)s)")
    add("--transport", choices=("grpc", "posix_shm", "cuda_ipc"),
        help="of the cache; default: the best there is")
    add("--threads", type=int, help="of each side, on the CPU; default: all processors")
    add("--chunk", type=int, default=0, metavar="TOKENS",
        help="that transformers reads at a time; default: all")
    add("--decode", type=int, default=0, metavar="TOKENS", help="to go on for; default: none")
    add("--rows", action="store_true", help="print every tensor")
    add("--json", type=pathlib.Path, metavar="FILE", help="all of it, to be written")
    args = parser.parse_args()
    if args.ids is None and args.tokens is None:
        parser.error("give --ids or --tokens")
    args.tokens = args.tokens or len(json.loads(args.ids.read_text()))
    return args


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules(*needs.CLIENT, *needs.TRANSFORMERS[ARGUMENTS.backend])
    needs.server()

import numpy as np
import torch
from served import MODEL, server, token_ids

from bench import progress  # first of served's path
from prefilld import PrefillClient
from prefilld.hf import prefill_into_cache
from report import table
from transformers_side import Transformers

F32_BOUND = 1e-4
HALF_BOUND = 1.5  # times transformers' own error

Tensors = dict[str, torch.Tensor]  # layers.{i}.k and .v [kv_heads, tokens, head_dim], logits


def served(client: PrefillClient, ids, device: str) -> Tensors:
    with client.prefill(MODEL, ids, method="dense", return_logits=True, device=device) as call:
        # Views of the server's memory keep all of it: copies are our own, on the host.
        tensors = {f"layers.{layer.index}.{name}": torch.tensor(part, device="cpu")
                   if isinstance(part, np.ndarray) else part.cpu()
                   for layer in call for name, part in (("k", layer.k), ("v", layer.v))}
        return tensors | {"logits": torch.from_numpy(call.logits.copy()).flatten()}


def computed(args, dtype: torch.dtype | str, ids) -> tuple[Tensors, torch.dtype]:
    model = Transformers(args.model, dtype, args.backend)
    cache, logits = model.prefill(ids, chunk=args.chunk)
    tensors = {"logits": logits}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"layers.{i}.k": layer.keys[0].cpu(), f"layers.{i}.v": layer.values[0].cpu()}
    actual = model.dtype
    del cache
    model.close()
    return tensors, actual


def relative_error(got: torch.Tensor, want: torch.Tensor, device: str) -> float:
    if got.shape != want.shape:
        sys.exit(f"parity: {list(got.shape)}, not {list(want.shape)}")
    got, want = got.to(device).double(), want.to(device).double()
    return ((got - want).norm() / want.norm()).item()


def compare(args, got: Tensors, ids) -> list[dict]:
    """A record for each tensor."""
    progress("parity: transformers in the checkpoint's dtype, and in float32")
    own, dtype = computed(args, "auto", ids)
    want = own if dtype == torch.float32 else computed(args, torch.float32, ids)[0]
    if got.keys() != want.keys():
        sys.exit(f"parity: tensors differ: {sorted(got.keys() ^ want.keys())}")
    records = []
    for name, expected in want.items():
        error = relative_error(got[name], expected, args.backend)
        theirs = relative_error(own[name], expected, args.backend)
        bound = F32_BOUND if dtype == torch.float32 else HALF_BOUND * theirs
        kind = {"k": "K", "v": "V"}.get(name.rsplit(".", 1)[-1], name)
        records.append({"tensor": name, "kind": kind, "error": error, "transformers": theirs,
                        "bound": bound, "ok": error <= bound})  # false for NaN
    return records


def decode(args, client: PrefillClient, ids) -> dict:
    model = Transformers(args.model, "auto", args.backend)

    def pulled(prompt):
        begin = time.perf_counter()
        cache, summary = prefill_into_cache(model.model, prompt, client=client, method="dense",
                                            return_summary=True)
        between = time.perf_counter() - begin
        tokens, first = model.generate(prompt, args.decode, cache)
        return tokens, between + first, between, summary.transport

    for warm_up in (ids[:128], ids):
        for generate in (pulled, lambda prompt: model.generate(prompt, 2)):
            generate(warm_up)
    progress("parity: decoding from both caches")
    ours, our_seconds, usable, transport = pulled(ids)
    alone, their_seconds = model.generate(ids, args.decode)
    alike = [a == b for a, b in zip(ours, alone)]
    exact = model.dtype == torch.float32
    model.close()
    return {"tokens": len(alone), "alike": sum(alike),
            "first_difference": (alike + [False]).index(False), "exact": exact,
            "ok": all(alike) or not exact,
            "transport": transport, "usable_s": usable, "ttft_prefilld_s": our_seconds,
            "ttft_transformers_s": their_seconds}


def main() -> int:
    args = ARGUMENTS
    if args.threads:
        torch.set_num_threads(args.threads)
    ids = token_ids(args.ids, args.tokens, args.model)
    flags = [f"--threads={args.threads}"] if args.threads else []
    result = {"model": args.model.name, "tokens": len(ids), "backend": args.backend}
    # Of those that nobody names cuda_ipc is one, on a GPU.
    transports = [args.transport or "cuda_ipc"]
    with server(args.model, args.backend, args.tokens, flags, transports) as running:
        with PrefillClient(running.target, transport=args.transport) as client:
            progress("parity: prefilld")
            got = served(client, ids, args.backend)
            if args.decode:
                result["decode"] = decode(args, client, ids)
    records = result["tensors"] = compare(args, got, ids)
    kinds = dict.fromkeys(record["kind"] for record in records)
    shown = records if args.rows else [
        max((r for r in records if r["kind"] == kind), key=lambda r: r["error"] / r["bound"])
        for kind in kinds]
    columns = ["tensor", "error", "transformers", "bound", "ok"]
    print(table(columns, [[record[column] for column in columns] for record in shown]))
    outside = sum(not record["ok"] for record in records)
    print(f"parity: {'FAILED' if outside else 'OK'} {args.backend} tokens={len(ids)} "
          f"tensors={len(records)} outside={outside}")
    if args.decode:
        print("decode: {alike} of {tokens} tokens alike, the first {first_difference}; to the "
              "first token: from prefilld's cache {ttft_prefilld_s:.3f} s (over {transport}, "
              "usable after {usable_s:.3f} s), transformers alone {ttft_transformers_s:.3f} s"
              .format(**result["decode"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 1 if outside or not result.get("decode", {"ok": True})["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())
