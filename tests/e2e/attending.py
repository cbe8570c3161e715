"""The Attend call by hand: header, chunks and outputs, each step open to mischief."""

import queue

import google_crc32c
import numpy as np

from prefilld.v1 import prefill_service_pb2 as pb
from prefilld.v1 import sparsity_pb2, tensor_pb2
from spec import inputs

CHUNK = 1 << 20
DTYPES = {"F32": tensor_pb2.DATA_TYPE_F32, "BF16": tensor_pb2.DATA_TYPE_BF16,
          "F16": tensor_pb2.DATA_TYPE_F16}
METHODS = {"dense": sparsity_pb2.METHOD_DENSE, "flexprefill": sparsity_pb2.METHOD_FLEXPREFILL,
           "joint": sparsity_pb2.METHOD_JOINT}


def encode(x, dtype):
    if dtype == "BF16":
        return inputs.to_bf16_bits(x).tobytes()
    return np.ascontiguousarray(x, np.float16 if dtype == "F16" else np.float32).tobytes()


def policy(method="dense", **fields):
    return sparsity_pb2.SparsityPolicy(method=METHODS[method], **fields)


def header(q, k, v, dtype="F32", sparsity=None, **fields):
    """A valid header for these arrays; tests then spoil it."""
    tensors = [tensor_pb2.TensorSpec(name=name, data_type=DTYPES[dtype], shape=x.shape)
               for name, x in (("q", q), ("k", k), ("v", v))]
    return pb.AttendHeader(tensors=tensors, sparsity=sparsity or policy(), **fields)


def chunks(arrays, dtype="F32", size=CHUNK):
    """Valid chunks of the tensors, in order."""
    result = []
    for index, x in enumerate(arrays):
        data = encode(x, dtype)
        for begin in range(0, len(data), size):
            piece = data[begin:begin + size]
            result.append(tensor_pb2.TensorChunk(
                tensor_index=index, byte_offset=begin, data=piece,
                crc32c=google_crc32c.value(piece), last=begin + size >= len(data)))
    return result


class Call:
    """One Attend stream. Responses are read in order; a refusal raises grpc.RpcError."""

    def __init__(self, stub, timeout=60):
        self._requests = queue.SimpleQueue()
        self.stream = stub.Attend(iter(self._requests.get, None), timeout=timeout)

    def send(self, part):
        if isinstance(part, pb.AttendHeader):
            part = pb.AttendRequest(header=part)
        elif isinstance(part, tensor_pb2.TensorChunk):
            part = pb.AttendRequest(chunk=part)
        self._requests.put(part)

    def half_close(self):
        self._requests.put(None)

    def receive(self):
        return next(self.stream)

    def admit(self, head):
        self.send(head)
        reply = self.receive()
        assert reply.WhichOneof("part") == "admission", reply
        return reply.admission

    def finish(self):
        """Closes the upload; (outputs by name, summary). Checks order, lengths and checksums."""
        self.half_close()
        specs, data, summary = [], {}, None
        for reply in self.stream:
            part = reply.WhichOneof("part")
            if part == "outputs":
                specs = reply.outputs.tensors
            elif part == "chunk":
                chunk = reply.chunk
                received = data.setdefault(chunk.tensor_index, bytearray())
                assert chunk.byte_offset == len(received)
                assert chunk.crc32c == google_crc32c.value(chunk.data)
                received += chunk.data
            elif part == "summary":
                summary = reply.summary
        assert summary is not None
        return {s.name: decode(s, bytes(data[i])) for i, s in enumerate(specs)}, summary

    def cancel(self):
        self.stream.cancel()
        self.half_close()


def decode(spec, data):
    kind = {tensor_pb2.DATA_TYPE_F32: np.float32, tensor_pb2.DATA_TYPE_BF16: np.uint16,
            tensor_pb2.DATA_TYPE_F16: np.float16, tensor_pb2.DATA_TYPE_I32: np.int32,
            tensor_pb2.DATA_TYPE_U8: np.uint8}[spec.data_type]
    array = np.frombuffer(data, kind).reshape(list(spec.shape))
    return inputs.from_bf16_bits(array) if spec.data_type == tensor_pb2.DATA_TYPE_BF16 else array


def attend(stub, q, k, v, dtype="F32", timeout=60, chunk_bytes=CHUNK, **fields):
    """A whole well-behaved call."""
    call = Call(stub, timeout)
    call.admit(header(q, k, v, dtype, **fields))
    for chunk in chunks((q, k, v), dtype, chunk_bytes):
        call.send(chunk)
    return call.finish()


def small(family="random", tokens=200, **shape):
    return inputs.make(family, tokens, **shape)


def serves_a_good_request(server):
    """After a refusal."""
    outputs, _ = attend(server.prefill, *small(tokens=130))
    assert np.isfinite(outputs["o"]).all()
