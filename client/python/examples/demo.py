"""The whole way once: a real document goes in over gRPC, sparse prefill runs, the KV cache comes
out, layer by layer, in another process, which decodes from it. `make demo` runs this.

Three methods take the same prompt; the table shows what each computed, how long its first token
took (from the request to the first token out of the decode process) and how many of its tokens
are dense attention's.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from prefilld import PrefillClient, PrefilldError, SparsityReport
from progress import Progress
from tokenizer import Tokenizer

MODEL = "smollm2"
METHODS = ("dense", "flexprefill", "joint")
DECODE_TOKENS = 64
WARM_UP_TOKENS = 256   # both processes have run once before anything is timed
KV_MEMORY = "1GiB"     # two caches of this prompt and more
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
HERE = pathlib.Path(__file__).resolve().parent


class DemoError(Exception):
    """What went wrong, in one line."""


class StartError(DemoError):
    """The server's own reason why it did not start."""


@dataclasses.dataclass
class Run:
    """One prompt through one method."""

    ttft_s: float
    seconds: float            # of the whole prefill, as the server's client sees it
    report: SparsityReport
    kv_bytes: int
    tokens: list[int]

    @property
    def captured(self) -> float:
        """Dense attention leaves nothing out, so it is not measured."""
        return 1.0 if self.report.mean_captured_mass is None else self.report.mean_captured_mass


@contextlib.contextmanager
def server(build: pathlib.Path, model_dir: pathlib.Path, log: pathlib.Path,
           flags: Sequence[str] = ("--backend=cpu", f"--kv_memory={KV_MEMORY}"),
           start_s: float = START_TIMEOUT_S) -> Iterator[str]:
    """A prefilld on a free port, for the block; yields HOST:PORT."""
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            [str(build / "prefilld"), "--listen=127.0.0.1:0", "--http=127.0.0.1:0",
             f"--model={MODEL}={model_dir}", *flags],
            stdout=subprocess.PIPE, stderr=stderr)
    try:
        yield announced_target(process, log, start_s)
    except StartError:
        raise
    except (DemoError, PrefilldError) as error:
        if process.poll() is not None:  # then what we saw was only its consequence
            raise DemoError(f"prefilld ended with status {process.returncode}; its log: {log}"
                            ) from error
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DemoError(f"prefilld did not stop within {STOP_TIMEOUT_S} s of SIGTERM; "
                            f"its log: {log}") from None
    if status != 0:
        raise DemoError(f"prefilld ended with status {status}; its log: {log}")


def announced_target(process: subprocess.Popen, log: pathlib.Path, start_s: float) -> str:
    """The address in the first line of stdout, which comes when the server is ready."""
    ready, _, _ = select.select([process.stdout], [], [], start_s)
    line = process.stdout.readline().decode() if ready else ""
    prefix = "listening on "
    if not line.startswith(prefix):
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"no word within {start_s:g} s"
        raise StartError(f"prefilld did not start: {reason}")
    return line[len(prefix):].strip()


