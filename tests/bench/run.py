"""`make bench`: what prefilld delivers on this machine, section by section, with a verdict on every
figure that must hold. Writes build/bench/report.{json,md}; exits 1 when a figure is missed.

    make bench [ONLY="speed memory"]

Needs what `make bench` makes: the build, the environment of requirements.txt, and the model.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback

from bench import BUILD, MODEL, OUT, ROOT, THREADS, Bench, BenchError, progress
from report import Check, Section
from service import memory, speed, transports

sys.path.insert(0, str(ROOT / "client/python/examples"))

from tokenizer import Tokenizer  # noqa: E402  (one of the examples)

# A text that every Debian and Ubuntu has, and how much of it is used: flexprefill's mask, and with
# it what joint is compared with, depends on the length modulo 128.
TEXT = pathlib.Path("/usr/share/common-licenses/GPL-3")
TEXT_TOKENS = 7600
HANDOFF_TOKENS = 4096


def parity(bench: Bench) -> Section:
    """K, V and logits against transformers; parity.py knows the bounds."""
    progress("parity: dense prefill here, then in transformers")
    report = OUT / "parity.json"
    report.unlink(missing_ok=True)  # 1 is also how a script that broke ends
    bench.run([sys.executable, ROOT / "tests/bench/model/parity.py", f"--model={bench.model_dir}",
               f"--ids={bench.tokens_file()}", "--backend=cpu", f"--threads={THREADS}",
               f"--json={report}"], accept=(0, 1))
    records = json.loads(report.read_text())["tensors"]
    worst = {}  # of K, V and logits
    for record in records:
        kind = record["kind"]
        if kind not in worst or record["error"] > worst[kind][1]:
            worst[kind] = (record["tensor"], record["error"], record["bound"])
    return Section(
        f"Parity with transformers, dense, {len(bench.token_ids)} tokens",
        ["tensors", "worst", "relative error", "bound"],
        [[kind, *values] for kind, values in worst.items()],
        [Check("tensors compared", len(records), 1),
         *(Check(f"relative error of {kind}", error, bound, at_least=False)
           for kind, (_, error, bound) in worst.items())])


def quality(bench: Bench) -> Section:
    data = bench.program("quality", f"--model={bench.model_dir}",
                         f"--tokens={bench.tokens_file()}", f"--threads={THREADS}", "--json")
    return Section(
        f"Quality on {len(bench.token_ids)} tokens of a real text",
        ["method", "gamma", "density", "mass", "worst head", "KL mean", "KL median",
         "KL second half", "seconds"],
        [[run[key] for key in ("method", "gamma", "density", "captured_mass", "worst_head",
                               "kl_mean", "kl_median", "kl_second_half", "seconds")]
         for run in data["runs"]],
        [Check(c["what"], c["value"], c["limit"], c["at_least"]) for c in data["checks"]],
        ["kl: KL(dense, sparse) of the next-token distributions in nats, over positions",
         "seconds are the engine's, the measurement of the mass included"])


def handoff(bench: Bench) -> Section:
    progress("handoff: PullKv and a bare stream in turn, then the Python client by every transport")
    with bench.server() as server:
        data = bench.program("handoff", f"--target={server.target}", f"--model={MODEL}",
                             f"--tokens={bench.tokens_file(HANDOFF_TOKENS)}", "--json")
        python, copied, note = transports.measure(server.target, bench.token_ids[:HANDOFF_TOKENS])
    tcp = iperf3_gb_per_s()
    rates = {"PullKv": data["pull_kv_gb_per_s"], "bare gRPC stream": data["bare_gb_per_s"]}
    notes = [f"{data['megabytes']:.0f} MB in {data['messages']} messages, loopback"]
    if tcp is None:
        notes.append("iperf3 is not installed")
    else:
        rates["iperf3, one TCP stream"] = tcp
        notes.append(f"PullKv / iperf3 {data['pull_kv_gb_per_s'] / tcp:.3f}")
    rows = [[name, rate, data["megabytes"] / rate, ""] for name, rate in rates.items()] + python
    return Section("KV hand-off", transports.COLUMNS, rows,
                   [Check("PullKv / bare stream", data["ratio"], data["limit"]), copied],
                   [*notes, note])


def iperf3_gb_per_s() -> float | None:
    """One TCP stream over loopback; None without iperf3."""
    if shutil.which("iperf3") is None:
        return None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    listener = subprocess.Popen(["iperf3", "--server", "--one-off", "--bind=127.0.0.1",
                                 f"--port={port}", "--forceflush"], stdout=subprocess.PIPE,
                                text=True)
    try:
        while "listening" not in listener.stdout.readline():
            if listener.poll() is not None:
                raise BenchError("iperf3 --server ended early")
        done = subprocess.run(["iperf3", "--client=127.0.0.1", f"--port={port}", "--time=3",
                               "--json"], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 8e9
    finally:
        listener.kill()
        listener.wait()


def attention(bench: Bench) -> Section:
    progress("attention: the kernels alone")
    data = bench.program("attention_benchmark", "--benchmark_format=json",
                         "--benchmark_min_time=0.3")
    runs = data["benchmarks"]
    peak = max(run["GFLOP/s"] for run in runs if run["name"].startswith("Fma/"))
    return Section("Attention kernels", ["benchmark", "ms", "GFLOP/s", "share of peak"],
                   [[run["name"].split("/process_time")[0], run["real_time"], run["GFLOP/s"],
                     run["GFLOP/s"] / peak] for run in runs],
                   notes=[f"peak: multiply-adds in registers, {THREADS} threads; "
                          f"{runs[0].get('label', '')}"])


SECTIONS = {"parity": parity, "quality": quality, "speed": speed.section, "handoff": handoff,
            "memory": memory.section, "attention": attention}


def machine() -> dict[str, str]:
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"^model name\s*: (.*)$", cpuinfo, re.M)
    isa = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
           if re.search(rf"\b{name}\b", cpuinfo)]
    cache = (BUILD / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.M)[1]
    version = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, text=True)
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "instruction sets": " ".join(isa) or platform.machine(),
        "processors used": f"{THREADS} of {os.cpu_count()}",
        "compiler": version.stdout.splitlines()[0],
        "commit": commit.stdout.strip() or "none",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=os.environ.get("ONLY", "").split(),
                        help=f"of {', '.join(SECTIONS)}; all when none is named")
    parser.add_argument("--model-dir", type=pathlib.Path,
                        default=BUILD / "models/SmolLM2-135M-Instruct")
    args = parser.parse_args()
    names = args.sections or list(SECTIONS)
    if unknown := set(names) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")

    # Whatever the machine has: inherited by every program that is started here.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    ids = Tokenizer(args.model_dir).encode(TEXT.read_text(encoding="utf-8"))
    bench = Bench(args.model_dir.resolve(), ids[:TEXT_TOKENS])
    OUT.mkdir(parents=True, exist_ok=True)

    facts = machine()
    parts = ["# prefilld bench\n\n" + "\n".join(f"* {key}: {value}"
                                                for key, value in facts.items()) + "\n"]
    print(parts[0], flush=True)
    done, failed = {}, []
    for name in names:
        begin = time.monotonic()
        try:
            result = SECTIONS[name](bench)
        except Exception as error:  # the other sections still have something to say
            traceback.print_exc()
            result = Section(name, notes=[f"**FAILED**: {error}"])
            failed.append(name)
        result.notes.append(f"{time.monotonic() - begin:.0f} s")
        done[name] = result
        parts.append(result.markdown())
        print(parts[-1], flush=True)

    (OUT / "report.md").write_text("\n".join(parts), encoding="utf-8")
    (OUT / "report.json").write_text(json.dumps(
        {"machine": facts, "sections": {name: section.data() for name, section in done.items()}},
        indent=1), encoding="utf-8")
    missed = [check.what for section in done.values() for check in section.checks if not check.ok]
    print(f"bench: {'OK' if not missed and not failed else 'MISSED'} sections={len(done)} "
          f"missed={len(missed)} failed={len(failed)} report={OUT / 'report.md'}")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
