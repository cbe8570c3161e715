"""Prefill beside transformers: the same tokens, dtype and threads, in turn.

Ours is the time from the request until the whole KV cache is ready to pull, over gRPC; theirs is
one forward pass in a process that has the model loaded.
"""

import json
import pathlib
import statistics
import subprocess
import sys

from bench import MODEL, THREADS, Bench, BenchError, progress
from report import Check, Section

LENGTHS = (1024, 2048, 4096, 7168)
ROUNDS = 3
FASTER_THAN_TRANSFORMERS = 1.0  # the goal is 1.5
JOINT_OVER_DENSE = 1.2          # at the longest


class Transformers:
    """transformers_worker.py, for a `with` block."""

    def __init__(self, model_dir: pathlib.Path):
        worker = pathlib.Path(__file__).with_name("transformers_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(worker), str(model_dir), str(THREADS)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "Transformers":
        self._answer()
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()

    def prefill(self, token_ids: list[int]) -> float:
        """Seconds."""
        self._process.stdin.write(json.dumps({"token_ids": token_ids}) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise BenchError("transformers_worker.py ended early")
        return json.loads(line)


def section(bench: Bench) -> Section:
    out = Section(f"Prefill, F32, {THREADS} threads, medians of {ROUNDS} rounds in turn (seconds)",
                  ["tokens", "transformers", "dense", "joint", "transformers / dense",
                   "dense / joint", "joint density"])
    with bench.server() as server, Transformers(bench.model_dir) as transformers:

        def ours(method: str, tokens: int) -> dict:
            return bench.prefillctl(server, "prefill", f"--model={MODEL}", f"--method={method}",
                                    f"--tokens={bench.tokens_file(tokens)}")

        progress("speed: warming up")
        for method in ("dense", "joint"):
            ours(method, LENGTHS[0])
        transformers.prefill(bench.token_ids[:LENGTHS[0]])

        for tokens in LENGTHS:
            theirs, dense, joint, density = [], [], [], 0.0
            for round_number in range(ROUNDS):
                dense.append(ours("dense", tokens)["ttft_seconds"])
                theirs.append(transformers.prefill(bench.token_ids[:tokens]))
                run = ours("joint", tokens)
                joint.append(run["ttft_seconds"])
                density = run["density"]
                progress(f"speed: {tokens} tokens, round {round_number + 1} of {ROUNDS}: "
                         f"dense {dense[-1]:.2f} s, transformers {theirs[-1]:.2f} s, "
                         f"joint {joint[-1]:.2f} s")
            t, d, j = map(statistics.median, (theirs, dense, joint))
            out.rows.append([tokens, t, d, j, t / d, d / j, density])
            out.checks.append(Check(f"transformers / dense at {tokens} tokens", t / d,
                                    FASTER_THAN_TRANSFORMERS))
        out.checks.append(Check(f"dense / joint at {LENGTHS[-1]} tokens", d / j,
                                JOINT_OVER_DENSE))
    return out
