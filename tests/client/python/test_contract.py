"""The checked-in modules say what proto/ says."""

import pathlib
import shutil
import subprocess

import pytest
from google.protobuf import descriptor_pb2

from prefilld.v1 import (kv_handoff_service_pb2, model_service_pb2, prefill_service_pb2,
                         sparsity_pb2, tensor_pb2)

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODULES = (kv_handoff_service_pb2, model_service_pb2, prefill_service_pb2, sparsity_pb2, tensor_pb2)


def test_generated_code_matches_the_contract(tmp_path):
    protoc = shutil.which("protoc")
    if protoc is None:
        pytest.skip("protoc (protobuf-compiler) is not installed")
    protos = sorted((ROOT / "proto" / "prefilld").rglob("*.proto"))
    out = tmp_path / "set"
    subprocess.run([protoc, f"-I{ROOT / 'proto'}", f"--descriptor_set_out={out}", *protos],
                   check=True)
    wanted = {f.name: f for f in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file}
    assert sorted(wanted) == sorted(module.DESCRIPTOR.name for module in MODULES)
    for module in MODULES:
        got = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(got)
        expected = wanted[got.name]
        expected.ClearField("source_code_info")
        for message in expected.message_type:  # protoc adds names that the runtime leaves out
            _clear_json_names(message)
        for message in got.message_type:
            _clear_json_names(message)
        assert got == expected, f"{got.name} changed: run client/python/generate.py"


def _clear_json_names(message):
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        _clear_json_names(nested)
