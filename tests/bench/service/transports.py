"""Pulling a finished KV cache with the Python client, by every transport, beside a memcpy of the
same bytes. A part of run.py's section `handoff`; alone:

    python tests/bench/service/transports.py [--rounds=9] [--tokens=4096] [--model-dir=DIR]

In every round each transfer is done once, in turn, so that what else the machine does meets all of
them. A pull starts at PrefillClient.pull, opens and maps everything anew, and ends when the last
byte is here. What it takes to give the memory back (of a mapping: to unmap it) comes after that; it
is measured too, in a row of its own for posix_shm.
"""

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # tests/bench

from bench import BUILD, MODEL, OUT, Bench, progress  # noqa: E402
from report import Check, table  # noqa: E402

from prefilld import Layer, Lease, PrefillClient  # noqa: E402

ROUNDS = 9
COPIED_OVER_MEMCPY = 1.5
COLUMNS = ["transfer", "GB/s", "ms", "times memcpy"]
MEMCPY = "memcpy, warm to warm"
COPIED = "Python client, posix_shm, copied"
UNMAP = "then unmapped"


class Transfers:
    """The ways in which the bytes of a cache come to lie in arrays of this process. Each returns
    what holds the memory that it took."""

    def __init__(self, lease: Lease, clients: dict[str, PrefillClient]):
        self._lease = lease
        self._clients = clients
        layers = list(self.pull("grpc"))
        self._here = np.stack([np.stack([layer.k, layer.v]) for layer in layers])
        self._there = np.ones_like(self._here)  # touched: warm
        self.nbytes = self._here.nbytes

    def all(self) -> dict[str, Callable[[], object]]:
        return {
            MEMCPY: lambda: self._copy(self._here, self._there),
            "memcpy, warm to fresh": lambda: self._copy(self._here, np.empty_like(self._here)),
            "Python client, grpc": lambda: list(self.pull("grpc")),
            "Python client, posix_shm, mapped": lambda: list(self.pull("posix_shm")),
            COPIED: self._copied,
        }

    def pull(self, transport: str):
        return self._clients[transport].pull(self._lease, MODEL, widen=False)

    def check(self) -> None:
        """The bytes are the same by both transports."""
        self._there[:] = 0
        self._copied()
        if self._there.tobytes() != self._here.tobytes():
            raise ValueError("posix_shm and grpc gave different bytes")

    def _copied(self) -> Layer:
        for layer in self.pull("posix_shm"):
            self._there[layer.index, 0] = layer.k
            self._there[layer.index, 1] = layer.v
        return layer

    @staticmethod
    def _copy(source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Tensor by tensor, as the copying pull."""
        for i in range(len(source)):
            target[i, 0] = source[i, 0]
            target[i, 1] = source[i, 1]
        return target


def measure(target: str, token_ids: list[int], rounds: int = ROUNDS
            ) -> tuple[list[list], Check, str]:
    """Rows for COLUMNS, the figure that must hold, a note. target: of a running prefilld."""
    with PrefillClient(target, transport="grpc") as grpc, \
            PrefillClient(target, transport="posix_shm") as shm:
        with shm.prefill(MODEL, token_ids) as prompt:
            prompt.summary  # waits for the end
            transfers = Transfers(prompt.lease, {"grpc": grpc, "posix_shm": shm})
            transfers.check()
            seconds = {name: [] for name in [*transfers.all(), UNMAP]}
            for _ in range(rounds):
                for name, transfer in transfers.all().items():
                    begin = time.perf_counter()
                    held = transfer()
                    end = time.perf_counter()
                    del held
                    seconds[name].append(end - begin)
                    if name == COPIED:
                        seconds[UNMAP].append(time.perf_counter() - end)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [[name, "" if name == UNMAP else transfers.nbytes * 1e-9 / median, median * 1e3,
             median / medians[MEMCPY]] for name, median in medians.items()]
    rounds_apart = sorted(a / b for a, b in zip(seconds[COPIED], seconds[MEMCPY]))
    return rows, Check("posix_shm, copied / memcpy", medians[COPIED] / medians[MEMCPY],
                       COPIED_OVER_MEMCPY, at_least=False), (
        f"Python client: {transfers.nbytes * 1e-6:.0f} MB, medians of {rounds}; posix_shm copied / "
        f"memcpy was {rounds_apart[0]:.2f} to {rounds_apart[-1]:.2f} in single rounds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model-dir", type=pathlib.Path,
                        default=BUILD / "models/SmolLM2-135M-Instruct")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model_dir.resolve(), [100 + i % 1000 for i in range(args.tokens)])
    progress("transports: a prefill, then pulls of its cache")
    with bench.server() as server:
        rows, check, note = measure(server.target, bench.token_ids, args.rounds)
    print(table(COLUMNS, rows), f"\n{check}\n{note}")
    return 0 if check.ok else 1


if __name__ == "__main__":
    sys.exit(main())
