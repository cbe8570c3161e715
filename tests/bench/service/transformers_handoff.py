"""transformers alone beside transformers that goes on from prefilld's cache, prompt by prompt.

    python tests/bench/service/transformers_handoff.py [--prompts=20] [--shortest=200]
        [--longest=7000]

Prompts are pieces of a text, of lengths spread evenly from the shortest to the longest, beginning
at evenly spread places. Each is continued greedily by transformers alone (float32, sdpa), which
gives the tokens and distributions that the rest is compared with:

dense   generate from prefill_into_cache(method="dense"): must give every token alike.
sparse  the tokens of transformers alone, read over the cache of --method at --gamma:
        KL      of the next-token distribution, KL(alone, sparse) in nats, mean over the tokens
        agree   positions at which the likeliest token is the same
        same    tokens before the first position at which it is not: how far generate is the same

Times: alone and dense are to the first token out of generate, dense with prefill_into_cache before
it; sparse is prefill_into_cache. Exits with 1 when a token of a dense run differs. Needs
torch and transformers, as build/bench-venv has them; about a quarter of an hour on two processors
that have nothing else to do.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "client/python"))  # of this checkout, whatever is installed
sys.path += [str(ROOT / "client/python/examples"), str(ROOT / "tests")]

from e2e import harness  # noqa: E402
from prefilld import PrefillClient  # noqa: E402
from prefilld.hf import prefill_into_cache  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

MODEL = "smollm2"


class FirstToken:
    """What generate calls a streamer; notes when the first token came."""

    def __init__(self):
        self.begin, self.times = time.perf_counter(), []

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    @property
    def seconds(self):
        return self.times[1] - self.begin  # [0] is the prompt


class Runner:
    """The model on both sides."""

    def __init__(self, args, client):
        self.args, self.client = args, client
        self.model = AutoModelForCausalLM.from_pretrained(
            args.model_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.model.generation_config.eos_token_id = None  # an end token is one like others

    @torch.inference_mode()
    def generate(self, ids, cache=None):
        """(new tokens [T], logits [T, vocab], seconds to the first token), greedy."""
        first = FirstToken()
        out = self.model.generate(
            ids, past_key_values=cache, max_new_tokens=self.args.tokens, do_sample=False,
            pad_token_id=0, attention_mask=torch.ones_like(ids), output_logits=True,
            return_dict_in_generate=True, streamer=first)
        return out.sequences[0, ids.shape[1]:], torch.cat(out.logits), first.seconds

    @torch.inference_mode()
    def read(self, ids, tokens, cache):
        """logits [T, vocab] at the positions of `tokens` [T], which are read, not chosen."""
        text = torch.cat([ids[0, -1:], tokens[:-1]])[None]
        return self.model(text, past_key_values=cache).logits[0]

    def prefilled(self, ids, method, **policy):
        """(cache, summary, seconds)"""
        begin = time.perf_counter()
        cache, summary = prefill_into_cache(self.model, ids, client=self.client, method=method,
                                            return_summary=True, **policy)
        return cache, summary, time.perf_counter() - begin

    def row(self, ids):
        tokens, expected, alone_s = self.generate(ids)
        cache, _, dense_s = self.prefilled(ids, "dense")
        dense, _, first_s = self.generate(ids, cache)
        cache, summary, sparse_s = self.prefilled(ids, self.args.method, gamma=self.args.gamma)
        got = self.read(ids, tokens, cache)

        p, q = expected.log_softmax(-1), got.log_softmax(-1)
        alike = (got.argmax(-1) == tokens).tolist()
        return {
            "dense": int((dense == tokens).sum()),
            "density": summary.report.mean_density,
            "kl": max(0.0, (p.exp() * (p - q)).sum(-1).mean().item()),  # rounding
            "agree": sum(alike), "same": (alike + [False]).index(False),
            "alone_s": alone_s, "dense_s": dense_s + first_s, "sparse_s": sparse_s,
        }


def prompts(args, ids):
    """(begin, length) of each."""
    last = max(1, args.prompts - 1)
    for i in range(args.prompts):
        length = min(len(ids), round(args.shortest + (args.longest - args.shortest) * i / last))
        # A step that has no common divisor with the count takes the places in another order.
        yield round((len(ids) - length) * (7 * i % args.prompts) / last), length


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=pathlib.Path,
                        default=harness.BUILD / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--document", type=pathlib.Path,
                        default=pathlib.Path("/usr/share/common-licenses/GPL-3"))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--shortest", type=int, default=200, help="tokens")
    parser.add_argument("--longest", type=int, default=7000, help="tokens")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of each prompt")
    parser.add_argument("--method", default="joint", help="of the sparse run")
    parser.add_argument("--gamma", type=float, default=.95, help="of the sparse run")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()

    text = Tokenizer(args.model_dir).encode(args.document.read_text(encoding="utf-8"))
    rows = []
    print(f"{args.document}, {args.tokens} new tokens; sparse: {args.method} {args.gamma}\n\n"
          "| prompt | at | dense: alike | density | KL | agree | same | alone s | dense s "
          "| sparse s |\n" + "|---" * 10 + "|", flush=True)
    with (tempfile.TemporaryDirectory() as logs,
          harness.Server(f"--threads={args.threads}", log_path=pathlib.Path(logs) / "log.jsonl",
                         models=[(MODEL, args.model_dir)]) as server,
          PrefillClient(server.target) as client):
        runner = Runner(args, client)
        runner.row(torch.tensor([text[:64]]))  # both sides have run once before anything is timed
        for i, (begin, length) in enumerate(prompts(args, text)):
            print(f"{i + 1} of {args.prompts}: {length} tokens", file=sys.stderr, flush=True)
            row = runner.row(torch.tensor([text[begin:begin + length]]))
            rows.append(row)
            print("| {} | {} | {dense} | {density:.3f} | {kl:.5f} | {agree} | {same} "
                  "| {alone_s:.2f} | {dense_s:.2f} | {sparse_s:.2f} |".format(length, begin, **row),
                  flush=True)

    total, count = len(rows) * args.tokens, sum(row["dense"] for row in rows)
    exact = sum(row["dense"] == args.tokens for row in rows)
    kl = sum(row["kl"] for row in rows) / len(rows)
    print(f"\ntransformers_handoff: {'OK' if count == total else 'FAILED'} "
          f"dense: {exact} of {len(rows)} prompts alike, {count} of {total} tokens; "
          f"{args.method} {args.gamma}: mean KL {kl:.5f}, "
          f"{sum(row['agree'] for row in rows)} of {total} tokens agree")
    sys.exit(count != total)


if __name__ == "__main__":
    main()
