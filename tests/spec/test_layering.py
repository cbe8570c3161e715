"""ARCHITECTURE.md, section 2: who may include whom, read off the includes of the C++ sources."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

# Folder -> the folders of ours it may include. `process` is what main() builds, once, of the rest.
BELOW_ENGINE = {"server/core", "server/record", "server/model", "server/transport", "server/kv",
                "kernels"}
BELOW_RPC = BELOW_ENGINE | {"server/engine", "server/scheduler"}
MAY_INCLUDE = {
    "kernels": set(), "server/core": {"kernels"}, "server/record": {"server/core", "kernels"},
    "server/model": {"server/core", "server/record", "kernels"},
    "server/transport": {"server/core", "server/record", "kernels"},
    "server/kv": {"server/core", "server/record", "server/transport", "kernels"},
    "server/engine": BELOW_ENGINE,
    "server/scheduler": BELOW_ENGINE | {"server/engine"}, "server/rpc": BELOW_RPC | {"proto/wire"},
    "server/process": BELOW_RPC | {"server/rpc", "proto/wire"},
    "proto/wire": set(), "client/cpp": {"proto/wire"}, "client/cli": {"client/cpp", "proto/wire"},
}
EXCEPT = {("server/record/metrics.h", "server/kv/block_pool.h")}  # states of blocks, a gauge each
# How a header of others starts -> how the paths start that may include it.
ENDS_IN = {
    r"grpc|google/(rpc|protobuf)/|prefilld/v1/": r"server/rpc/|proto/wire/|client/|server/server\.",
    r"(dnnl|hwy)\b": r"kernels/cpu/",
    r"omp\.h": r"kernels/cpu/|kernels/backend\.cc",
    r"(cuda|cudnn|cublas|nvtx)\w*(\.h|/)": r"kernels/cuda/",
    r"prometheus/": r"server/record/metrics\.|server/pages\.cc",
}


def folder(path: str) -> str:
    if re.match(r"server/\w+\.", path):
        built = re.match(r"server/(config|http|http_stream|main|pages|port|server|startup_log)\.",
                         path)
        return "server/process" if built else "server/core"
    return next((name for name in MAY_INCLUDE if path.startswith(name + "/")), "")


def broken(path: str, header: str) -> bool:
    if header.startswith("kernels/cuda/") and not path.startswith("kernels/cuda/"):
        return path != "kernels/backend.cc"  # the table of backends
    if header.startswith("kernels/cpu/") and not path.startswith("kernels/"):
        return True  # the server knows kernels/*.h and no device
    if path.endswith((".cu", ".cuh")) and header.startswith("absl/"):
        return True  # what nvcc compiles gets plain parameters
    if re.match(r"(kernels|server|client|proto|tests)/", header):
        return (folder(header) not in MAY_INCLUDE[folder(path)] | {folder(path)}
                and (path, header) not in EXCEPT)
    return any(re.match(what, header) and not re.match(places, path)
               for what, places in ENDS_IN.items())


def test_sources_include_what_their_folder_may():
    files = {str(path.relative_to(ROOT)): path for top in ("kernels", "server", "client", "proto")
             for path in (ROOT / top).rglob("*") if path.suffix in (".cc", ".h", ".cu", ".cuh")}
    assert {folder(path) for path in files} == set(MAY_INCLUDE)
    assert not [f"{path} includes {header}" for path in sorted(files)
                for header in INCLUDE.findall(files[path].read_text()) if broken(path, header)]


# Durations and whatever ends by itself are by a clock that nobody sets: server/clock.h.
WALL_CLOCK = re.compile(r"absl::Now\(|system_clock|(?:Await|Wait)\w*With(?:Timeout|Deadline)\(|"
                        r"CLOCK_REALTIME")


def test_nothing_but_the_log_asks_for_the_wall_clock():
    files = [path for top in ("kernels", "server", "client", "proto")
             for path in (ROOT / top).rglob("*") if path.suffix in (".cc", ".h", ".cu", ".cuh")]
    assert [str(path.relative_to(ROOT)) for path in files
            if WALL_CLOCK.search(path.read_text())] == ["server/record/log.cc"]


@pytest.mark.parametrize(("path", "header"), [
    ("kernels/ops.h", "server/job.h"), ("server/kv/layout.cc", "server/engine/engine.h"),
    ("client/cpp/call.cc", "server/record/errors.h"), ("server/job.h", "prefilld/v1/tensor.pb.h"),
    ("server/model/config.cc", "dnnl.hpp"), ("server/rpc/call.h", "prometheus/counter.h"),
    ("server/engine/engine.cc", "cuda_runtime_api.h"),
    ("kernels/cpu/ops.cc", "kernels/cuda/launch.h"),
    ("kernels/attention.cc", "cudnn_frontend.h"),
    ("server/kv/layout.cc", "kernels/cpu/tile.h"),
    ("server/engine/engine.cc", "kernels/cuda/launch.h"),
    ("kernels/cuda/attend/task_queue.cu", "absl/status/status.h")])
def test_a_broken_rule_is_found(path, header):
    assert broken(path, header)
