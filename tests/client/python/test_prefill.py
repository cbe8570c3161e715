import dataclasses
import json
import threading

import grpc
import numpy as np
import pytest

from fake_server import LAYERS, MODEL, VOCAB, Abort, Tamper, expected_layer
from prefilld import Lease, PrefilldError
from prefilld.v1 import tensor_pb2

CONSUMED, ABANDONED = 1, 2
TOKENS = list(range(9))


def check(layers):
    assert [layer.index for layer in layers] == list(range(LAYERS))
    for layer in layers:
        k, v = expected_layer(layer.index, len(TOKENS))
        np.testing.assert_array_equal(layer.k, k)
        np.testing.assert_array_equal(layer.v, v)


def test_layers_report_logits_and_release(server, client):
    seen = []
    with client.prefill(MODEL, np.array(TOKENS), method="joint", return_logits=True,
                        progress=lambda fraction, phase: seen.append((phase, fraction))) as prompt:
        layers = list(prompt)
        check(layers)
        assert [layer.density for layer in layers] == [0.25, 0.5, 0.75]
        assert prompt.logits.tolist() == list(range(VOCAB))
        assert prompt.report.density.shape == (LAYERS, 2)
        assert prompt.report.mean_captured_mass == 0.9
        assert prompt.summary.tokens == len(TOKENS)
    assert [r.reason for r in server.calls["ReleaseLease"]] == [CONSUMED]
    assert ("compute", 1.0) in seen and ("pull", 1.0) in seen


def test_layers_arrive_while_later_ones_are_still_computed(server, client):
    server.layer_gate = threading.Semaphore(1)
    with client.prefill(MODEL, TOKENS) as prompt:
        layers = iter(prompt)
        assert next(layers).index == 0  # layer 1 has no permit yet
        server.layer_gate.release(LAYERS)
        assert [layer.index for layer in layers] == [1, 2]


