"""Minutes of prompts of all sizes, some cancelled, some of clients that are killed: what a server
holds before, while and after.

    python tests/bench/model/mixed_load.py --model=DIR [--backend=cuda] [--seconds=180]
        [--clients=6] [--longest=8192] [--transports=grpc,posix_shm,cuda_ipc]

Clients are processes. Each prefills prompts of 16 to --longest tokens (most are short), dense,
joint or flexprefill, over one of --transports, and pulls the cache; it cancels one prompt in ten.
Over cuda_ipc it holds the last one's tensors on the GPU while the next is computed, and some until
it ends. One prompt in ten is one of a few, of more than 4,096 tokens, whose bytes were learned over
grpc before: the CRC32C of each of their layers must be the same, whichever way they come. One
prompt in twenty ends with its client, by kill -9, before the cache is pulled or with all of it in
its hands, and another client comes. Every ten seconds a line says what the server holds.

In the end, a second after the leases of the killed must have run out, exits with 1 unless blocks,
segments of each transport and leases are as before the first client, device memory, threads and
descriptors no more than after the first third of the time (gRPC keeps threads, and what wakes them,
by its connections, cuDNN its workspaces, once they were needed), every admitted prompt finished,
was cancelled or failed, and no layer was another.

GPU memory: the weights, with cuda_ipc two caches of --longest tokens a client, and what prefilld
plans beside (its log's memory_plan lines). The host keeps as much: of Llama-3.1-8B's shape, as set,
13 GB. cuda_ipc needs torch, which takes half a GB of the GPU in each client.
"""

import argparse
import dataclasses
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
    add("--transports", default="grpc,posix_shm", metavar="NAME,...",
        help="grpc, posix_shm, cuda_ipc (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules(*needs.CLIENT, *(["torch"] if "cuda_ipc" in ARGUMENTS.transports else []))
    needs.server()

import google_crc32c
import grpc
import numpy as np
from served import MODEL, server

from e2e import harness  # after served, which knows the path
from prefilld import PrefillClient, PrefilldError

TTL_S = 15
CANCELLED_SHARE = 0.10
KILLED_SHARE = 0.05
KNOWN_SHARE = 0.10
KEPT = ("device", "threads", "descriptors")  # by libraries, once needed
# (tokens, method) of prompts that are too long to share a batch, where rounding may differ.
KNOWN = [(tokens, method) for tokens in (4097, 6000) for method in ("dense", "joint")]


@dataclasses.dataclass(frozen=True)
class Load:
    """What every client is told."""

    target: str
    vocabulary: int
    longest: int
    transports: list[str]
    wrong: "multiprocessing.sharedctypes.Synchronized"   # layers that were not as they must be
    crcs: dict[int, list[int]]                           # of each layer; by place in KNOWN


def known_ids(place: int, vocabulary: int) -> list[int]:
    return np.random.default_rng(place).integers(0, vocabulary, KNOWN[place][0]).tolist()


def crc(layer) -> int:
    """Of the bytes of K, then V, on a GPU or not."""
    value = 0
    for part in (layer.k, layer.v):
        if not isinstance(part, np.ndarray):
            import torch
            part = part.contiguous().view(torch.uint8).cpu().numpy()
        value = google_crc32c.extend(value, np.ascontiguousarray(part).tobytes())
    return value


def learn(target: str, vocabulary: int, longest: int) -> dict[int, list[int]]:
    crcs = {}
    with PrefillClient(target, transport="grpc") as prefilld:
        for place, (tokens, method) in enumerate(KNOWN):
            if tokens > longest:
                continue
            with prefilld.prefill(MODEL, known_ids(place, vocabulary), method=method,
                                  widen=False) as call:
                crcs[place] = [crc(layer) for layer in call]
    return crcs


def die(draw: random.Random, longest_s: float = 0.05) -> None:
    time.sleep(draw.random() * longest_s)
    os.kill(os.getpid(), signal.SIGKILL)


def client(load: Load, seed: int) -> None:
    draw = random.Random(seed)
    kept: list = []  # of the prompt before
    while True:
        known = draw.choice([*load.crcs]) if load.crcs and draw.random() < KNOWN_SHARE else None
        if known is None:
            tokens = min(load.longest, int(16 * (load.longest / 16) ** draw.random() ** 2))
            ids = [draw.randrange(load.vocabulary) for _ in range(tokens)]
            method = draw.choice(["dense", "joint", "flexprefill", None])
        else:
            ids, method = known_ids(known, load.vocabulary), KNOWN[known][1]
        transport = draw.choice(load.transports)
        fate = draw.random()
        try:
            with PrefillClient(load.target, transport=transport) as prefilld, \
                    prefilld.prefill(MODEL, ids, lease_ttl=TTL_S, widen=False,
                                     device="cuda" if transport == "cuda_ipc" else None,
                                     **({"method": method} if method else {})) as call:
                call.lease
                if fate < KILLED_SHARE / 2:
                    die(draw)
                if KILLED_SHARE < fate < KILLED_SHARE + CANCELLED_SHARE:
                    time.sleep(draw.random() * 0.05)
                    call.cancel()
                    continue
                layers = list(call)
                if fate < KILLED_SHARE:  # with all of it mapped
                    die(draw)
                if known is not None:
                    differ = sum(crc(layer) != expected for layer, expected in
                                 zip(layers, load.crcs[known], strict=True))
                    with load.wrong.get_lock():
                        load.wrong.value += differ
                kept = layers if transport == "cuda_ipc" else kept
                del layers
        except PrefilldError as error:
            if error.code not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED):
                print(f"client: {transport}: {error}", flush=True)


