"""What handing a KV cache over costs where it stays on the GPU (cuda_ipc).

    python tests/bench/service/ipc_handoff.py --model=DIR [--tokens=32768] [--methods=dense,joint]
        [--rounds=7] [--block=16] [--ids=FILE]

In every round each way is gone once, in turn, so that what else the machine does meets all of them;
figures are medians of the rounds, after one that warms up. Four tables:

prefill   from the call until the summary, with the cache kept for grpc and not pulled, and until K
          and V of every layer can be used, over each transport; and what the server computed for
          (all its phases but the wait in the queue; K and V leave beside them)
layers    from a layer's event (LayerReady) reaching this process until a kernel here has read its
          last element; the first layer, for which the memory is mapped, apart
blocks    the whole cache into blocks as vLLM has them, in every form that the connector knows,
          beside a bare copy of as many bytes within the device
equal     the bytes of each layer over cuda_ipc and over grpc, of the same prompt

Exits with 1 when a byte differs. Needs torch and a GPU with room for the weights, the cache twice
beside the server's two, and what prefilld plans: of Llama-3.1-8B's shape at 32,768 tokens 16 GB of
weights, and 4.3 GB a cache.
"""

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "model"))

import needs  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = needs.model_parser(__doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=32768, help="of the prompt (%(default)s)")
    add("--methods", default="dense,joint", metavar="NAME,...", help="(%(default)s)")
    add("--rounds", type=int, default=7, help="after one that warms up (%(default)s)")
    add("--block", type=int, default=16, help="tokens of a block of vLLM's (%(default)s)")
    add("--ids", type=pathlib.Path, metavar="FILE", help="JSON array of token IDs; else random")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports: --help needs none of them
    ARGUMENTS = arguments()
    needs.modules(*needs.CLIENT, "torch")
    needs.server()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from served import MODEL, server, token_ids  # noqa: E402

from bench import progress  # noqa: E402  (after served, which knows the path)
from prefilld import Layer, Prefill, PrefillClient  # noqa: E402
from prefilld.vllm import kv_writer  # noqa: E402
from report import table  # noqa: E402

TRANSPORTS = ("grpc", "posix_shm", "cuda_ipc")


class Clients:
    """One a transport."""

    def __init__(self, target: str):
        self._clients = {name: PrefillClient(target, transport=name) for name in TRANSPORTS}

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_) -> None:
        for client in self._clients.values():
            client.close()

    def prefill(self, transport: str, ids: np.ndarray, **options) -> Prefill:
        device = "cuda" if transport == "cuda_ipc" else None
        return self._clients[transport].prefill(MODEL, ids, widen=False, device=device, **options)


def touch(layer: Layer) -> None:
    """Returns once a kernel has read the layer's last element."""
    layer.v[-1, -1, -1].item()


def prefill_rows(clients: Clients, ids: np.ndarray, method: str, rounds: int) -> list[list]:
    def gone(transport: str, pull: bool) -> tuple[float, dict[str, float]]:
        """(seconds, those of the server's phases)"""
        begin = time.perf_counter()
        with clients.prefill(transport, ids, method=method) as call:
            if pull:
                *_, last = call
                touch(last)
                del last, _
            spent = call.summary.seconds  # waits for the end
            return time.perf_counter() - begin, spent

    ways = {"kept, not pulled": ("grpc", False)} | {name: (name, True) for name in TRANSPORTS}
    walls, computed = ({name: [] for name in ways} for _ in range(2))
    for round_number in range(-1, rounds):
        progress(f"prefill, {method}, round {round_number + 1} of {rounds}")
        for name, way in ways.items():
            wall, spent = gone(*way)
            if round_number < 0:
                continue
            walls[name].append(wall)
            computed[name].append(sum(spent.values()) - spent["queue"])

    def middle(of: dict[str, list[float]], name: str) -> float:
        return statistics.median(of[name])

    kept = middle(computed, "kept, not pulled")
    return [[method, name, 1e3 * middle(walls, name), 1e3 * middle(computed, name),
             middle(computed, name) / kept] for name in ways]


