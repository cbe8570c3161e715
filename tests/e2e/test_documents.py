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


def flags_of_script(path):
    """Of its help; of its source where it needs torch before it answers."""
    try:
        return defined_in(help_of(sys.executable, path))
    except subprocess.CalledProcessError as error:
        if "No module named 'torch'" not in error.stderr:
            raise
        return declared_in(path.read_text())


def defined_in(help_text):
    """What has a line of its own, not what such a line mentions."""
    return set(re.findall(r"^  (?:-\w, ?)?(--[a-z][\w-]*)", help_text, re.M))


def declared_in(source):
    """What is declared to argparse or CLI11, not what is passed on to another program."""
    return set(re.findall(r'\badd(?:_argument|_option|_flag)?\(\s*"(--[a-z][\w-]*)"', source))


@pytest.fixture(scope="module")
def programs():
    """The flags of each program, ours and others'."""
    result = {"prefilld": defined_in(help_of(harness.PREFILLD)),
              "prefillctl": defined_in(help_of(harness.PREFILLCTL)).union(
                  *(defined_in(help_of(harness.PREFILLCTL, command)) for command in COMMANDS))}
    for folder in ("tests/bench", "tests/vllm", "client/python/examples"):
        for path in (ROOT / folder).rglob("*.py"):
            if "parse_args(" in path.read_text():
                result[path.name] = flags_of_script(path)
        for path in (ROOT / folder).rglob("*.cc"):
            if "CLI11_PARSE" in (source := path.read_text()):
                result[path.stem] = declared_in(source)
    return result | OTHERS_FLAGS


def named_flags(text, programs):
    """(program, flag), the program that the line or the quoted code names last before, or None."""
    names = "|".join(map(re.escape, programs))
    word = re.compile(rf"(?<![\w-])(?:({names})(?=\s)|(--[a-z][\w-]*))")
    for line in re.split(r"[`\n]", text.replace("\\\n", " ")):
        program = None
        for name, flag in word.findall(line):
            program = name or program
            if flag:
                yield program, flag


def unknown_flags(text, programs):
    known = programs | {None: set().union(*programs.values())}
    return {(program, flag) for program, flag in named_flags(text, programs)
            if flag not in known[program]}


def test_every_flag_exists(programs):
    assert unknown_flags(text_of(), programs) == set()
    named = set(named_flags(text_of(), programs))
    assert {(name, flag) for name, flags in OTHERS_FLAGS.items() for flag in flags} <= named


def test_a_flag_is_looked_for_where_it_is_named(programs):
    assert all(programs.values())
    for text, unknown in (
            ("build/prefilld --lease_ttl=1m --gamma=0.9", {("prefilld", "--gamma")}),
            ("prefillctl prefill \\\n  --stall_timeout=1s", {("prefillctl", "--stall_timeout")}),
            ("`tests/bench/attention/open_method.py --attend_memory=1GiB --rounds=2`",
             {("open_method.py", "--attend_memory")}),
            ("build/tests/model_bench --structured  # random_model.py --dir=D --structured",
             {("random_model.py", "--structured")}),
            ("of a prefilld or whoever: `--lease_ttl`, `--structured`, `--before`", set()),
            ("only passed on: `--forceflush`, `--no-enable-prefix-caching`",
             {(None, "--forceflush"), (None, "--no-enable-prefix-caching")})):
        assert unknown_flags(text, programs) == unknown


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


@pytest.mark.parametrize("example", sorted((ROOT / "deploy").glob("compose*.yaml")),
                         ids=lambda path: path.name)
def test_a_server_of_an_example_is_reached_from_its_neighbours(example, start_server, tiny,
                                                               tmp_path):
    command = re.search(r"command: \[(.+)\]", example.read_text())[1].split(", ")
    places = {"/models/m": tiny.directory, "/run/prefilld": tmp_path, ":50051": ":0"}
    for place, here in places.items():
        command = [flag.replace(place, str(here)) for flag in command]
    with start_server(*command, "--http=127.0.0.1:0", own_addresses=True) as server:
        assert server.target.startswith("0.0.0.0:")


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
