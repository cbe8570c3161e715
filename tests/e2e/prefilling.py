"""Prefill, PullKv and the leases between them, as a decode engine would use them."""

import contextlib

import google_crc32c
import numpy as np
from google.protobuf import duration_pb2

from e2e import attending
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import prefill_service_pb2 as pb
from prefilld.v1 import tensor_pb2

NUMPY = {tensor_pb2.DATA_TYPE_F32: np.float32, tensor_pb2.DATA_TYPE_F16: np.float16,
         tensor_pb2.DATA_TYPE_BF16: np.uint16}


def request(token_ids, model="tiny", method="dense", retain=None, lease_ttl=None, **fields):
    destination = kv_destination(retain, lease_ttl)
    sparsity = fields.pop("sparsity", None) or attending.policy(method)
    return pb.PrefillRequest(model=model, token_ids=token_ids, sparsity=sparsity,
                             destination=destination, **fields)


def kv_destination(retain=None, lease_ttl=None):
    ttl = None
    if lease_ttl is not None:
        ttl = duration_pb2.Duration()
        ttl.FromNanoseconds(int(lease_ttl * 1e9))
    return pb.KvDestination(retain=retain, lease_ttl=ttl)


class Prefill:
    """One Prefill stream; events are kept as they are read."""

    def __init__(self, stub, message, timeout=60):
        self.stream = stub.Prefill(message, timeout=timeout)
        self.order, self.layers, self.logits, self.summary, self.ready = [], [], None, None, None
        self.admission = None

    def admit(self):
        event = next(self.stream)
        assert event.WhichOneof("event") == "admission", event
        self._take(event)
        return self.admission

    def finish(self):
        for event in self.stream:
            self._take(event)
        return self

    def _take(self, event):
        kind = event.WhichOneof("event")
        self.order.append(kind)
        if kind == "layer_ready":
            self.layers.append(event.layer_ready)
        elif kind == "logits":
            self.logits = np.frombuffer(event.logits.f32, np.float32)
            assert len(self.logits) == event.logits.vocab_size
        elif kind == "kv_ready":
            self.ready = event.kv_ready
        elif kind == "summary":
            self.summary = event.summary
        else:
            self.admission = event.admission


def start(server, token_ids, timeout=60, stub=None, **fields):
    """A Prefill that has been admitted."""
    call = Prefill(stub or server.prefill, request(token_ids, **fields), timeout)
    call.admit()
    return call


def release(server, lease, reason=kv.RELEASE_REASON_CONSUMED):
    return server.handoff.ReleaseLease(kv.ReleaseLeaseRequest(
        lease=lease.name, generation=lease.generation, reason=reason), timeout=10)


@contextlib.contextmanager
def prefilled(server, token_ids, **fields):
    """A finished Prefill whose lease is released afterwards."""
    call = start(server, token_ids, **fields)
    try:
        yield call.finish()
    finally:
        release(server, call.admission.lease)


def pull_request(lease, /, **fields):
    return kv.PullKvRequest(**({"lease": lease.name, "generation": lease.generation,
                                "boot_id": lease.boot_id} | fields))


def open_pull(server, lease, /, timeout=60, stub=None, **fields):
    return (stub or server.handoff).PullKv(pull_request(lease, **fields), timeout=timeout)


def checked(stream, position=(0, 0, 0)):
    """The chunks of a pull; each must continue at (layer, tensor, offset) and carry its CRC32C."""
    layer, tensor, offset = position
    for chunk in stream:
        assert (chunk.layer, chunk.tensor_index, chunk.byte_offset) == (layer, tensor, offset)
        assert chunk.crc32c == google_crc32c.value(chunk.data)
        assert 0 < len(chunk.data) <= 1 << 20
        yield chunk
        offset += len(chunk.data)
        if chunk.last:
            layer, tensor, offset = (layer, 1, 0) if tensor == 0 else (layer + 1, 0, 0)


def pull(server, lease, /, first_layer=0, **fields):
    """{layer: [k bytes, v bytes]} of a whole pull."""
    stream = open_pull(server, lease, first_layer=first_layer, **fields)
    return collect(checked(stream, (first_layer, 0, 0)))


def collect(chunks, into=None):
    data = {} if into is None else into
    for chunk in chunks:
        data.setdefault(chunk.layer, [bytearray(), bytearray()])[chunk.tensor_index] += chunk.data
    return data


def arrays(data, config, tokens, kind=np.float32):
    """[(k, v)] per layer, each [kv_heads, tokens, d]."""
    shape = (config["num_key_value_heads"], tokens, config["head_dim"])
    return [tuple(np.frombuffer(bytes(x), kind).reshape(shape) for x in data[layer])
            for layer in sorted(data)]


def relative_error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)
