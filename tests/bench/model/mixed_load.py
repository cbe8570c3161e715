"""Minutes of prompts of all sizes, some cancelled, some of clients that are killed: what a server
holds before, while and after.

    python tests/bench/model/mixed_load.py --model=DIR [--backend=cuda] [--seconds=180]
        [--clients=6] [--longest=8192] [--transports=grpc,posix_shm,cuda_ipc]

Clients are processes. Each prefills prompts of 16 to --longest tokens (most are short), dense,
joint or flexprefill, over one of --transports, and pulls the cache; it cancels one prompt in ten.
Over cuda_ipc it holds the last one's tensors on the GPU while the next is computed, and some until
it ends. One prompt in ten ends with its client, by kill -9, before the cache is pulled or with all
of it in its hands, and another client comes. Every ten seconds a line says what the server holds.

Every cache that is pulled is checked. What each prompt gives was learned over grpc before: of more
than 4,096 tokens the CRC32C of every layer must be the same, whichever way it comes; shorter ones
are rounded as the prompts that they share a batch with have it, so one value in 997 of each layer
is compared, by the norm of the difference. Another prompt's cache differs by more than all of it.

In the end, a second after the leases of the killed must have run out, exits with 1 unless blocks,
segments of each transport and leases are as before the first client, device memory, threads and
descriptors no more than in the second third of the time (cuDNN keeps workspaces once they were
needed, gRPC what wakes its threads), every admitted prompt finished, was cancelled or failed, and
no layer was another. Threads of gRPC's own, by their names, are shown and not judged: two kinds
grow with the load to twice the processors each.

GPU memory: the weights, with cuda_ipc two caches of --longest tokens a client, and what prefilld
plans beside (its log's memory_plan lines). The host keeps as much: of Llama-3.1-8B's shape, as set,
13 GB. cuda_ipc needs torch, which takes half a GB of the GPU in each client.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
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
KILLED_SHARE = 0.10
KEPT = ("device", "threads", "descriptors")  # by libraries, once needed
LENGTHS = (16, 40, 100, 250, 600, 1500, 4000, 4097, 6000, 8192, 16384, 32768)
METHODS = ("dense", "joint", "flexprefill")
GRPC_THREADS = ("default-execut", "resolver-execut", "grpc", "event_engine", "timer_manager",
                "nexting_thread")
ALONE_TOKENS = 4097  # and more share no batch: their bits are always the same
SAMPLED = 997        # one value in so many
ROUNDING = 0.1       # of the norm; near ties of blocks that fall the other way are in it


@dataclasses.dataclass(frozen=True)
class Load:
    """What every client is told."""

    target: str
    vocabulary: int
    transports: list[str]
    wrong: "multiprocessing.sharedctypes.Synchronized"   # layers that were not as they must be
    checked: "multiprocessing.sharedctypes.Synchronized"  # under the lock of `wrong`
    dtype: str                                           # of the cache
    expected: dict[tuple[int, str], list[int | np.ndarray]]  # of (tokens, method), by layer


def ids_of(tokens: int, vocabulary: int) -> list[int]:
    return np.random.default_rng(tokens).integers(0, vocabulary, tokens).tolist()


def wide(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.dtype(dtype)).astype(np.float32)


def digest(layer, tokens: int, dtype: str) -> int | np.ndarray:
    """What is compared of a layer, on a GPU or not."""
    crc, samples = 0, []
    for part in (layer.k, layer.v):
        if not isinstance(part, np.ndarray):
            import torch
            part = part.contiguous().view(torch.uint8).cpu().numpy()
        raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        if tokens < ALONE_TOKENS:
            samples.append(wide(raw, dtype)[::SAMPLED])
        else:
            crc = google_crc32c.extend(crc, raw.tobytes())
    return np.concatenate(samples) if samples else crc


def is_wrong(got: int | np.ndarray, expected: int | np.ndarray) -> bool:
    if isinstance(expected, int):
        return got != expected
    return not np.linalg.norm(got - expected) <= ROUNDING * np.linalg.norm(expected)


def learn(target: str, vocabulary: int, longest: int, dtype: str):
    """From the second time on: by then cuDNN has its plan for the shape."""
    expected = {}
    with PrefillClient(target, transport="grpc") as prefilld:
        for tokens in (length for length in LENGTHS if length <= longest):
            for method in METHODS * 2:
                with prefilld.prefill(MODEL, ids_of(tokens, vocabulary), method=method,
                                      widen=False) as call:
                    expected[tokens, method] = [digest(layer, tokens, dtype) for layer in call]
    return expected


def die(draw: random.Random, longest_s: float = 0.05) -> None:
    time.sleep(draw.random() * longest_s)
    os.kill(os.getpid(), signal.SIGKILL)


def client(load: Load, seed: int) -> None:
    draw = random.Random(seed)
    kept: list = []  # of the prompt before
    while True:
        prompts = [*load.expected]
        tokens, method = prompts[int(len(prompts) * draw.random() ** 1.5)]
        transport = draw.choice(load.transports)
        fate = draw.random()
        try:
            with PrefillClient(load.target, transport=transport) as prefilld, \
                    prefilld.prefill(MODEL, ids_of(tokens, load.vocabulary), method=method,
                                     lease_ttl=TTL_S, widen=False,
                                     device="cuda" if transport == "cuda_ipc" else None) as call:
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
                differ = sum(is_wrong(digest(layer, tokens, load.dtype), expected)
                             for layer, expected in
                             zip(layers, load.expected[tokens, method], strict=True))
                with load.wrong.get_lock():
                    load.wrong.value += differ
                    load.checked.value += len(layers)
                kept = layers if transport == "cuda_ipc" else kept
                del layers
        except PrefilldError as error:
            if error.code not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED):
                print(f"client: {transport}: {error}", flush=True)


def thread_names(pid: int) -> list[str]:
    names = []
    for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            names.append((thread / "comm").read_text().strip())
    return names


def held(running) -> dict[str, float]:
    wanted = {"blocks": ("prefilld_kv_blocks", {"state": "free"}),
              **{f"{name} lent": ("prefilld_kv_segment_bytes", {"transport": name, "state": "lent"})
                 for name in ("posix_shm", "cuda_ipc")},
              "leases": ("prefilld_leases_active", {}),
              "running": ("prefilld_requests_running", {}),
              "waiting": ("prefilld_requests_waiting", {}),
              "device": ("prefilld_gpu_memory_bytes", {"kind": "device"})}
    samples = {name: running.metric(metric, **labels) for name, (metric, labels) in wanted.items()}
    names = thread_names(running.process.pid)
    grpcs = sum(name.startswith(GRPC_THREADS) for name in names)
    return samples | {"threads": len(names) - grpcs, "of gRPC": grpcs,
                      "descriptors": running.descriptors(),
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
    """The most that the server held in the second third of the time, and the clients killed."""
    spawn = multiprocessing.get_context("spawn")
    kept = None
    began, told, killed, seed = time.monotonic(), 0.0, 0, 0
    clients: list = [None] * args.clients
    while time.monotonic() - began < args.seconds:
        for i, process in enumerate(clients):
            if process is not None and process.is_alive():
                continue
            if process is not None and process.exitcode != -signal.SIGKILL:
                sys.exit(f"mixed_load: a client ended with {process.exitcode}")
            killed += process is not None
            seed += 1
            clients[i] = spawn.Process(target=client, args=(load, seed))
            clients[i].start()
        if time.monotonic() - began - told > 10:
            told = time.monotonic() - began
            samples = held(running)
            tell(told, samples)
            if args.seconds / 3 < told < args.seconds * 2 / 3:
                kept = {name: max(samples[name], (kept or samples)[name]) for name in samples}
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
        config = json.loads((args.model / "config.json").read_text())
        vocabulary = config["vocab_size"]
        dtype = config.get("dtype") or config["torch_dtype"]
        warm_up(running.target, args.longest)
        counters = [multiprocessing.get_context("spawn").Value("q", 0) for _ in range(2)]
        load = Load(running.target, vocabulary, transports, *counters, dtype,
                    learn(running.target, vocabulary, args.longest, dtype))
        before = held(running)
        tell(0, before)
        kept, killed = put_load(args, load, running)
        time.sleep(TTL_S + 1)
        after = held(running)
        tell(args.seconds + TTL_S + 1, after)
        counts = ends(running)
        print(f"clients killed {killed}, ends {counts}, wrong layers {load.wrong.value} of "
              f"{load.checked.value} checked")
        moved = {name: (before[name], after[name]) for name in before
                 if name not in (*KEPT, "of gRPC", "rss") and before[name] != after[name]}
        moved |= {name: (kept[name], after[name]) for name in KEPT
                  if kept and after[name] > kept[name]}
        admitted = counts.pop("admitted", 0)
        fine = (kept and not moved and admitted == sum(counts.values())
                and load.checked.value > 0 and load.wrong.value == 0)
        print("all is back" if fine else f"NOT back: {moved}, admitted {admitted}, wrong layers "
              f"{load.wrong.value}")
        return 0 if fine else 1


if __name__ == "__main__":
    harness.START_TIMEOUT_S = 300
    sys.exit(main())
