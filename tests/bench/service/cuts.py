"""Connections that are cut while a cache is computed and pulled: the Python client goes on where it
was, with the same bytes, and the server computes nothing twice.

    PREFILLD_BUILD=$PWD/build build/venv/bin/python tests/bench/service/cuts.py
        [--cuts=1000] [--calls=prefill,pull] [--tokens=3000] [--seed=1]

`prefill` is cut while it is computed, and pulled meanwhile, `pull` is a PullKv of a cache that is
complete; in turn, each of them a few times, at random moments. Exits with 1 unless every call
succeeded, every byte was right, and each prompt took one lease and its tokens once.
"""

import argparse
import collections
import pathlib
import random
import sys
import tempfile
import threading
import time

import rig
from cutting_proxy import CuttingProxy

from e2e import checkpoints, harness
from prefilld import PrefillClient, PrefilldError, RetryPolicy

CUTS_A_CALL = 4
RETRY = RetryPolicy(attempts=300, initial_backoff=0.01, max_backoff=0.1)


class Cutter:
    """Cuts at random moments while a block runs."""

    def __init__(self, proxy: CuttingProxy, draw: random.Random, longest_s: float):
        self._proxy = proxy
        self._moments = sorted(draw.random() * longest_s for _ in range(CUTS_A_CALL))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.cuts = 0

    def __enter__(self) -> "Cutter":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        for moment in self._moments:
            if self._over.wait(max(0.0, began + moment - time.monotonic())):
                return
            self.cuts += self._proxy.cut() > 0


def prefill(client: PrefillClient, prompt: rig.Prompt, cutter: Cutter, seen: rig.Bytes) -> None:
    with cutter, client.prefill(rig.MODEL, prompt.token_ids, method="dense", timeout=60) as call:
        prompt.check(call, seen)


def pull(client: PrefillClient, prompt: rig.Prompt, cutter: Cutter, seen: rig.Bytes) -> None:
    with client.prefill(rig.MODEL, prompt.token_ids, method="dense", timeout=60) as call:
        call.summary
        with cutter:
            prompt.check(call, seen)


CALLS = {"prefill": prefill, "pull": pull}


def measure(args, server: harness.Server, proxy: CuttingProxy, prompt: rig.Prompt) -> bool:
    draw = random.Random(args.seed)
    seen, failures, cuts = rig.Bytes(), collections.Counter(), collections.Counter()
    calls = 0
    began = time.monotonic()
    with PrefillClient(server.target, transport="grpc") as plain:
        start = time.monotonic()
        pull(plain, prompt, Cutter(proxy, draw, 1e9), rig.Bytes())
        longest = time.monotonic() - start
    before = server.metrics()
    with PrefillClient(proxy.target, transport="grpc", retry=RETRY) as client:
        while sum(cuts.values()) < args.cuts:
            call = args.calls[calls % len(args.calls)]
            cutter = Cutter(proxy, draw, longest if call is prefill else longest / 4)
            calls += 1
            try:
                call(client, prompt, cutter, seen)
            except PrefilldError as error:
                failures[f"{call.__name__}: {error.code.name}: {error.message[:100]}"] += 1
            cuts[call.__name__] += cutter.cuts
    harness.eventually(lambda: server.metric("prefilld_leases_active") == 0, timeout=90)
    after = server.metrics()
    leases = harness.moved(before, after, "prefilld_leases_granted_total")
    tokens = harness.moved(before, after, "prefilld_tokens_total")
    print(f"{calls} calls, cut {dict(cuts)} in {time.monotonic() - began:.0f} s; layers {seen}; "
          f"leases {leases:.0f}, tokens {tokens:.0f} of {calls * args.tokens}")
    for failure, count in failures.most_common():
        print(f"failed {count} times: {failure}")
    return not failures and not seen.wrong and leases == calls and tokens == calls * args.tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--calls", type=lambda text: [CALLS[name] for name in text.split(",")],
                        default=[*CALLS.values()])
    parser.add_argument("--tokens", type=int, default=3000, help="of the prompt")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.Checkpoint.create(pathlib.Path(folder) / "model")
        with harness.Server("--kv_memory=256MiB", "--max_connection_rate=100000",
                            log_path=pathlib.Path(folder) / "log.jsonl",
                            models=[(rig.MODEL, model.directory)]) as server, \
                CuttingProxy(server.target) as proxy:
            fine = measure(args, server, proxy, rig.Prompt(model, args.tokens, server.target))
    print("each went on where it was" if fine else "NOT as it must be")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
