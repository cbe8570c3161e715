"""CONTRIBUTING.md: no file above 500 lines but named kernels, no function of the host above 70."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE_MAX, FUNCTION_MAX = 500, 70
ROOMS = ("kernels", "server", "client", "proto", "deploy", "cmake")

LONG_KERNELS = {
    "kernels/cuda/attend/attend_sm80.cu", "kernels/cuda/attend/attend_sm90.cu",
    "kernels/cuda/select/joint/repair.cu",
}


def sources(*suffixes):
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*"))
            if path.suffix in suffixes and "_pb2" not in path.name
            and "build" not in path.relative_to(ROOT).parts]  # which pip leaves in client/python


def name(path):
    return str(path.relative_to(ROOT))


def test_no_file_is_longer_than_a_reader_takes():
    paths = sources(".cc", ".h", ".cu", ".cuh", ".py", ".proto", ".sh", ".cmake")
    assert {name(path) for path in paths
            if len(path.read_text().splitlines()) > FILE_MAX} == LONG_KERNELS


def cpp_functions(lines, indent=""):
    """(first line, number of lines) of every function that clang-format has laid out."""
    head = -1
    for at, line in enumerate(lines):
        if not line.startswith(indent) or line[len(indent):len(indent) + 1] in ("", " ", "#", "/"):
            continue
        text = line[len(indent):]
        if text == "}" and head >= 0:
            yield function_name(lines[head]), at - head + 1
        elif text.startswith("};") and head >= 0 and re.match(
                r"(template <.*> )?(class|struct|union)\b", lines[head][len(indent):]):
            yield from cpp_functions(lines[head + 1:at], indent + "  ")
        if text[0] not in "{}":
            head = at


def function_name(line):
    found = re.search(r"([\w:~]+)\(", line)
    return found[1] if found else line.strip()


def python_functions(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def long_functions():
    for path in sources(".cc", ".h", ".py"):
        text = path.read_text()
        found = python_functions(text) if path.suffix == ".py" else cpp_functions(text.splitlines())
        yield from (f"{name(path)}: {function}" for function, count in found
                    if count > FUNCTION_MAX)


def test_no_function_is_longer_than_a_screen():
    assert list(long_functions()) == []


@pytest.mark.parametrize("text", [  # each a function of six lines
    "int F() {\n  if (x) {\n  }\n\n  return 1;\n}\n",
    "namespace {\ntemplate <class T>\nint F(A a,\n      B b) {\n#if X\n#endif\n  ;\n}\n}  // n\n",
    "class A {\n  A() : b_(1) {}\n\n  int F() {\n    if (x) {\n    }\n    y;\n    ;\n  }\n};\n",
    "struct A {\n  struct B {\n    int F() {\n      x;\n\n\n      x;\n    }\n  };\n};\n",
    "A::A(int x)\n    : a_(x),\n      b_{x} {\n  x;\n  x;\n}\n",
])
def test_the_reader_finds_the_function(text):
    assert [count for _, count in cpp_functions(text.splitlines())] == [6]


def test_functions_have_names():
    assert function_name("absl::StatusOr<A> B::F(const C& c,") == "B::F"
