"""tests/bench/model: --help needs nothing but Python and says what the rest needs; what is missing
is a line."""

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "bench/model"
ARGUMENTS = {
    "beside_transformers.py": ["--model={}"],
    "masks.py": ["--model={}"],
    "mixed_load.py": ["--model={}"],
    "overtaking.py": ["--model={}"],
    "parity.py": ["--model={}", "--tokens=9"],
    "qwen_from_gguf.py": ["--wheels={}", "--dir={}/out"],
    "random_model.py": ["--shape=qwen3-8b", "--dir={}/out"],
}


def run(script, *arguments, **environment):
    """Without any package that is not Python's own."""
    return subprocess.run([sys.executable, "-S", FOLDER / script, *arguments], env=environment,
                          capture_output=True, text=True, timeout=60)


def test_all_are_here():
    assert set(ARGUMENTS) == {path.name for path in FOLDER.glob("*.py")
                              if "__main__" in path.read_text()}


@pytest.mark.parametrize("script", ARGUMENTS)
def test_help_says_what_it_takes(script):
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "GPU" in done.stdout and " GB" in done.stdout
    assert f"tests/bench/model/{script}" in done.stdout, "an example"


@pytest.mark.parametrize("script", ARGUMENTS)
def test_missing_packages_are_named_in_a_line(script, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = run(script, *(word.format(tmp_path) for word in ARGUMENTS[script]))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{script}: ") and "-m pip install " in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [s for s in ARGUMENTS if "--model={}" in ARGUMENTS[s]])
def test_a_directory_without_a_model_is_named(script, tmp_path):
    done = run(script, *(word.format(tmp_path) for word in ARGUMENTS[script]))
    assert done.returncode == 2 and f"there is no {tmp_path}/config.json" in done.stderr
