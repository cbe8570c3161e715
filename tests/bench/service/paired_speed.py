"""Prefill of two builds in turn: is the second slower?

    python tests/bench/service/paired_speed.py --before=BUILD --after=BUILD --model=DIR
        [--pairs=20] [--lengths=1024,4096] [--methods=dense,joint]

A pair is the same prompt on both servers, one after the other, the first of them by turns. The time
is from the call until its summary: the whole cache is ready then. Printed is the median of the
pairs' ratios after / before with its bootstrap 95% interval. Exits 1 where the interval neither
holds 1 nor stays below 1.02.
"""

import json
import pathlib
import statistics
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # tests/bench

from bench import progress  # noqa: E402
from report import table  # noqa: E402
from two_builds import clients, parser  # noqa: E402

from prefilld import PrefillClient  # noqa: E402

SLOWER = 1.02
RESAMPLES = 10000


def seconds(client: PrefillClient, ids: np.ndarray, method: str) -> float:
    begin = time.perf_counter()
    with client.prefill("model", ids, method=method) as call:
        call.summary  # noqa: B018  (waits for it)
        return time.perf_counter() - begin


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Of the median, 95%."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [.025, .975])
    return float(low), float(high)


def main() -> int:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--model", type=pathlib.Path, required=True)
    flags.add_argument("--pairs", type=int, default=20)
    flags.add_argument("--lengths", default="1024,4096")
    flags.add_argument("--methods", default="dense,joint")
    args = flags.parse_args()
    vocab_size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    rows, slower = [], False
    with clients(args, args.model.resolve()) as sides:
        for tokens in map(int, args.lengths.split(",")):
            ids = np.random.default_rng(tokens).integers(0, vocab_size, tokens)
            for method in args.methods.split(","):
                for client in sides:  # warm-up
                    seconds(client, ids, method)
                times = np.empty((args.pairs, 2))
                for pair in range(args.pairs):
                    for side in ((0, 1), (1, 0))[pair % 2]:
                        times[pair, side] = seconds(sides[side], ids, method)
                    progress(f"{method}, {tokens} tokens, pair {pair + 1} of {args.pairs}: "
                             f"{times[pair, 0]:.3f} s, {times[pair, 1]:.3f} s")
                ratios = times[:, 1] / times[:, 0]
                low, high = interval(ratios)
                ok = low <= 1 or high < SLOWER
                slower |= not ok
                rows.append([method, tokens, *map(float, np.median(times, axis=0)),
                             statistics.median(ratios.tolist()), f"{low:.3f} to {high:.3f}",
                             "ok" if ok else "SLOWER"])
    print(table(["method", "tokens", "before s", "after s", "after / before", "95% interval", ""],
                rows))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
