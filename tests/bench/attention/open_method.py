"""What it costs to leave the method open on a GPU, at every length.

    python tests/bench/attention/open_method.py [--lengths=256,1024,...] [--rounds=11] [--flags=...]

Calls without a method and dense ones in turn on one server; --flags are the server's.
Needs torch on the server's GPU. The tensors lie in the server's memory (attend_in_place), so that
nothing is copied. Times are the server's own, of everything between the upload and the outputs;
medians, of five times as many rounds up to 4,096 tokens, where a microsecond counts. Two kinds of
input: `random`, where nothing can be skipped, and `structured`, where an eighth of the blocks holds
most of the mass. Worst: the largest ratio of a call to the dense call beside it; a guess that turns
out wrong costs its selection. Chosen, density: of the last round.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # tests/bench

from bench import Server, progress  # noqa: E402
from report import table  # noqa: E402

from prefilld import PrefillClient  # noqa: E402

HEADS, KV_HEADS, D = 32, 8, 128
STAGES = ("estimate", "select", "attention")
COLUMNS = ["input", "tokens", "dense ms", "open ms", "ratio", "mean", "worst", "chosen", "density"]


def inputs(kind: str, tokens: int) -> list[torch.Tensor]:
    """q, k, v [tokens, heads, D]."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v = (torch.randn(tokens, heads, D, generator=generator, device="cuda",
                           dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    if kind == "structured":
        # Every query looks at one block of keys in eight, each of them worth exp(5) of the others.
        q[:, :, 0] += 5 * D**0.5 / 4
        k[torch.arange(tokens, device="cuda") // 128 % 8 == 0, :, 0] += 4
    return [q, k, v]


def seconds(client: PrefillClient, tensors: list[torch.Tensor], **policy) -> tuple[float, object]:
    q, k, v = tensors
    with client.attend_in_place(q.shape, k.shape, "bf16", **policy) as call:
        for place, tensor in zip((call.q, call.k, call.v), tensors):
            place.copy_(tensor)
        result = call.run()
        took = result.summary.seconds
        return sum(took[stage] for stage in STAGES), result.report


def measure(client: PrefillClient, kind: str, tokens: int, rounds: int, warm: int) -> list:
    tensors = inputs(kind, tokens)
    dense, opened = [], []
    for round_ in range(warm + rounds):
        dense_s, _ = seconds(client, tensors, method="dense")
        open_s, report = seconds(client, tensors)
        if round_ >= warm:
            dense.append(dense_s)
            opened.append(open_s)
    ratios = [o / d for o, d in zip(opened, dense)]
    density = report.mean_density
    return [kind, tokens, f"{1e3 * statistics.median(dense):.3f}",
            f"{1e3 * statistics.median(opened):.3f}",
            f"{statistics.median(opened) / statistics.median(dense):.3f}",
            f"{sum(opened) / sum(dense):.3f}", f"{max(ratios):.2f}",
            "dense" if density == 1 else "sparse", f"{density:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=",".join(str(256 << i) for i in range(11)))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--flags", default="", help="of the server, by spaces")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        with Server("--backend=cuda", "--attend_memory=32GiB", *args.flags.split(),
                    log_path=f"{directory}/log.jsonl") as server:
            with PrefillClient(server.target) as client:
                for tokens in map(int, args.lengths.split(",")):
                    short = tokens <= 4096
                    rounds, warm = (5 * args.rounds, 10) if short else (args.rounds, 3)
                    for kind in ("random", "structured"):
                        row = measure(client, kind, tokens, rounds, warm)
                        progress(" ".join(map(str, row)))
                        rows.append(row)
    print(table(COLUMNS, rows))


if __name__ == "__main__":
    main()
