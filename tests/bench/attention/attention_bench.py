"""attention_bench and its peers in turn on the same GPU, length by length: one table.

    python attention_bench.py [--binary=build/tests/attention_bench] [--lengths=16384,32768]
        [--json=FILE] [-- flags of attention_bench]

Needs torch with CUDA. Rows called "published" were not measured here: they are the figures of other
projects on an H200, and the ratio is theirs over ours at the nearest density.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from attention_peers import line, peers

# Total ms, selection ms and density by tokens: the released code of each with its best launch
# settings on one H200, 32/8/128 bf16, batch 1, CUDA 13.0, torch 2.11, on a structured workload.
SOURCE = "released code on one H200, 32/8/128 bf16"
FLEXPREFILL = {
    16384: (11.8, 8.0, 0.37),
    32768: (18.4, 8.1, 0.33),
    65536: (39.6, 9.9, 0.25),
    131072: (85.4, 15.8, 0.15),
}
FLASHPREFILL_V1 = {
    16384: (1.93, 0.55, 0.14),
    32768: (3.36, 0.87, 0.07),
    65536: (7.45, 2.1, 0.04),
    131072: (18.2, 6.3, 0.02),
}
FLASHPREFILL_V2 = {
    16384: (2.74, 0.24, 0.47),
    32768: (6.87, 0.45, 0.31),
    65536: (17.4, 1.3, 0.20),
    131072: (39.1, 4.3, 0.10),
}
PUBLISHED = [  # the method of ours that it is compared with
    ("flexprefill", "FlexPrefill .95", FLEXPREFILL),
    ("joint", "FlexPrefill .95", FLEXPREFILL),
    ("joint", "FlashPrefill V1 .18", FLASHPREFILL_V1),
    ("joint", "FlashPrefill V2 .02", FLASHPREFILL_V2),
]


def environment():
    """Where torch brings cuDNN, attention_bench finds it there."""
    env = dict(os.environ)
    spec = importlib.util.find_spec("nvidia.cudnn")
    if spec and spec.submodule_search_locations:
        library = os.path.join(list(spec.submodule_search_locations)[0], "lib")
        env["LD_LIBRARY_PATH"] = library + ":" + env.get("LD_LIBRARY_PATH", "")
    return env


def run_binary(args, length, dense_ms):
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [args.binary, f"--lengths={length}", f"--json={file.name}", *args.flags]
        if dense_ms:
            command.append(f"--dense-ms={dense_ms}")
        done = subprocess.run(command, env=environment(), check=False)
        if done.returncode != 0:
            sys.exit(f"attention_bench ended with {done.returncode}")
        return json.load(open(file.name))


def compare_with_published(records):
    print(f"\npublished, not measured here ({SOURCE}): theirs over ours at the nearest density")
    for method, name, figures in PUBLISHED:
        for tokens, (total, selection, density) in figures.items():
            ours = [
                r
                for r in records
                if r["method"] == method
                and r["kernels"] == "sm90"
                and r["tokens"] == tokens
                and r["sequences"] == 1
                and r["workload"].startswith("structured")
            ]
            if not ours:
                continue
            r = min(ours, key=lambda r: abs(r["density"] - density))
            print(
                f"published {name:20} {tokens:7}: {total:6.2f} ms (selection {selection:.2f}, "
                f"density {density:.2f}) | {method} {r['pipeline_ms']:.3f} ms "
                f"(selection {r['select_us'] / 1e3:.3f}, density {r['density']:.3f}): "
                f"{total / r['pipeline_ms']:.2f}x"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = pathlib.Path(__file__).resolve().parents[3]
    parser.add_argument("--binary", default=str(root / "build/tests/attention_bench"))
    parser.add_argument("--lengths", default="16384,32768,65536,131072")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", help="also write all records to this file")
    parser.add_argument("flags", nargs="*", help="flags of attention_bench, after --")
    args = parser.parse_args()
    args.flags.append(f"--repetitions={args.repetitions}")

    records, machine = [], None
    for length in map(int, args.lengths.split(",")):
        dense = peers(length, repetitions=args.repetitions)
        cudnn = [r["ms"] for r in dense if r["kernels"] == "torch cudnn"]
        result = run_binary(args, length, cudnn[0] if cudnn else None)
        for record in dense:
            print(line(record), flush=True)
        machine = result["machine"]
        records += dense + result["records"]
    compare_with_published(records)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "records": records}, file, indent=1)


if __name__ == "__main__":
    main()