def layer_rows(clients: Clients, ids: np.ndarray, method: str, rounds: int) -> list[list]:
    first, others = [], []
    for _ in range(rounds + 1):
        events: list[float] = []

        def on_progress(fraction: float, phase: str, events=events) -> None:
            if phase == "compute":
                events.append(time.perf_counter())

        used: list[float] = []
        with clients.prefill("cuda_ipc", ids, method=method, progress=on_progress) as call:
            for layer in call:
                touch(layer)
                used.append(time.perf_counter())
            del layer
        gaps = [max(0.0, at - event) for at, event in zip(used, events, strict=True)]
        first.append(gaps[0])
        others += gaps[1:] or gaps
    others = sorted(others[len(others) // (rounds + 1):])  # without the round that warms up
    return [[method, 1e3 * statistics.median(first[1:]), 1e3 * statistics.median(others),
             1e3 * others[int(.99 * (len(others) - 1))], 1e3 * others[-1]]]


def forms(blocks: int, block: int, heads: int, d: int) -> dict[str, tuple]:
    """By name: shape, and the order in which its axes lie in memory."""
    five, four = (0, 1, 2, 3, 4), (0, 1, 2, 3)
    return {
        "2,B,N,H,D as NHD": ((2, blocks, block, heads, d), five),
        "2,B,N,H,D as HND": ((2, blocks, block, heads, d), (0, 1, 3, 2, 4)),
        "B,2,N,H,D as NHD": ((blocks, 2, block, heads, d), five),
        "B,2,N,H,D as HND": ((blocks, 2, block, heads, d), (0, 1, 3, 2, 4)),
        "2,B,H,N,D": ((2, blocks, heads, block, d), five),
        "B,H,N,2D": ((blocks, heads, block, 2 * d), four),
        "B,H,N,2D as NHD": ((blocks, heads, block, 2 * d), (0, 2, 1, 3)),
        "B,N,H,2D": ((blocks, block, heads, 2 * d), four),
    }


def made(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    memory = torch.zeros([shape[axis] for axis in order], dtype=dtype, device="cuda")
    return memory.permute([order.index(axis) for axis in range(len(shape))])


def seconds(work: Callable[[], None]) -> float:
    """On the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def block_rows(layers: list[Layer], block: int, rounds: int) -> list[list]:
    heads, tokens, d = layers[0].k.shape
    dtype, count = layers[0].k.dtype, -(-tokens // block)
    nbytes = sum(layer.k.nbytes + layer.v.nbytes for layer in layers)
    ids = np.random.default_rng(1).permutation(count).tolist()
    slots = kv_writer.Slots(ids, block, 0, tokens)
    flat = [torch.empty_like(layer.k) for layer in layers for _ in range(2)]

    def bare() -> None:
        for i, layer in enumerate(layers):
            flat[2 * i].copy_(layer.k)
            flat[2 * i + 1].copy_(layer.v)

    rows, bare_times = [], []
    for name, (shape, order) in forms(count, block, heads, d).items():
        progress(f"blocks, {name}")
        caches = [made(shape, order, dtype) for _ in layers]
        writers = [kv_writer.strided_writer(cache, heads, d) for cache in caches]

        def write(writers=writers) -> None:
            for layer in layers:
                writers[layer.index](layer.k, layer.v, slots)

        times = []
        for round_number in range(-1, rounds):
            pair = seconds(bare), seconds(write)
            if round_number >= 0:
                bare_times.append(pair[0])
                times.append(pair[1])
        keys, _ = kv_writer.block_views(caches[-1], heads, d)
        place = tuple(part.cuda() for part in (slots.tokens // block, slots.tokens % block))
        if not torch.equal(keys[place].transpose(0, 1), layers[-1].k):
            sys.exit(f"ipc_handoff: blocks of form {name} are not what was written")
        del caches, writers, write, keys
        rows.append([name, nbytes * 1e-9 / statistics.median(times),
                     1e3 * statistics.median(times), statistics.median(times)])
    copy = statistics.median(bare_times)
    rows = [[name, speed, ms, copy / at] for name, speed, ms, at in rows]
    return [["bare copy", nbytes * 1e-9 / copy, 1e3 * copy, 1.0], *rows]


def bits(tensor: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The bytes, on the host."""
    if isinstance(tensor, np.ndarray):
        tensor = torch.from_numpy(tensor.view(np.uint8))
    return tensor.cpu().contiguous().view(torch.uint8)


def different(clients: Clients, layers: list[Layer], ids: np.ndarray, method: str) -> list[int]:
    with clients.prefill("grpc", ids, method=method) as call:
        return [sent.index for sent, here in zip(call, layers, strict=True)
                if not (torch.equal(bits(sent.k), bits(here.k))
                        and torch.equal(bits(sent.v), bits(here.v)))]


def main() -> int:
    args = ARGUMENTS
    if not torch.cuda.is_available():
        needs.refuse("torch sees no GPU")
    ids = token_ids(args.ids, args.tokens, args.model)
    prefills, waits, blocks, wrong = [], [], [], {}
    methods = args.methods.split(",")
    with server(args.model, "cuda", args.tokens, transports=TRANSPORTS) as running, \
            Clients(running.target) as clients:
        for method in methods:
            prefills += prefill_rows(clients, ids, method, args.rounds)
            progress(f"layers, {method}")
            waits += layer_rows(clients, ids, method, args.rounds)
        for method in methods:
            progress(f"equal, {method}")
            with clients.prefill("cuda_ipc", ids, method=method) as call:
                layers = list(call)
            wrong[method] = different(clients, layers, ids, method)
            if method == methods[0]:
                blocks = block_rows(layers, args.block, args.rounds)
            del layers
    print(f"{args.model.name}, {args.tokens} tokens, {torch.cuda.get_device_name()}\n")
    print(table(["method", "cache", "wall ms", "computed ms", "over kept"], prefills))
    print("\n" + table(["method", "first layer ms", "median ms", "99% ms", "most ms"], waits))
    print("\n" + table(["blocks of vLLM", "GB/s", "ms", "of a bare copy's speed"], blocks))
    for method, layers in wrong.items():
        print(f"\n{method}: " + (f"layers {layers} DIFFER from grpc's" if layers
                                 else "every byte is what grpc brings"))
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
