"""Runs the fuzzers, as many at a time as there are processors; ends with what they found.

    build/venv/bin/python tests/fuzz/run.py [--seconds=60] [--runs=N] [--seed=1] [FUZZER...]

The same seed tries the same inputs; 0 tries others every time, and keeps what a fuzzer has learned
in BUILD/corpus/FUZZER, where its next run begins. A finding is
an input under BUILD/findings: BUILD/fuzzers/FUZZER_fuzzer FILE shows it again. `connector` is of
Python, and prints its input.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
PYTHON = "connector"
# Longer inputs are slower, and have shown nothing more.
MAX_BYTES = {"model_config": 2048, "server_config": 1024}


def command(name: str, args: argparse.Namespace) -> list[str]:
    if name == PYTHON:
        seed = args.seed or int.from_bytes(os.urandom(4), "big")
        return [sys.executable, str(HERE / "connector_fuzzer.py"), f"--seconds={args.seconds}",
                f"--runs={args.runs}", f"--seed={seed}"]
    learned = args.build / ("corpus" if args.seed == 0 else "corpus_of_seed") / name
    if args.seed != 0:
        shutil.rmtree(learned, ignore_errors=True)
    learned.mkdir(parents=True, exist_ok=True)
    flags = ["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1",
             f"-max_len={MAX_BYTES.get(name, 4096)}", f"-max_total_time={args.seconds}",
             f"-seed={args.seed}", f"-artifact_prefix={args.build}/findings/{name}-"]
    if args.runs:
        flags.append(f"-runs={args.runs}")
    if (HERE / f"{name}.dict").exists():
        flags.append(f"-dict={HERE}/{name}.dict")
    return [str(args.build / "fuzzers" / f"{name}_fuzzer"), *flags, str(learned),
            str(HERE / "corpus" / name)]


def fuzz(name: str, args: argparse.Namespace) -> bool:
    done = subprocess.run(command(name, args), text=True, errors="replace", stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    (args.build / "findings" / f"{name}.log").write_text(done.stdout)
    summary = re.search(r"Done \d+ runs in \d+ second", done.stdout)
    if done.returncode == 0 and summary:
        print(f"{name}: {summary[0].removeprefix('Done ')}s", flush=True)
        return True
    print(f"{name}: FOUND something, exit status {done.returncode}\n{done.stdout[-4000:]}",
          flush=True)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/fuzz"))
    parser.add_argument("--seconds", type=int, default=60, help="for each fuzzer; 0: no limit")
    parser.add_argument("--runs", type=int, default=0, help="of each fuzzer at most; 0: no limit")
    parser.add_argument("--seed", type=int, default=1, help="0: another one every time")
    parser.add_argument("fuzzers", nargs="*", metavar="FUZZER")
    args = parser.parse_args()
    (args.build / "findings").mkdir(parents=True, exist_ok=True)
    names = args.fuzzers or [PYTHON, *sorted(path.name for path in (HERE / "corpus").iterdir())]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(lambda name: fuzz(name, args), names))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
