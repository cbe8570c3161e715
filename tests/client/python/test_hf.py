"""prefilld.hf where torch or transformers is missing; what needs them is in tests/vllm."""

import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[3] / "client" / "python"


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=PACKAGE, capture_output=True, text=True,
                          timeout=60)


def test_the_package_itself_imports_neither():
    done = python("import sys, prefilld; print({'torch', 'transformers'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_package_is_named_with_the_way_to_get_it(missing):
    done = python("import sys, types; sys.modules['torch'] = types.ModuleType('torch'); "
                  f"sys.modules['transformers'] = None; sys.modules[{missing!r}] = None; "
                  "import prefilld.hf")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: prefilld.hf: ") and missing in last
    assert "pip install 'prefilld[hf]'" in last
