"""What the tests and measurements here share: the model in variants, prompts, and a prefilld that
misbehaves."""

import contextlib
import json
import pathlib
import threading
from concurrent import futures

import grpc
import torch
from safetensors.torch import load_file, save_file

from e2e import harness
from prefilld.v1 import tensor_pb2
from tokenizer import Tokenizer

MODEL = harness.BUILD / "models" / "SmolLM2-135M-Instruct"
TEXT = pathlib.Path("/usr/share/common-licenses/GPL-3")
FIXTURES = harness.ROOT / "tests" / "fixtures" / "models"


def text_ids():
    """Token IDs of TEXT, about 7,600."""
    return Tokenizer(MODEL).encode(TEXT.read_text(encoding="utf-8"))


def variants(folder):
    """{name: directory} of models that are not vLLM's: other weights of the same shape, and the
    same weights in bfloat16."""
    weights = load_file(MODEL / "model.safetensors")
    config = json.loads((MODEL / "config.json").read_text())
    name = "model.layers.0.self_attn.k_proj.weight"
    other = {**weights, name: weights[name] * 1.5}
    halved = {key: tensor.to(torch.bfloat16) for key, tensor in weights.items()}
    made = {}
    for kind, tensors, dtype in (("other", other, "float32"), ("bf16", halved, "bfloat16")):
        made[kind] = pathlib.Path(folder) / kind
        made[kind].mkdir()
        save_file(tensors, made[kind] / "model.safetensors")
        (made[kind] / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    return made


class FaultyProxy(grpc.GenericRpcHandler):
    """Stands in front of a prefilld and passes every call on, bytes as they are. `fault` says what
    happens to PullKv:

    "": nothing. "corrupt": a byte of every chunk is flipped. "stall": nothing comes after the first
    chunk. A function: called once, after the first chunk, and then the stream goes on.
    """

    def __init__(self, target):
        self.fault = ""
        self.retarget(target)
        self._server = grpc.server(futures.ThreadPoolExecutor(64))
        self._server.add_generic_rpc_handlers((self,))
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def retarget(self, target):
        self._channel = grpc.insecure_channel(target, harness.channel_options())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self._server.stop(0).wait()

    def service(self, details):
        if details.method.endswith(("/Prefill", "/PullKv")):
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: self._stream(details.method, request, context))
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._ask(details.method, request, context))

    def _ask(self, method, request, context):
        try:
            return self._channel.unary_unary(method)(request, timeout=context.time_remaining())
        except grpc.RpcError as error:
            pass_on(error, context)

    def _stream(self, method, request, context):
        call = self._channel.unary_stream(method)(request, timeout=context.time_remaining())
        context.add_callback(call.cancel)
        gone = threading.Event()
        context.add_callback(gone.set)
        try:
            for count, message in enumerate(call):
                fault = self.fault if method.endswith("/PullKv") else ""
                yield corrupted(message) if fault == "corrupt" else message
                if fault == "stall":
                    gone.wait()
                elif callable(fault) and count == 0:
                    self.fault = ""
                    fault()
        except grpc.RpcError as error:
            pass_on(error, context)


def corrupted(message):
    chunk = tensor_pb2.TensorChunk.FromString(message)
    data = bytearray(chunk.data)
    data[len(data) // 2] ^= 0x40
    chunk.data = bytes(data)
    return chunk.SerializeToString()


def pass_on(error, context):
    context.set_trailing_metadata(error.trailing_metadata() or ())
    context.abort(error.code(), error.details())


@contextlib.contextmanager
def prefilld(log_path, *flags, models=()):
    """A server with SmolLM2 as "smol" and `models` (name, directory)."""
    with harness.Server(*flags, log_path=log_path, models=[("smol", MODEL), *models]) as server:
        yield server
