"""Writes the seeds of the fuzzers, tests/fuzz/corpus/FUZZER/*: valid inputs to begin with.

    build/venv/bin/python tests/fuzz/make_corpus.py
"""

import json
import pathlib
import shutil
import struct

import google_crc32c
from google.protobuf import duration_pb2

from prefilld.v1 import kv_handoff_service_pb2 as handoff
from prefilld.v1 import prefill_service_pb2 as prefill
from prefilld.v1 import sparsity_pb2 as sparsity
from prefilld.v1 import tensor_pb2 as tensor

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parent / "fixtures" / "models"
# The numbers of chunk_fuzzer stand behind the message, the first one last: which message, how many
# slices, and their sizes.
BARE, IN_ATTEND = bytes([0, 0]), bytes([30, 3, 2, 1])
# Of layout_fuzzer: how long a range, where it begins, K or V, of which layer.
RANGES = [struct.pack("<HIBB", length, at, value, layer)
          for length, at, value, layer in ((99, 7, 0, 0), (8000, 70000, 1, 4), (1, 0, 1, 8))]


def chunks():
    payload = b"sixteen bytes ok"
    chunk = tensor.TensorChunk(tensor_index=1, layer=3, byte_offset=1 << 33, last=True,
                               data=payload, crc32c=google_crc32c.value(payload))
    yield "bare", chunk.SerializeToString() + BARE
    yield "empty", BARE
    yield "attend", prefill.AttendRequest(chunk=chunk).SerializeToString() + IN_ATTEND
    in_memory = tensor.TensorChunk(buffer=tensor.BufferRef(name="/x", byte_length=4))
    yield "in_memory", in_memory.SerializeToString() + BARE


def uploads():
    yield "right", bytes(range(64))
    yield "long", bytes(range(255, 0, -1)) * 2


def headers():
    def header(ragged=False):
        message = prefill.AttendHeader(request_id="good-1", priority=7, return_lse=True,
                                       softmax_scale=0.125, transport=handoff.TRANSPORT_POSIX_SHM)
        for name, tokens, heads in (("v", 20, 2), ("q", 10, 4), ("k", 20, 2)):
            message.tensors.add(name=name, data_type=tensor.DATA_TYPE_BF16,
                                shape=[tokens, heads, 64])
        if ragged:
            message.cu_seqlens_q.extend([0, 3, 10])
            message.cu_seqlens_k.extend([0, 3, 20])
            message.return_block_index = True
        return message.SerializeToString()

    yield "attend", header() + bytes([0])
    long_name = prefill.AttendHeader()
    for name in ("x" + "é" * 60, "k", "v"):
        long_name.tensors.add(name=name, data_type=tensor.DATA_TYPE_F32, shape=[1, 1, 64])
    yield "attend_long_name", long_name.SerializeToString() + bytes([0])
    yield "attend_ragged", header(ragged=True) + bytes([0])
    request = prefill.PrefillRequest(
        request_id="r", model="m", token_ids=[1, 2, 299], priority=-7, return_logits=True,
        destination=prefill.KvDestination(transport=handoff.TRANSPORT_GRPC, retain=True,
                                          layout=layout(),
                                          lease_ttl=duration_pb2.Duration(seconds=5)),
        sparsity=sparsity.SparsityPolicy(gamma=0.9))
    yield "prefill", request.SerializeToString() + bytes([1])
    pull = handoff.PullKvRequest(lease="l", generation=1, first_layer=1, layer_count=2,
                                 resume_tensor_index=1, resume_byte_offset=512, chunk_bytes=65536,
                                 transport=handoff.TRANSPORT_GRPC, layout=layout())
    yield "pull", pull.SerializeToString() + bytes([2])


def layout(dtype=tensor.DATA_TYPE_F16):
    return handoff.KvLayout(
        physical_order=[handoff.AXIS_LAYER, handoff.AXIS_KV, handoff.AXIS_HEAD, handoff.AXIS_TOKEN,
                        handoff.AXIS_CHANNEL], data_type=dtype)


def policies():
    yield "open", b""
    full = sparsity.SparsityPolicy(
        method=sparsity.METHOD_FLEXPREFILL, gamma=0.95, tau=0.1, min_budget_tokens=256,
        max_budget_tokens=4096, block_size=128, min_captured_mass=0.5,
        report_level=sparsity.REPORT_LEVEL_CAPTURED_MASS)
    yield "flexprefill", full.SerializeToString()
    joint = sparsity.SparsityPolicy(method=sparsity.METHOD_JOINT, block_size=64)
    yield "joint", joint.SerializeToString()


def layouts():
    for i, numbers in enumerate(RANGES):
        yield f"default_{i}", numbers
        for name, dtype in (("f32", tensor.DATA_TYPE_F32), ("bf16", tensor.DATA_TYPE_BF16)):
            yield f"{name}_{i}", layout(dtype).SerializeToString() + numbers


def safetensors(header, data):
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def safetensors_files():
    yield "empty", safetensors({}, b"")
    yield "two", safetensors(
        {"__metadata__": {"format": "pt"},
         "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
         "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}, bytes(range(22)))
    yield "kinds", safetensors(
        {"i64": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
         "none": {"dtype": "F16", "shape": [0, 4], "data_offsets": [8, 8]},
         "scalar": {"dtype": "U8", "shape": [], "data_offsets": [8, 9]}}, bytes(9))


def model_configs():
    for name in ("base", "llama3", "mistral", "qwen2_yarn_bf16", "qwen3", "glm", "dynamic",
                 "linear"):
        config = json.loads((MODELS / name / "config.json").read_text())
        yield name, json.dumps(config, separators=(",", ":")).encode()


def server_configs():
    yield "file", b"\n".join([
        b'listen="127.0.0.1:0"', b'http="[::1]:9464"', b'model=["a=/m/a", "b=/m/b"]',
        b'kv_memory="512MiB"', b'lease_ttl="30s"', b"max_waiting_jobs=16",
        b'transports="grpc,posix_shm"', b"reflection=true", b'tls_cert="c"', b'tls_key="k"',
        b"\x00"])
    yield "arguments", b"\n".join([
        b"--listen=127.0.0.1:0", b"--model=a=/m/a", b"--kv_memory=1GiB", b"--max_lease_ttl=2m",
        b"--backend=cpu", b"--threads=2", b"--max_prompt_tokens=4096", b"--kv_device_memory=0",
        b"\x01"])


FUZZERS = {"chunk": chunks, "upload": uploads, "header": headers, "policy": policies,
           "layout": layouts, "safetensors": safetensors_files, "model_config": model_configs,
           "server_config": server_configs}


def main() -> None:
    corpus = HERE / "corpus"
    shutil.rmtree(corpus, ignore_errors=True)
    for fuzzer, seeds in FUZZERS.items():
        (corpus / fuzzer).mkdir(parents=True)
        for name, data in seeds():
            (corpus / fuzzer / name).write_bytes(data)


if __name__ == "__main__":
    main()
