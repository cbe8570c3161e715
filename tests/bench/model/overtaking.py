"""Short prompts that arrive while a long one is computed: how long they wait, and what it loses.

    python tests/bench/model/overtaking.py --model=DIR [--backend=cuda] [--long=131072]
        [--short=1024] [--shorts=5] [--crowd=64] [--crowd-tokens=2048] [--method=dense]
        [--stream] [--equal=65536] [--skip-alone] [--flag=--gpu_memory=48GiB ...] [--json=FILE]

First each alone: the long prompt, short ones (the median is their own time), and a crowd of prompts
at once. Then short ones, one after the other, while the long one is computed; then the crowd beside
the long one. A time is from the call until the logits of the last position are here. Exits with 1
where a short prompt waited for longer than two steps (0.1 s each) beside twice its own time, where
the long one took more than 5% longer than alone (their own times are not counted), or where the
crowd beside the long one took more than 10% longer than the two one after the other.

--stream: the long prompt is not kept (retain = false) but pulled while it is computed, for prompts
whose cache no memory holds. --equal=N: before, K and V of N tokens so pulled are compared, by
CRC32C, with those of the same prompt kept; 0: not. --skip-alone: the long prompt is computed once,
and what it loses is not told.

GPU memory: the weights and what prefilld plans beside (its log's memory_plan lines). The host keeps
the caches of all that runs at a time (with --stream two layers of the long one): of Llama-3.1-8B's
shape 0.13 GB a thousand tokens.
"""

import argparse
import json
import pathlib
import statistics
import sys
import threading
import time

import needs

STEP_S = 0.1
LOSS_MAX, SHARE_MAX = 0.05, 0.10


def arguments() -> argparse.Namespace:
    parser = needs.model_parser(__doc__)
    add = parser.add_argument
    add("--backend", choices=("cuda", "cpu"), default="cuda", help="%(default)s")
    add("--long", type=int, default=131072, metavar="TOKENS", help="%(default)s")
    add("--short", type=int, default=1024, metavar="TOKENS", help="%(default)s")
    add("--shorts", type=int, default=5, help="one after the other (%(default)s)")
    add("--crowd", type=int, default=64, help="prompts at once; 0: none (%(default)s)")
    add("--crowd-tokens", type=int, default=2048, metavar="TOKENS", help="of each (%(default)s)")
    add("--method", default="dense", help="of the long prompt (%(default)s)")
    add("--stream", action="store_true", help="the long prompt is not kept")
    add("--equal", type=int, default=0, metavar="TOKENS",
        help="compare streamed and kept K and V of so many (%(default)s)")
    add("--skip-alone", action="store_true", help="compute the long prompt once")
    add("--flag", action="append", default=[], metavar="--NAME=VALUE",
        help="of the server; may be repeated")
    add("--json", type=pathlib.Path, metavar="FILE", help="the figures, to be written")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules(*needs.CLIENT)
    needs.server()

import google_crc32c
from served import MODEL, server, token_ids

from bench import progress  # of served's path
from prefilld import PrefillClient


class Prompt(threading.Thread):
    """One prompt on a thread of its own; `seconds` once it is joined."""

    def __init__(self, target: str, ids, method: str, retain: bool = True):
        super().__init__()
        self._target, self._ids, self._method, self._retain = target, ids, method, retain
        self.seconds = 0.0
        self.checksums: list[tuple[int, int]] = []
        self.started = threading.Event()
        self.layers_begun = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            began = time.perf_counter()
            with PrefillClient(self._target, transport="grpc") as client, client.prefill(
                    MODEL, self._ids, method=self._method, retain=self._retain, widen=False,
                    return_logits=True, progress=self._follow) as call:
                self.started.set()
                if not self._retain:
                    self._pull(call)
                call.logits  # noqa: B018  (waits for it)
                self.seconds = time.perf_counter() - began
                if self._retain and CHECKED:
                    self._pull(call)
        except BaseException as error:
            self._error = error
            self.started.set()
            self.layers_begun.set()

    def _pull(self, call) -> None:
        for layer in call:
            if CHECKED:
                self.checksums.append((google_crc32c.value(layer.k.tobytes()),
                                       google_crc32c.value(layer.v.tobytes())))

    def _follow(self, fraction: float, phase: str) -> None:
        if phase == "compute" and fraction > 0:
            self.layers_begun.set()

    def wait(self) -> float:
        self.join()
        if self._error is not None:
            raise self._error
        return self.seconds


