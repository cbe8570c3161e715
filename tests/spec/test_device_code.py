"""nvcc 13.0 gives the members of a two-dimensional array's elements their initial values in its
first row only (`struct S { float x = 1; }; S s[2][2];` leaves s[1][*].x zero), without a word. So
device code has no such array."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = {path: path.read_text() for folder in ("kernels", "tests")
           for suffix in ("cu", "cuh") for path in (ROOT / folder).rglob(f"*.{suffix}")}


def initialised(text):
    """Names of the structs whose members have initial values."""
    bodies = re.findall(r"^( *)(?:struct|class) (\w+)[^;{]*\{\n(.*?)^\1\};", text, re.M | re.S)
    return {name for indent, name, body in bodies
            if re.search(rf"^{indent}  [\w:<>, ]+ \w+(\[\w+\])* (= |\{{)[^()]*;", body, re.M)}


def arrays(text, names):
    return [found[0].strip() for name in names
            for found in re.finditer(rf"^.*\b{name}(<[^;]*>)? \w+\[[^\]]*\]\[.*$", text, re.M)]


@pytest.mark.parametrize("declaration,wrong", [
    ("S s[2][2];", True), ("S s[4];", False), ("float s[2][2];", False)])
def test_the_check_sees_one(declaration, wrong):
    text = "struct S {\n  float max = 0, sum = 0;\n};\nvoid F() {\n  " + declaration + "\n}\n"
    assert bool(arrays(text, initialised(text))) == wrong


def test_there_is_no_such_array():
    names = set().union(*map(initialised, SOURCES.values()))
    assert "Softmax" in names
    assert {str(path): arrays(text, names) for path, text in SOURCES.items()
            if arrays(text, names)} == {}
