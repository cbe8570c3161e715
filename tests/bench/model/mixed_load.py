"""Minutes of prompts of all sizes, some cancelled, some of clients that are killed: what a server
holds before, while and after.

    python tests/bench/model/mixed_load.py --model=DIR [--backend=cuda] [--seconds=180]
        [--clients=6] [--longest=8192]

Clients are processes. Each prefills prompts of 16 to --longest tokens (most are short), dense,
joint or flexprefill, over grpc or posix_shm, and pulls the cache; it cancels one prompt in ten.
One prompt in twenty ends with its client, by kill -9, and another client comes. Every ten seconds
a line says what the server holds. In the end, when the leases of the killed have run out, exits
with 1 unless blocks, segments and leases are as before the first client, device memory and threads
no more than after the first third of the time (gRPC keeps threads by its connections, cuDNN its
workspaces, once they were needed), and every admitted prompt finished, was cancelled or failed.

GPU memory: the weights and what prefilld plans beside (its log's memory_plan lines). The host keeps
two caches of --longest tokens a client: of Llama-3.1-8B's shape, as set, 13 GB.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import needs


def arguments() -> argparse.Namespace:
    parser = needs.model_parser(__doc__)
    add = parser.add_argument
    add("--backend", choices=("cuda", "cpu"), default="cuda", help="%(default)s")
    add("--seconds", type=float, default=180, help="of load (%(default)s)")
    add("--clients", type=int, default=6, help="at a time (%(default)s)")
    add("--longest", type=int, default=8192, metavar="TOKENS", help="prompt (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules(*needs.CLIENT)
    needs.server()

import grpc
from served import MODEL, server

from e2e import harness  # after served, which knows the path
from prefilld import PrefillClient, PrefilldError

TTL_S = 15
CANCELLED_SHARE = 0.10
KILLED_SHARE = 0.05
KEPT = ("device", "threads")  # by libraries, once needed


def client(target: str, vocabulary: int, longest: int, seed: int) -> None:
    draw = random.Random(seed)
    while True:
        tokens = min(longest, int(16 * (longest / 16) ** draw.random() ** 2))
        ids = [draw.randrange(vocabulary) for _ in range(tokens)]
        transport = draw.choice(["grpc", "posix_shm"])
        method = draw.choice(["dense", "joint", "flexprefill", None])
        fate = draw.random()
        try:
            with PrefillClient(target, transport=transport) as prefilld, \
                    prefilld.prefill(MODEL, ids, lease_ttl=TTL_S,
                                     **({"method": method} if method else {})) as call:
                call.lease
                if fate < KILLED_SHARE:
                    time.sleep(draw.random() * 0.05)
                    os.kill(os.getpid(), signal.SIGKILL)
                if fate < KILLED_SHARE + CANCELLED_SHARE:
                    time.sleep(draw.random() * 0.05)
                    call.cancel()
                else:
                    for _ in call:
                        pass
        except PrefilldError as error:
            if error.code not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED):
                print(f"client: {error}", flush=True)


def held(running) -> dict[str, float]:
    wanted = {"blocks": ("prefilld_kv_blocks", {"state": "free"}),
              "segments lent": ("prefilld_kv_segment_bytes", {"state": "lent"}),
              "leases": ("prefilld_leases_active", {}),
              "running": ("prefilld_requests_running", {}),
              "waiting": ("prefilld_requests_waiting", {}),
              "device": ("prefilld_gpu_memory_bytes", {"kind": "device"})}
    samples = {name: running.metric(metric, **labels) for name, (metric, labels) in wanted.items()}
    return samples | {"threads": running.threads(), "rss": running.memory_kib("VmRSS") << 10}


def tell(at: float, samples: dict[str, float]) -> None:
    print(f"{at:5.0f} s  " + "  ".join(f"{name} {value:.0f}" for name, value in samples.items()),
          flush=True)


def ends(running) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in running.log():
        if line["event"] in ("prefill_admitted", "prefill_finished"):
            name = line.get("code", "admitted")
            counts[name] = counts.get(name, 0) + 1
    return counts


def main() -> int:
    args = ARGUMENTS
    spawn = multiprocessing.get_context("spawn")
    with server(args.model, args.backend, args.longest * args.clients) as running:
        vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
        with PrefillClient(running.target) as prefilld:  # what the first prompts take
            for method in ("dense", "joint", "flexprefill"):
                with prefilld.prefill(MODEL, [1] * args.longest, method=method) as call:
                    call.summary
        time.sleep(2)
        before = held(running)
        kept = None
        tell(0, before)
        began, told, killed = time.monotonic(), 0.0, 0
        clients = [None] * args.clients
        seed = 0
        while time.monotonic() - began < args.seconds:
            for i, process in enumerate(clients):
                if process is not None and process.is_alive():
                    continue
                killed += process is not None
                seed += 1
                clients[i] = spawn.Process(target=client, args=(running.target, vocabulary,
                                                                args.longest, seed))
                clients[i].start()
            if time.monotonic() - began - told > 10:
                told = time.monotonic() - began
                samples = held(running)
                tell(told, samples)
                if told > args.seconds / 3:
                    kept = kept or samples
            time.sleep(0.05)
        for process in clients:
            process.terminate()
            process.join()
        time.sleep(TTL_S + 5)
        after = held(running)
        tell(time.monotonic() - began, after)
        counts = ends(running)
        print(f"clients killed {killed}, ends {counts}")
        moved = {name: (before[name], after[name]) for name in before
                 if name not in (*KEPT, "rss") and before[name] != after[name]}
        moved |= {name: (kept[name], after[name]) for name in KEPT
                  if kept and after[name] > kept[name]}
        admitted = counts.pop("admitted", 0)
        fine = kept and not moved and admitted == sum(counts.values())
        print("all is back" if fine else f"NOT back: {moved}, admitted {admitted}")
        return 0 if fine else 1


if __name__ == "__main__":
    harness.START_TIMEOUT_S = 300
    sys.exit(main())
