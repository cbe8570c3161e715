"""ARCHITECTURE.md, section 8: what grows is named where its table, its own files and the proto are,
and nowhere else in the code."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What must not spread -> the files that may hold it. Comments do not count.
MAY_NAME = {
    "a method": (
        r"\bMethod::k(FlexPrefill|Joint)\b|\bMETHOD_(FLEXPREFILL|JOINT)\b",
        r"kernels/((cpu|cuda)/)?methods\.(h|cc)|server/rpc/validate_policy\.cc"),
    "a transport": (
        r"\bTransport::k(PosixShm|CudaIpc)\b|\bTRANSPORT_(POSIX_SHM|CUDA_IPC)\b",
        r"server/transport/\w+\.(h|cc)|client/python/prefilld/transport\.py"),
    "a head_dim": (
        r"\bhead_dim *(==|!=) *[0-9]|\bcase (64|96|128|256):|k\w*HeadDims\[\] *=",
        r"kernels/cpu/cpu_backend\.cc|kernels/cuda/.*"),
    "a backend's folder": (
        r"kernels/(cpu|cuda)/",
        r"kernels/(backend\.cc|convert\.cc|cpu/.*|cuda/.*)"),
}
NOT_YET = set()


def sources():
    for room in ("kernels", "server", "client"):
        for path in sorted((ROOT / room).rglob("*")):
            name = path.relative_to(ROOT)
            if "build" in name.parts:  # which pip leaves in client/python
                continue
            if path.suffix in (".cc", ".h", ".cu", ".cuh", ".py") and "_pb2" not in path.name:
                yield str(name), path.read_text()


def code(path, text):
    """Without comments, line by line as it was."""
    return re.sub(r"#.*" if path.endswith(".py") else r"//.*", "", text)


def misplaced(what, path, text):
    pattern, places = MAY_NAME[what]
    if re.fullmatch(places, path):
        return []
    lines = text.splitlines() if what == "a backend's folder" else code(path, text).splitlines()
    return [f"{path}:{number}: {line.strip()}" for number, line in enumerate(lines, 1)
            if re.search(pattern, line) and not line.lstrip().startswith("//")]


@pytest.mark.parametrize("what", [
    pytest.param(what, marks=[pytest.mark.xfail] if what in NOT_YET else []) for what in MAY_NAME])
def test_is_named_in_its_place_alone(what):
    assert not [line for path, text in sources() for line in misplaced(what, path, text)]


@pytest.mark.parametrize(("what", "path", "line"), [
    ("a method", "server/engine/engine.cc", "if (policy.method == Method::kJoint) {"),
    ("a method", "server/rpc/services.cc", "case v1::METHOD_FLEXPREFILL:"),
    ("a transport", "server/rpc/attend_reactor.cc", "transport == Transport::kCudaIpc"),
    ("a transport", "server/kv/kv_cache.cc", "v1::TRANSPORT_POSIX_SHM"),
    ("a head_dim", "server/engine/engine.cc", "if (info.head_dim == 128) {"),
    ("a backend's folder", "server/kv/layout.cc", '#include "kernels/cpu/elementwise.h"'),
])
def test_what_is_out_of_place_is_found(what, path, line):
    assert misplaced(what, path, f"int x;\n{line}\n") == [f"{path}:2: {line}"]
    assert not misplaced(what, path, "// " + line)
