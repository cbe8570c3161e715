"""Time to first token of a served model beside transformers' prefill of the same directory, on the
same device, in the same run.

    python tests/bench/model/beside_transformers.py --model=DIR [--backend=cuda]
        [--lengths=512,2048,8192,32768] [--methods=dense,joint,open]
        [--transports=grpc,posix_shm,cuda_ipc] [--attention=cudnn,flash] [--rounds=5] [--pull]
        [--apart] [--ids=FILE] [--flag=--cuda_kernels=sm80 ...] [--json=FILE]

Ours is from the call of PrefillClient until the logits of the last token are here and every layer
of the cache can be pulled; with --pull until K and V of all layers are here too. The transport says
where the cache lies; with --pull and cuda_ipc it can be used on the GPU then, as it is. Theirs is
one forward pass that keeps a cache, until the logits of the last position are on the host. In every
round each runs once, in turn; --apart: the server first, and transformers once it has ended, for
devices that do not hold both.

What fails is said in its line, and the rest goes on. The last column is over transformers' best.

Needs torch and transformers 5, and of GPU memory the weights twice (--apart: once), each side's K
and V of the longest prompt, and what prefilld plans beside (its log's memory_plan lines). An 8B
model in BF16 has 16 GB of weights, and 4.3 GB of K and V at 32,768 tokens; of the host's memory
prefilld takes two such caches.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import needs


def arguments() -> argparse.Namespace:
    def listed(kind):
        return lambda text: [kind(word) for word in text.split(",")]

    parser = needs.model_parser(__doc__)
    add = parser.add_argument
    add("--backend", choices=("cuda", "cpu"), default="cuda", help="of both (%(default)s)")
    add("--lengths", type=listed(int), default=[512, 2048, 8192, 32768], metavar="N,...",
        help="of prompts, tokens (512,2048,8192,32768)")
    add("--methods", type=listed(str), default=["dense", "joint", "open"], metavar="NAME,...",
        help="of prefilld; open: it decides (dense,joint,open)")
    add("--transports", type=listed(str), default=["grpc", "posix_shm"], metavar="NAME,...",
        help="where the cache lies: grpc, posix_shm, cuda_ipc (grpc,posix_shm)")
    add("--attention", type=listed(str), default=["cudnn", "flash"], metavar="NAME,...",
        help="of transformers' sdpa: cudnn, flash, efficient, math, any (cudnn,flash)")
    add("--rounds", type=int, default=5, help="after one that warms up (%(default)s)")
    add("--pull", action="store_true", help="until all of K and V are here")
    add("--apart", action="store_true", help="never both on the device at once")
    add("--ids", type=pathlib.Path, metavar="FILE", help="JSON array of token IDs; else random")
    add("--flag", action="append", default=[], metavar="--NAME=VALUE",
        help="of the server; may be repeated")
    add("--json", type=pathlib.Path, metavar="FILE", help="the table, to be written")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules(*needs.CLIENT, *needs.TRANSFORMERS[ARGUMENTS.backend])
    needs.server()

import numpy as np
from served import MODEL, server, token_ids

from bench import progress  # first of served's path
from prefilld import PrefillClient
from report import table
from transformers_side import Transformers

THEIRS = "transformers"


class Measured:
    """What one way of prefilling showed at one length."""

    def __init__(self):
        self.seconds: list[float] = []
        self.density: float | str = ""
        self.error = ""


Run = Callable[[np.ndarray, Measured], None]


def ours(client: PrefillClient, method: str, pull: bool, device: str | None) -> Run:
    def run(ids: np.ndarray, measured: Measured) -> None:
        policy = {} if method == "open" else {"method": method}
        begin = time.perf_counter()
        with client.prefill(MODEL, ids, return_logits=True, widen=False, device=device,
                            **policy) as call:
            layers = list(call) if pull else []
            call.logits  # noqa: B018  (waits for the end)
            measured.seconds.append(time.perf_counter() - begin)
            measured.density = call.report.mean_density
            del layers
    return run


def theirs(model: Transformers, attention: str) -> Run:
    def run(ids: np.ndarray, measured: Measured) -> None:
        begin = time.perf_counter()
        model.prefill(ids, attention)
        measured.seconds.append(time.perf_counter() - begin)
    return run


@contextlib.contextmanager
def served_runs(args):
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(
            server(args.model, args.backend, max(args.lengths), args.flag, args.transports))
        runs = {}
        for transport in args.transports:
            client = stack.enter_context(PrefillClient(running.target, transport=transport))
            for method in args.methods:
                runs["prefilld", method, transport] = ours(
                    client, method, args.pull, "cuda" if transport == "cuda_ipc" else None)
        yield runs


@contextlib.contextmanager
def transformers_runs(args):
    model = Transformers(args.model, "auto", args.backend)
    yield {(THEIRS, attention, ""): theirs(model, attention) for attention in args.attention}
    model.close()


def measure(args, runs: dict, results: dict) -> None:
    for length in args.lengths:
        ids = token_ids(args.ids, length, args.model)
        for round_number in range(-1, args.rounds):  # the first is a warm-up
            progress(f"{length} tokens, round {round_number + 1} of {args.rounds}")
            for name, run in runs.items():
                measured = results.setdefault((length, *name), Measured())
                if measured.error:
                    continue
                try:
                    run(ids, measured)
                except Exception as error:  # of many kinds; the others go on
                    measured.error = f"{type(error).__name__}: {error}".splitlines()[0][:60]
                if round_number < 0:
                    measured.seconds.clear()


def rows(results: dict) -> list[list]:
    out = []
    for (length, side, how, transport), measured in sorted(
            results.items(), key=lambda item: item[0][0]):
        best = min((statistics.median(m.seconds) for key, m in results.items()
                    if key[:2] == (length, THEIRS) and not m.error), default=None)
        if measured.error:
            out.append([length, side, how, transport, "", "", "", measured.error])
            continue
        median = statistics.median(measured.seconds)
        out.append([length, side, how, transport, 1e3 * median,
                    f"{1e3 * min(measured.seconds):.4g}..{1e3 * max(measured.seconds):.4g}",
                    measured.density, "" if best is None else best / median])
    return out


COLUMNS = ["tokens", "side", "method", "transport", "TTFT ms", "least..most", "density",
           "transformers / this"]


def main() -> int:
    args, results = ARGUMENTS, {}
    sides = (served_runs, transformers_runs)
    for group in [[side] for side in sides] if args.apart else [sides]:
        with contextlib.ExitStack() as stack:
            runs = {}
            for side in group:
                runs |= stack.enter_context(side(args))
            measure(args, runs, results)
    lines = rows(results)
    print(table(COLUMNS, lines))
    if args.json:
        args.json.write_text(json.dumps([dict(zip(COLUMNS, line)) for line in lines], indent=1))
    return 1 if any(measured.error for measured in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