CHECKED = False  # whether K and V are summed up


def seconds_of(prompts: list[Prompt]) -> float:
    """All at once, until the last one's logits are here."""
    for prompt in prompts:
        prompt.start()
    return max(prompt.wait() for prompt in prompts)


def equal(target: str, ids, method: str) -> bool:
    global CHECKED
    CHECKED = True
    sums = []
    for retain in (True, False):
        prompt = Prompt(target, ids, method, retain)
        seconds_of([prompt])
        sums.append(prompt.checksums)
    CHECKED = False
    return sums[0] == sums[1] and len(sums[0]) > 0


def main() -> int:
    args = ARGUMENTS
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    kept = max(args.equal, 2 * args.long // layers) if args.stream else args.long
    flags = [f"--max_prompt_tokens={args.long}", *args.flag]
    figures: dict[str, object] = {"long": args.long, "short": args.short, "method": args.method}
    room = kept + args.short + args.crowd * (args.crowd_tokens + 128)  # at a time
    with server(args.model, args.backend, max(4096, room // 2),
                ["--transports=grpc", *flags]) as running:
        def long_prompt() -> Prompt:
            return Prompt(running.target, token_ids(None, args.long, args.model), args.method,
                          retain=not args.stream)

        def short_prompt() -> Prompt:
            return Prompt(running.target, token_ids(None, args.short, args.model), "dense")

        def crowd() -> list[Prompt]:
            return [Prompt(running.target, token_ids(None, args.crowd_tokens, args.model), "dense")
                    for _ in range(args.crowd)]

        if args.equal:
            progress(f"{args.equal} tokens, kept and streamed")
            figures["bytes_equal"] = equal(
                running.target, token_ids(None, args.equal, args.model), args.method)
        progress("alone")
        shorts = [seconds_of([short_prompt()]) for _ in range(args.shorts + 1)][1:]
        figures["short_alone_s"] = own = statistics.median(shorts)
        alone = 0.0 if args.skip_alone else seconds_of([long_prompt()])
        progress(f"{args.shorts} of {args.short} tokens beside {args.long}")
        longer = long_prompt()
        longer.start()
        longer.layers_begun.wait()
        waited = []
        for _ in range(args.shorts):
            time.sleep(min(1.0, alone / (2 * args.shorts)) if alone else 1.0)
            waited.append(seconds_of([short_prompt()]))
        beside = longer.wait()
        bound = 2 * STEP_S + 2 * own
        figures |= {"short_beside_s": statistics.median(waited), "short_worst_s": max(waited),
                    "short_bound_s": bound, "long_beside_s": beside}
        fine = max(waited) <= bound
        if alone:
            figures |= {"long_alone_s": alone,
                        "long_loses": (beside - args.shorts * own) / alone - 1}
            fine &= figures["long_loses"] <= LOSS_MAX
        if alone and args.crowd:
            progress(f"{args.crowd} of {args.crowd_tokens} tokens beside {args.long}")
            figures["crowd_alone_s"] = crowd_alone = seconds_of(crowd())
            together = [long_prompt(), *crowd()]
            figures["both_s"] = both = seconds_of(together)
            figures["crowd_beside_s"] = max(prompt.seconds for prompt in together[1:])
            figures["over_both_alone"] = both / (alone + crowd_alone)
            fine &= both <= (1 + SHARE_MAX) * (alone + crowd_alone)
    fine &= figures.get("bytes_equal", True)
    for name, value in figures.items():
        print(f"{name:18} {value:.4f}" if isinstance(value, float) else f"{name:18} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