# A tensor is 288 bytes: 8 chunks of 40. 3: in the middle of layer 0's K. 8: where its V begins.
# 16: where layer 1 begins. 45: in the last tensor.
@pytest.mark.parametrize("after", [1, 3, 8, 16, 45])
def test_a_broken_pull_goes_on_from_the_last_byte(server, client, after):
    server.faults["PullKv"] = [Abort(grpc.StatusCode.UNAVAILABLE, after=after)]
    with client.prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
    first, second = server.calls["PullKv"]
    assert (first.first_layer, first.resume_tensor_index, first.resume_byte_offset) == (0, 0, 0)
    tensor, chunk = divmod(after, 8)
    assert (second.first_layer, second.resume_tensor_index, second.resume_byte_offset) == (
        tensor // 2, tensor % 2, 40 * chunk)


def flip(number, chunk):
    if number == 5:
        chunk.data = chunk.data[:-1] + bytes([chunk.data[-1] ^ 0x80])
    return chunk


def swap_offset(number, chunk):
    if number == 5:
        chunk.byte_offset += 40
    return chunk


def no_end_mark(number, chunk):
    if number == 7:
        chunk.last = False
    return chunk


@pytest.mark.parametrize("change, offset", [
    (flip, 200), (swap_offset, 200), (no_end_mark, 280),
    (lambda number, chunk: chunk if number < 5 else None, 200),
    (lambda number, chunk: None if number == 5 else chunk, 200),
], ids=["corrupt", "wrong offset", "no end mark", "cut short", "dropped"])
def test_a_damaged_chunk_is_pulled_again(server, client, change, offset):
    server.faults["PullKv"] = [Tamper(change)]
    with client.prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
    second = server.calls["PullKv"][1]
    assert (second.first_layer, second.resume_byte_offset) == (0, offset)


def test_a_chunk_that_is_always_damaged_ends_with_data_loss(server, client):
    server.faults["PullKv"] = [Tamper(lambda number, chunk: flip(5, chunk))] * 9
    with pytest.raises(PrefilldError) as caught:
        with client.prefill(MODEL, TOKENS) as prompt:
            list(prompt)
    assert caught.value.code is grpc.StatusCode.DATA_LOSS
    assert [r.reason for r in server.calls["ReleaseLease"]] == [ABANDONED]
    assert len(server.calls["PullKv"]) == 4


def test_a_stale_lease_is_not_retried(server, client):
    server.faults["PullKv"] = [Abort(grpc.StatusCode.FAILED_PRECONDITION)]
    with pytest.raises(PrefilldError) as caught:
        with client.prefill(MODEL, TOKENS) as prompt:
            list(prompt)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert len(server.calls["PullKv"]) == 1


def test_a_broken_event_stream_attaches_again(server, client):
    server.faults["Prefill"] = [Abort(grpc.StatusCode.UNAVAILABLE, after=1)]
    with client.prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
        assert prompt.summary.tokens == len(TOKENS)
    assert len({r.request_id for r in server.calls["Prefill"]}) == 1
    assert len(server.calls["Prefill"]) == 2


def test_a_client_that_is_closed_calls_nobody(server, client):
    with pytest.raises(ValueError, match="closed"):
        with client.prefill(MODEL, TOKENS) as prompt:
            prompt.summary
            client.close()
    with pytest.raises(ValueError, match="closed"):
        client.models()


def test_who_attaches_to_other_work_is_told_so_and_no_lease(server, client):
    """The server was started again between the two."""
    server.layer_gate = threading.Semaphore(0)
    server.faults["Prefill"] = [Abort(grpc.StatusCode.UNAVAILABLE, after=1)]
    with pytest.raises(PrefilldError) as caught:
        with client.prefill(MODEL, TOKENS, request_id="mine", timeout=30) as prompt:
            lease = prompt.lease
            server.boot_id = "another"
            list(prompt)
    server.layer_gate.release(LAYERS)
    assert caught.value.code is grpc.StatusCode.ABORTED
    assert "'mine'" in str(caught.value) and lease.name not in str(caught.value)


def test_an_error_of_the_computation_reaches_the_one_who_pulls(server, client):
    server.layer_gate = threading.Semaphore(0)  # the pull waits for a layer that never comes
    server.faults["Prefill"] = [Abort(grpc.StatusCode.INTERNAL, after=1)]
    with pytest.raises(PrefilldError) as caught:
        with client.prefill(MODEL, TOKENS, timeout=30) as prompt:
            list(prompt)
    assert caught.value.code is grpc.StatusCode.INTERNAL
    server.layer_gate.release(LAYERS)


def test_leaving_early_abandons(server, client):
    with client.prefill(MODEL, TOKENS) as prompt:
        next(iter(prompt))
    assert [r.reason for r in server.calls["ReleaseLease"]] == [ABANDONED]


def test_an_exception_abandons(server, client):
    with pytest.raises(KeyError):
        with client.prefill(MODEL, TOKENS) as prompt:
            list(prompt)
            raise KeyError
    assert [r.reason for r in server.calls["ReleaseLease"]] == [ABANDONED]


def test_another_process_can_take_the_lease(server, client):
    with client.prefill(MODEL, TOKENS) as prompt:
        text = json.dumps(dataclasses.asdict(prompt.detach()))
    assert not server.calls["ReleaseLease"]
    lease = Lease(**json.loads(text))
    check(list(client.pull(lease, MODEL)))
    client.release(lease)
    assert server.calls["PullKv"][0].boot_id == "boot"
    assert server.calls["PullKv"][0].generation == 7


def test_the_lease_is_renewed_while_it_is_pulled(server, client):
    server.ttl_s = 0.15
    server.layer_gate = threading.Semaphore(1)
    server.faults["RenewLease"] = [Abort(grpc.StatusCode.UNAVAILABLE)]  # one may fail
    with client.prefill(MODEL, TOKENS) as prompt:
        layers = iter(prompt)
        next(layers)
        for _ in range(3):
            assert server.renewed.acquire(timeout=10)
        server.layer_gate.release(LAYERS)
        list(layers)


def test_bfloat16_is_widened_unless_refused(server, client):
    server.data_type = tensor_pb2.DATA_TYPE_BF16
    with client.prefill(MODEL, TOKENS) as prompt:
        wide = list(prompt)
    with client.prefill(MODEL, TOKENS, widen=False) as prompt:
        raw = list(prompt)
    k, _ = expected_layer(2, len(TOKENS))
    truncated = (k.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(raw[2].k, truncated)
    assert wide[2].k.dtype == np.float32
    np.testing.assert_array_equal(wide[2].k.view(np.uint32) >> 16, truncated)


def test_float16_stays(server, client):
    server.data_type = tensor_pb2.DATA_TYPE_F16
    with client.prefill(MODEL, TOKENS, kv_dtype="f16") as prompt:
        layer = next(iter(prompt))
    assert layer.k.dtype == np.float16
    assert server.calls["PullKv"][0].layout.data_type == tensor_pb2.DATA_TYPE_F16


def test_asking(server, client):
    assert client.models()[0].layers == LAYERS
    assert client.negotiate(MODEL).fingerprint == "f" * 64
    assert client.sparsity_report("x").dense_fallback_heads == 0
