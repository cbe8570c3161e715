"""What the documents and the help texts name exists: flags, metrics, files, links, examples."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from e2e import attending, harness, safetensors_file

ROOT = harness.ROOT
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")),
             ROOT / "client/python/README.md", ROOT / "kernels/README.md"]
ROUTER = ROOT / "client/python/examples/router.py"
COMMANDS = ("health", "models", "attend", "prefill", "sparsity", "bench")
ON_A_GPU = {"prefilld_kv_segment_bytes", "prefilld_gpu_memory_bytes"}  # no series without one
OTHERS_FLAGS = {
    "cmake": {"--preset", "--build"},
    "ctest": {"--preset", "--test-dir"},
    "vllm serve": {"--dtype", "--kv-transfer-config", "--served-model-name"},
}


def text_of(documents=DOCUMENTS):
    return "\n".join(document.read_text() for document in documents)


def help_of(*command):
    return subprocess.run([*map(str, command), "--help"], capture_output=True, text=True,
                          check=True, timeout=60).stdout


def flags_in(text):
    """--kv_memory of "--kv_memory=8GiB", not the middle of a word or of a rule of dashes."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def benchmarks():
    return [path for folder in ("bench", "vllm") for path in (ROOT / "tests" / folder).rglob("*")
            if path.suffix in (".py", ".cc")]


def test_every_flag_exists():
    ours = flags_in(help_of(harness.PREFILLD)) | flags_in(help_of(sys.executable, ROUTER))
    for command in COMMANDS:
        ours |= flags_in(help_of(harness.PREFILLCTL, command))
    ours |= flags_in(help_of(harness.PREFILLCTL))
    for path in benchmarks():
        ours |= set(re.findall(r'"(--[a-z][\w-]*)', path.read_text()))
    others = set().union(*OTHERS_FLAGS.values())
    named = flags_in(text_of())
    assert named - ours - others == set(), "named in a document, and no program has it"
    assert others <= named, "OTHERS_FLAGS has what no document names"


def test_every_metric_exists(server):
    text = text_of()
    shown = {line.split()[2] for line in server.get("/metrics")[1].splitlines()
             if line.startswith("# TYPE")}
    assert not ON_A_GPU & shown
    source = (ROOT / "server/record/metrics.cc").read_text()
    assert all(f'"{name}"' in source for name in ON_A_GPU)
    named = set(re.findall(r"(?<![\w:.])prefilld_[a-z_]+\b(?!\.)", text))
    assert len(named) > 5
    assert named - shown - ON_A_GPU == set()


def test_every_label_of_a_metric_exists(server):
    labels = {}
    for name, pairs in server.metrics():
        labels.setdefault(name, set()).update(pairs)
    for name, label, value in re.findall(r'`?(prefilld_[a-z_]+)\{(\w+)="(\w+)"\}', text_of()):
        if name not in ON_A_GPU:
            assert (label, value) in labels[name], name


def test_every_metric_of_the_router_exists():
    made = set(re.findall(r'metric\(prometheus\.\w+, "(\w+)"', ROUTER.read_text()))
    named = set(re.findall(r"\brouter_([a-z_]+)\b", (ROOT / "docs/router.md").read_text()))
    assert {name.removesuffix("_total") for name in named} == made


@pytest.fixture(scope="module")
def files():
    """Every file of the repository, "/kernels/backend.h"."""
    rooms = [path for path in ROOT.iterdir() if not path.name.startswith((".", "build"))]
    return {f"/{path.relative_to(ROOT)}" for room in rooms for path in (room, *room.rglob("*"))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_exists(document, files):
    """`kernels/backend.h`, from the root or as the end of a path; `server/kv/layout` without what
    it ends with."""
    suffix = r"\.(?:py|cc|h|cu|cuh|md|txt|toml|sh|cmake|proto)\b"
    rooms = r"(?:server|kernels|client|tests|proto|docs|deploy|cmake)/"
    for quoted in re.findall(r"`([^`\n]+)`", document.read_text()):
        if re.search(r"[*{<…]|NAME|http", quoted):
            continue
        for name in re.findall(rf"(?<![\w./-])(?:[\w./-]+{suffix}|{rooms}[\w./-]*\w)", quoted):
            if not name.startswith("build/"):
                assert any(file.endswith("/" + name) or file.startswith(f"/{name}.")
                           for file in files), name


def test_every_command_of_make_exists():
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text_of(), re.M))
    assert named and named <= rules


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.fixture
def inputs(tmp_path):
    """What the examples read."""
    (tmp_path / "ids.json").write_text(json.dumps(list(range(300))))
    safetensors_file.save(tmp_path / "qkv.safetensors", dict(zip("qkv", attending.small())))
    return tmp_path


def test_the_examples_of_prefillctl_run(start_server, tiny, inputs):
    """In the order of the help: `sparsity` shows what `prefill` did."""
    with start_server(models=[("smol", tiny.directory)]) as server:
        for command in COMMANDS:
            example = re.search(rf"^Example: prefillctl ({command}\b.*(?:\n.+)*)",
                                help_of(harness.PREFILLCTL, command), re.M)[1]
            done = subprocess.run(
                [harness.PREFILLCTL, f"--target={server.target}", *shlex.split(example)],
                cwd=inputs, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{example}\n{done.stderr}"
    assert safetensors_file.load(inputs / "o.safetensors")["lse"].dtype == np.float32
    assert len(safetensors_file.load(inputs / "kv.safetensors")) == 8
