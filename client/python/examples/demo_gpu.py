"""The whole way on one GPU: prefilld computes a real document, transformers goes on from the cache
where it lies, in another process, without a copy. `make demo-gpu` runs this.

The same document and the same model three ways: transformers alone, and from prefilld's cache,
dense and joint. The table says how long the first token took and how many tokens are those of
transformers alone; the last line also how far joint's next-token distributions are from dense's.

Needs an NVIDIA GPU, a prefilld with the CUDA backend, torch 2.5 or later and transformers 5.
"""

import argparse
import dataclasses
import pathlib
import signal
import sys
import time
from typing import Any

from demo import DemoError, server
from prefilld import PrefillClient, PrefilldError, Summary
from progress import Progress

NEW_TOKENS = 96
GAMMA = 0.9
CACHES = 3          # that prefilld has room for: one goes while the next one comes
START_S = 600       # a large model is read, hashed and sent to the GPU


@dataclasses.dataclass
class Run:
    """One way to the tokens."""

    name: str
    ttft_s: float           # from the call to the first token
    tokens: list[int]
    summary: Summary | None = None   # of prefilld

    @property
    def density(self) -> str:
        return "" if self.summary is None else f"{self.summary.report.mean_density:.3f}"


class FirstToken:
    """What generate calls a streamer; notes when the first token came."""

    def __init__(self):
        self._times: list[float] = []

    def put(self, _) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def at(self) -> float:
        return self._times[1]  # [0] is the prompt


class Decoder:
    """transformers on the GPU, and the way to prefilld."""

    def __init__(self, model_dir: pathlib.Path):
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise DemoError(f"torch and transformers are needed: {error}; {sys.executable} -m pip "
                            "install torch 'transformers>=5'") from None
        if not torch.cuda.is_available():
            raise DemoError("torch sees no GPU here; `make demo` needs none")
        logging.disable_progress_bar()
        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype="auto", attn_implementation="sdpa").to("cuda").eval()
        self.model.generation_config.eos_token_id = None  # an end token is one like others

    def kv_bytes(self, tokens: int) -> int:
        """Of a cache of so many tokens."""
        config = self.model.config
        heads = config.num_attention_heads
        width = (getattr(config, "num_key_value_heads", None) or heads) * (
            getattr(config, "head_dim", None) or config.hidden_size // heads)
        return 2 * config.num_hidden_layers * width * self.model.dtype.itemsize * tokens

    def prefill(self, client: PrefillClient, ids: Any, **policy: Any) -> tuple[Any, Summary]:
        from prefilld.hf import prefill_into_cache

        return prefill_into_cache(self.model, ids, client=client, return_summary=True,
                                  attention_mask=self.torch.ones_like(ids), **policy)

    def run(self, name: str, ids: Any, client: PrefillClient | None = None, **policy: Any) -> Run:
        """client: without one transformers computes the prompt too."""
        with Progress(name), self.torch.inference_mode():
            begin, first = time.perf_counter(), FirstToken()
            cache, summary = (None, None) if client is None else self.prefill(client, ids, **policy)
            out = self.model.generate(
                ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False,
                pad_token_id=0, attention_mask=self.torch.ones_like(ids), streamer=first)
        return Run(name, first.at - begin, out[0, ids.shape[1]:].tolist(), summary)

    def read(self, client: PrefillClient, ids: Any, tokens: list[int], **policy: Any) -> Any:
        """Log-probabilities [tokens, vocabulary] at the places of `tokens`, which are read over the
        prompt's cache, not chosen."""
        with self.torch.inference_mode():
            cache, _ = self.prefill(client, ids, **policy)
            text = [[int(ids[0, -1]), *tokens[:-1]]]
            return self.model(self.torch.tensor(text, device="cuda"),
                              past_key_values=cache).logits[0].float().log_softmax(-1)


def alike(run: Run, other: Run) -> int:
    """Tokens that are the same at the same place."""
    return sum(a == b for a, b in zip(run.tokens, other.tokens, strict=True))


def print_table(runs: list[Run]) -> None:
    rows = [("", "first token s", "density", "cache over", "as alone")]
    for run in runs:
        rows.append((run.name, f"{run.ttft_s:.3f}", run.density,
                     run.summary.transport if run.summary else "",
                     f"{alike(run, runs[0])}/{NEW_TOKENS}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))
    print("as alone: decoded tokens that are transformers' own at the same place; behind the first "
          "other one texts go apart")


def demo(build: pathlib.Path, model_dir: pathlib.Path, document: pathlib.Path, tokens: int) -> None:
    decoder = Decoder(model_dir)
    ids = decoder.tokenizer(document.read_text(encoding="utf-8"),
                            return_tensors="pt").input_ids[:, :tokens].to("cuda")
    count = ids.shape[1]
    print(f"{document}: {count} tokens; {model_dir.name} on "
          f"{decoder.torch.cuda.get_device_name()}")
    logs = build / "demo"
    logs.mkdir(parents=True, exist_ok=True)
    room = f"{(CACHES * decoder.kv_bytes(count + 128) >> 20) + 64}MiB"
    dense, joint = {"method": "dense"}, {"method": "joint", "gamma": GAMMA}
    with (server(build, model_dir, logs / "prefilld-gpu.log",
                 ["--backend=cuda", f"--kv_memory={room}", f"--kv_device_memory={room}"],
                 START_S) as target,
          PrefillClient(target) as client):
        ways: list[tuple[str, dict[str, Any]]] = [
            ("transformers alone", {}), ("prefilld, dense", {"client": client, **dense}),
            (f"prefilld, joint {GAMMA}", {"client": client, **joint})]
        for _, options in ways:  # each has run once before anything is timed
            decoder.run("warm-up", ids, **options)
        runs = [decoder.run(name, ids, **options) for name, options in ways]
        p, q = (decoder.read(client, ids, runs[1].tokens, **policy) for policy in (dense, joint))
        divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)  # below 0 is rounding
    print_table(runs)
    alone, from_dense, from_joint = runs
    print(f"\nthe document goes on: {decoder.tokenizer.decode(from_joint.tokens)!r}")
    print(f"\ndemo-gpu: OK tokens={count} cache_over={from_dense.summary.transport} "
          f"ttft_alone_s={alone.ttft_s:.3f} ttft_dense_s={from_dense.ttft_s:.3f} "
          f"ttft_joint_s={from_joint.ttft_s:.3f} "
          f"agree_dense={alike(from_dense, alone)}/{NEW_TOKENS} "
          f"agree_joint={alike(from_joint, from_dense)}/{NEW_TOKENS} "
          f"kl_joint_dense_mean={divergence.mean().item():.5f} max={divergence.max().item():.5f}")


def main() -> int:
    parser = argparse.ArgumentParser(description="prefill and decode on one GPU: make demo-gpu")
    parser.add_argument("--build", type=pathlib.Path, required=True, help="holds prefilld")
    parser.add_argument("--model", type=pathlib.Path, metavar="DIR",
                        help="a Hugging Face directory (models/SmolLM2-135M-Instruct there)")
    parser.add_argument("--document", type=pathlib.Path,
                        default=pathlib.Path("/usr/share/common-licenses/GPL-3"))
    parser.add_argument("--tokens", type=int, default=7600, help="of it at most (%(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the server ends
    try:
        demo(args.build, args.model or args.build / "models" / "SmolLM2-135M-Instruct",
             args.document, args.tokens)
    except (DemoError, PrefilldError, OSError) as error:
        print(f"demo-gpu: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo-gpu: FAILED: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