class DecodeProcess:
    """The decode tier: decode.py in a process of its own, over JSON lines."""

    def __init__(self, model_dir: pathlib.Path, log: pathlib.Path):
        with open(log, "wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "decode.py"), str(model_dir)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                # One thread: a token is bound by memory, and OpenBLAS's threads spin, which
                # would take the cores from the server while it computes the next layers.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        self._log = log

    def __enter__(self) -> "DecodeProcess":
        try:
            self._expect("ready")
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()

    def order(self, **fields) -> None:
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()

    def events(self) -> Iterator[dict]:
        """Up to and with `done`."""
        while True:
            event = self._next()
            yield event
            if event["event"] == "done":
                return

    def _expect(self, name: str) -> None:
        event = self._next()
        if event["event"] != name:
            raise DemoError(f"the decode process said {event['event']} instead of {name}")

    def _next(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise DemoError(f"the decode process ended; its log: {self._log}")
        event = json.loads(line)
        if event["event"] == "error":
            raise DemoError(f"the decode process: {event['message']}")
        return event


class Stages:
    """What the bar of one run shows: the least advanced of compute and pull, then decode."""

    def __init__(self, bar: Progress):
        self._bar = bar
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {"compute": 0.0, "pull": 0.0, "decode": 0.0}

    def update(self, fraction: float, stage: str) -> None:
        with self._lock:
            if stage not in self._counts:
                return
            self._counts[stage] = fraction
            self._bar.update(sum(self._counts.values()) / len(self._counts), ", ".join(
                f"{name} {value:.0%}" for name, value in self._counts.items()))


def run(client: PrefillClient, decoder: DecodeProcess, target: str, ids: list[int], method: str,
        label: str) -> Run:
    """Prefill here, pull and decode there, at the same time."""
    with Progress(label) as bar:
        stages = Stages(bar)
        level = "density" if method == "dense" else "captured_mass"
        start = time.monotonic()
        prompt = client.prefill(MODEL, ids, method=method, report_level=level,
                                progress=stages.update)
        with prompt:
            layers = prompt.lease.layers
            decoder.order(target=target, model=MODEL, lease=dataclasses.asdict(prompt.lease),
                          last_token=ids[-1], count=DECODE_TOKENS)
            tokens: list[int] = []
            ttft = kv_bytes = 0
            for event in decoder.events():
                if event["event"] == "layer":
                    stages.update((event["index"] + 1) / layers, "pull")
                elif event["event"] == "token":
                    ttft = ttft or time.monotonic() - start
                    tokens.append(event["id"])
                    stages.update(len(tokens) / DECODE_TOKENS, "decode")
                elif event["event"] == "done":
                    kv_bytes = event["kv_bytes"]
            prompt.detach()  # the decode process released it
            spent = prompt.summary.seconds
    return Run(ttft_s=ttft, seconds=sum(spent.values()), report=prompt.report, kv_bytes=kv_bytes,
               tokens=tokens)


def agreeing(run_: Run, dense: Run) -> int:
    """Tokens equal to dense attention's, position by position."""
    return sum(a == b for a, b in zip(run_.tokens, dense.tokens, strict=True))


def print_table(runs: dict[str, Run], prompt_tokens: int) -> None:
    head = ("method", "tokens", "density", "captured", "prefill s", "first token s", "KV bytes",
            "as dense")
    rows = [head]
    for method, r in runs.items():
        rows.append((method, str(prompt_tokens), f"{r.report.mean_density:.3f}",
                     f"{r.captured:.3f}", f"{r.seconds:.2f}", f"{r.ttft_s:.2f}", str(r.kv_bytes),
                     f"{agreeing(r, runs['dense'])}/{DECODE_TOKENS}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))
    print("as dense: decoded tokens that are dense's at the same place; behind the first other one "
          "texts go apart")


def print_density(runs: dict[str, Run]) -> None:
    """Computed / causal blocks of each layer, mean over its heads."""
    sparse = {method: r.report.density.mean(axis=1) for method, r in runs.items()
              if method != "dense"}
    print("\ndensity by layer" + "".join(f"   {method:<29}" for method in sparse).rstrip())
    for layer in range(len(next(iter(sparse.values())))):
        line = f"{layer:>16}"
        for density in sparse.values():
            filled = round(24 * float(density[layer]))
            line += f"   {'█' * filled}{'·' * (24 - filled)} {density[layer]:.2f}"
        print(line)


def print_text(runs: dict[str, Run], tokenizer: Tokenizer, ids: list[int]) -> None:
    print(f"\nthe document ends: {tokenizer.decode(ids[-24:])!r}")
    same = collections.defaultdict(list)
    for method, r in runs.items():
        same[tuple(r.tokens)].append(method)
    for tokens, methods in same.items():
        print(f"{', '.join(methods)} continues: {tokenizer.decode(tokens)!r}")


def demo(build: pathlib.Path, document: pathlib.Path) -> None:
    model_dir = build / "models" / "SmolLM2-135M-Instruct"
    logs = build / "demo"
    logs.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(model_dir)
    ids = tokenizer.encode(document.read_text(encoding="utf-8"))
    print(f"{document}: {len(ids)} tokens")

    runs: dict[str, Run] = {}
    with (server(build, model_dir, logs / "prefilld.log") as target,
          DecodeProcess(model_dir, logs / "decode.log") as decoder,
          PrefillClient(target) as client):
        run(client, decoder, target, ids[:WARM_UP_TOKENS], "joint", "warm-up")
        for i, method in enumerate(METHODS, start=1):
            runs[method] = run(client, decoder, target, ids, method,
                               f"{method} ({i} of {len(METHODS)})")

    print_table(runs, len(ids))
    print_density(runs)
    print_text(runs, tokenizer, ids)
    dense, joint = runs["dense"], runs["joint"]
    print(f"\ndemo: OK tokens={len(ids)} density={joint.report.mean_density:.3f} "
          f"captured={joint.captured:.3f} ttft_dense_s={dense.ttft_s:.2f} "
          f"ttft_joint_s={joint.ttft_s:.2f} kv_bytes={joint.kv_bytes} "
          f"agree={agreeing(joint, dense)}/{DECODE_TOKENS}")


def main() -> int:
    parser = argparse.ArgumentParser(description="prefill, hand off, decode: see make demo")
    parser.add_argument("--build", type=pathlib.Path, required=True,
                        help="holds prefilld and models/SmolLM2-135M-Instruct")
    parser.add_argument("--document", type=pathlib.Path,
                        default=pathlib.Path("/usr/share/common-licenses/GPL-3"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so both processes end
    try:
        demo(args.build, args.document)
    except (DemoError, PrefilldError, OSError) as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: FAILED: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
