"""The blocks of README.md and docs/*.md do what they say when they are pasted in order.

A document's bash and python blocks run as written, in one shell, in a directory that looks as the
repository does after `make demo`. What cannot run here matches one rule of ELSEWHERE.
"""

import dataclasses
import json
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from e2e import checkpoints, harness, safetensors_file

DOCUMENTS = [harness.ROOT / "README.md", *sorted((harness.ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    r"^make ": "builds, installs and downloads: CI calls it",
    r"--backend=cuda": "needs a GPU",
    r"vllm serve": "needs vLLM: tests/vllm",
    r"127\.0\.0\.1:8080": "needs the router, and vLLM behind it: tests/vllm",
    r"\[hf\]|past_key_values|batch_repeat_interleave": "needs torch and transformers: tests/vllm",
}
LISTEN = (50051, 9464)  # the defaults of prefilld
READY_S = 60


@dataclasses.dataclass(frozen=True)
class Block:
    document: pathlib.Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.document.name}:{self.line}"

    @property
    def elsewhere(self):
        """Why it does not run here; the rules exclude each other."""
        found = [why for rule, why in ELSEWHERE.items() if re.search(rule, self.text, re.M)]
        assert len(found) < 2, f"{self}: {found}"
        return found[0] if found else None


def blocks(document):
    text = document.read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield Block(document, text.count("\n", 0, found.start()) + 1, found[1], found[2])


ALL = [block for document in DOCUMENTS for block in blocks(document)]
CODE = [block for block in ALL if block.language in ("bash", "python")]
RUNNABLE = {document: found for document in DOCUMENTS
            if (found := [b for b in CODE if b.document == document and not b.elsewhere])}


@pytest.mark.parametrize("block", [b for b in ALL if b not in CODE], ids=str)
def test_what_is_not_code_is_json_or_a_drawing(block):
    if block.language == "json":
        json.loads(block.text)
    else:
        assert block.language == "" and "▶" in block.text


@pytest.mark.parametrize("block", [b for b in CODE if b.elsewhere], ids=str)
def test_blocks_that_run_elsewhere(block):
    pytest.skip(block.elsewhere)


@pytest.fixture
def after_make_demo(tmp_path):
    """A directory with what the documents find in the repository then; the model is a small one."""
    build = tmp_path / "build"
    for program in (harness.PREFILLD, harness.PREFILLCTL):
        build.mkdir(exist_ok=True)
        (build / program.name).symlink_to(program)
    checkpoints.write(build / "models/SmolLM2-135M-Instruct", vocab_size=4096)
    python = build / "venv/bin/python"
    python.parent.mkdir(parents=True)
    package = harness.ROOT / "client/python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def pasted(block):
    """As lines of one shell session that ends at the first failure."""
    if block.language == "python":
        return f"build/venv/bin/python - <<'END_OF_PYTHON'\n{block.text}END_OF_PYTHON\n"
    return block.text


def free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.parametrize("document", RUNNABLE, ids=lambda path: path.name)
def test_blocks_run_when_pasted_in_order(document, after_make_demo):
    if not all(map(free, LISTEN)):
        pytest.skip(f"a port of {LISTEN} is taken, and the documents name no other")
    script = "".join(f"echo '== {block}'\n{pasted(block)}" for block in RUNNABLE[document])
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c",
         f"trap 'kill $(jobs -p) && wait' EXIT\n{script}"],
        cwd=after_make_demo, text=True, timeout=5 * READY_S, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    build = after_make_demo / "build"
    if document.name == "README.md":
        layers = checkpoints.CONFIG["num_hidden_layers"]
        assert len(safetensors_file.load(build / "kv.safetensors")) == 2 * layers
        assert safetensors_file.load(build / "o.safetensors")["o"].shape == (4096, 8, 64)
        assert len(re.findall(r"^\d+ \(2, 4000, 64\) 0?[.1]", done.stdout, re.M)) == layers


def test_the_readme_has_blocks_to_run():
    assert [b.language for b in RUNNABLE[harness.ROOT / "README.md"]] == [
        "bash", "bash", "bash", "python"]
