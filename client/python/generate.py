#!/usr/bin/env python3
"""Regenerates prefilld/v1 from proto/prefilld/v1. Run after the contract changes:

    python -m venv /tmp/gen && /tmp/gen/bin/pip install grpcio-tools==1.76.0
    /tmp/gen/bin/python client/python/generate.py

The version is chosen, not the newest: it emits protobuf 6.31 code, which every protobuf runtime
from 6.31 up to, but not including, 8 accepts (see the bounds in pyproject.toml). The output is
checked in, so that installing the package needs no compiler.
"""

import pathlib
import sys

PACKAGE_ROOT = pathlib.Path(__file__).resolve().parent
PROTO_ROOT = PACKAGE_ROOT.parent.parent / "proto"


def generate(out: pathlib.Path) -> list[pathlib.Path]:
    """Writes the modules, their type stubs and the package marker under `out`."""
    from grpc_tools import protoc

    protos = sorted(p.relative_to(PROTO_ROOT) for p in (PROTO_ROOT / "prefilld").rglob("*.proto"))
    include = pathlib.Path(protoc.__file__).parent / "_proto"
    code = protoc.main([
        "protoc", f"-I{PROTO_ROOT}", f"-I{include}",
        f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}",
        *map(str, protos),
    ])
    if code != 0:
        raise SystemExit(code)
    package = out / "prefilld" / "v1"
    for proto in protos:  # a file without a service needs no service module
        if "service " not in (PROTO_ROOT / proto).read_text():
            (out / proto.with_name(f"{proto.stem}_pb2_grpc.py")).unlink()
    (package / "__init__.py").write_text(
        '"""The contract, generated from proto/prefilld/v1 by generate.py."""\n')
    return sorted(package.glob("*.py*"))


if __name__ == "__main__":
    for path in generate(PACKAGE_ROOT):
        print(path.relative_to(PACKAGE_ROOT))
    sys.exit(0)