def held(running) -> dict[str, float]:
    wanted = {"blocks": ("prefilld_kv_blocks", {"state": "free"}),
              **{f"{name} lent": ("prefilld_kv_segment_bytes", {"transport": name, "state": "lent"})
                 for name in ("posix_shm", "cuda_ipc")},
              "leases": ("prefilld_leases_active", {}),
              "running": ("prefilld_requests_running", {}),
              "waiting": ("prefilld_requests_waiting", {}),
              "device": ("prefilld_gpu_memory_bytes", {"kind": "device"})}
    samples = {name: running.metric(metric, **labels) for name, (metric, labels) in wanted.items()}
    return samples | {"threads": running.threads(), "descriptors": running.descriptors(),
                      "rss": running.memory_kib("VmRSS") << 10}


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


def warm_up(target: str, longest: int) -> None:
    """What the first prompts take."""
    with PrefillClient(target) as prefilld:
        for method in ("dense", "joint", "flexprefill"):
            with prefilld.prefill(MODEL, [1] * longest, method=method) as call:
                call.summary
    time.sleep(2)


def put_load(args, load: Load, running) -> tuple[dict[str, float] | None, int]:
    """What the server held after a third of the time, and how many clients were killed."""
    spawn = multiprocessing.get_context("spawn")
    kept = None
    began, told, killed, seed = time.monotonic(), 0.0, 0, 0
    clients: list = [None] * args.clients
    while time.monotonic() - began < args.seconds:
        for i, process in enumerate(clients):
            if process is not None and process.is_alive():
                continue
            killed += process is not None
            seed += 1
            clients[i] = spawn.Process(target=client, args=(load, seed))
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
    return kept, killed


def main() -> int:
    args = ARGUMENTS
    transports = args.transports.split(",")
    with server(args.model, args.backend, args.longest * args.clients,
                transports=transports) as running:
        vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
        warm_up(running.target, args.longest)
        load = Load(running.target, vocabulary, args.longest, transports,
                    multiprocessing.get_context("spawn").Value("q", 0),
                    learn(running.target, vocabulary, args.longest))
        before = held(running)
        tell(0, before)
        kept, killed = put_load(args, load, running)
        time.sleep(TTL_S + 1)
        after = held(running)
        tell(args.seconds + TTL_S + 1, after)
        counts = ends(running)
        print(f"clients killed {killed}, ends {counts}, wrong layers {load.wrong.value}")
        moved = {name: (before[name], after[name]) for name in before
                 if name not in (*KEPT, "rss") and before[name] != after[name]}
        moved |= {name: (kept[name], after[name]) for name in KEPT
                  if kept and after[name] > kept[name]}
        admitted = counts.pop("admitted", 0)
        fine = (kept and not moved and admitted == sum(counts.values())
                and load.wrong.value == 0)
        print("all is back" if fine else f"NOT back: {moved}, admitted {admitted}, wrong layers "
              f"{load.wrong.value}")
        return 0 if fine else 1


if __name__ == "__main__":
    harness.START_TIMEOUT_S = 300
    sys.exit(main())
