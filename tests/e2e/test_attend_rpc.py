"""Attend over the wire: order of messages, optional outputs, and every way to spoil a header."""

import math

import grpc
import numpy as np
import pytest

from e2e import attending, harness
from e2e.harness import refused
from prefilld.v1 import prefill_service_pb2 as pb
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import prefill_service_pb2_grpc, sparsity_pb2, tensor_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


def test_messages_come_in_the_order_of_the_contract(server, qkv):
    call = attending.Call(server.prefill)
    admission = call.admit(attending.header(*qkv, request_id="order-1", return_lse=True,
                                            return_block_index=True))
    assert admission.request_id == "order-1"
    assert admission.upload_credit_bytes == sum(x.nbytes for x in qkv)
    for chunk in attending.chunks(qkv):
        call.send(chunk)
    call.half_close()
    parts = [reply.WhichOneof("part") for reply in call.stream]
    assert parts[0] == "outputs" and parts[-1] == "summary"
    assert set(parts[1:-1]) == {"chunk"}
    assert [s.name for s in admission.outputs] == ["o", "lse", "block_count", "block_index",
                                                   "pattern", "captured_mass"]


def test_only_the_outputs_asked_for_come_back(server, qkv):
    assert set(attending.attend(server.prefill, *qkv)[0]) == {"o"}
    assert set(attending.attend(server.prefill, *qkv, return_lse=True)[0]) == {"o", "lse"}
    outputs, _ = attending.attend(server.prefill, *qkv, return_block_index=True)
    assert set(outputs) == {"o", "block_count", "block_index", "pattern", "captured_mass"}


def test_tensors_may_be_announced_in_any_order(server, qkv):
    q, k, v = qkv
    expected, _ = attending.attend(server.prefill, q, k, v)
    call = attending.Call(server.prefill)
    head = attending.header(q, k, v)
    reordered = [head.tensors[2], head.tensors[0], head.tensors[1]]
    del head.tensors[:]
    head.tensors.extend(reordered)
    call.admit(head)
    for chunk in attending.chunks((v, q, k)):
        call.send(chunk)
    outputs, _ = call.finish()
    np.testing.assert_array_equal(outputs["o"], expected["o"])


@pytest.mark.parametrize("size", [1, 4095, 1 << 16, 1 << 20])
def test_any_chunk_size_gives_the_same_output(server, size):
    arrays = attending.small(tokens=5 if size == 1 else 300, q_heads=1, kv_heads=1)
    whole, _ = attending.attend(server.prefill, *arrays)
    parts, _ = attending.attend(server.prefill, *arrays, chunk_bytes=size)
    np.testing.assert_array_equal(whole["o"], parts["o"])


def test_the_summary_says_what_was_done(server, qkv):
    _, summary = attending.attend(server.prefill, *qkv, request_id="sum-1",
                                  sparsity=attending.policy("joint"))
    assert summary.request_id == "sum-1"
    assert summary.tokens == 300
    assert summary.bytes_in == sum(x.nbytes for x in qkv)
    assert summary.bytes_out == qkv[0].nbytes
    assert summary.attention.ToNanoseconds() > 0 and summary.upload.ToNanoseconds() > 0
    report = summary.sparsity
    assert (report.layers, report.heads) == (1, 4)
    assert len(report.density_u16) == 8 and list(report.pattern_u8) == [3] * 4
    assert report.captured_mass_measured and len(report.captured_mass_u16) == 8
    assert report.mean_density == pytest.approx(1) and report.mean_captured_mass > .999
    assert server.prefill.GetSparsityReport(
        pb.GetSparsityReportRequest(request_id="sum-1")) == report


def test_an_unspecified_method_runs_and_reports_what_it_chose(server, qkv):
    outputs, summary = attending.attend(server.prefill, *qkv,
                                        sparsity=sparsity_pb2.SparsityPolicy())
    dense, _ = attending.attend(server.prefill, *qkv)
    np.testing.assert_allclose(outputs["o"], dense["o"], atol=1e-5)
    assert set(summary.sparsity.pattern_u8) <= {0, 3}
    if 0 in summary.sparsity.pattern_u8:
        assert "below_crossover" in summary.sparsity.reasons
        assert summary.sparsity.dense_fallback_heads == 4


# --- headers that must be refused -----------------------------------------------------------------


def spoil_shape(tensor, *shape):
    def spoil(head):
        head.tensors[tensor].shape[:] = shape
    return spoil


def spoil_policy(**fields):
    def spoil(head):
        for name, value in fields.items():
            setattr(head.sparsity, name, value)
    return spoil


def spoil_field(**fields):
    def spoil(head):
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(head, name).extend(value)
            else:
                setattr(head, name, value)
    return spoil


def spoil_tensors(change):
    return lambda head: change(head.tensors)


def set_tensor(index, **fields):
    def spoil(head):
        for name, value in fields.items():
            setattr(head.tensors[index], name, value)
    return spoil


def every_dtype(value):
    def spoil(head):
        for tensor in head.tensors:
            tensor.data_type = value
    return spoil


def cu(q, k):
    return spoil_field(cu_seqlens_q=q, cu_seqlens_k=k)


INVALID_HEADERS = {
    "q of two dimensions": (spoil_shape(0, 300, 256), "tensors"),
    "q of five dimensions": (spoil_shape(0, 300, 4, 64, 1, 1), "tensors"),
    "q without shape": (spoil_shape(0), "tensors"),
    "zero tokens": (spoil_shape(0, 0, 4, 64), "tensors"),
    "negative tokens": (spoil_shape(0, -1, 4, 64), "tensors"),
    "negative heads": (spoil_shape(0, 300, -4, 64), "tensors"),
    "two negative dimensions": (spoil_shape(0, -300, -4, 64), "tensors"),
    "2^62 tokens": (spoil_shape(0, 2**62, 4, 64), "tensors"),
    "2^62 heads": (spoil_shape(0, 300, 2**62, 64), "tensors"),
    "product overflows to small": (spoil_shape(0, 2**32, 2**32, 64), "tensors"),
    "more bytes than the limit": (spoil_shape(0, 2**40, 4, 64), "tensors"),
    "smallest int64": (spoil_shape(0, -2**63, 4, 64), "tensors"),
    "k of other tokens than v": (spoil_shape(1, 299, 2, 64), "tensors"),
    "k of other head_dim than q": (spoil_shape(1, 300, 2, 128), "tensors"),
    "heads not a multiple of kv heads": (spoil_shape(0, 300, 3, 64), "tensors"),
    "more queries than keys": (spoil_shape(0, 301, 4, 64), "tensors"),
    "no dtype": (set_tensor(0, data_type=0), "tensors"),
    "unknown dtype": (set_tensor(0, data_type=99), "tensors"),
    "dtypes differ": (set_tensor(1, data_type=tensor_pb2.DATA_TYPE_BF16), "tensors"),
    "integer tensors": (every_dtype(tensor_pb2.DATA_TYPE_I32), "tensors"),
    "two tensors": (spoil_tensors(lambda t: t.pop()), "tensors"),
    "no tensors": (spoil_tensors(lambda t: t.__delitem__(slice(None))), "tensors"),
    "q twice": (set_tensor(1, name="q"), "tensors"),
    "a fourth tensor": (spoil_tensors(lambda t: t.add(name="x", data_type=1, shape=[1])),
                        "tensors"),
    "ten thousand tensors": (spoil_tensors(lambda t: t.extend([t[0]] * 10000)), "tensors"),
    "long tensor name": (set_tensor(0, name="q" * 5000), "tensors"),
    "gamma NaN": (spoil_policy(gamma=math.nan), r"sparsity\.gamma"),
    "gamma 0": (spoil_policy(gamma=0), r"sparsity\.gamma"),
    "gamma 1": (spoil_policy(gamma=1), r"sparsity\.gamma"),
    "gamma 2": (spoil_policy(gamma=2), r"sparsity\.gamma"),
    "gamma -inf": (spoil_policy(gamma=-math.inf), r"sparsity\.gamma"),
    "tau NaN": (spoil_policy(tau=math.nan), r"sparsity\.tau"),
    "tau -1": (spoil_policy(tau=-1), r"sparsity\.tau"),
    "tau 2": (spoil_policy(tau=2), r"sparsity\.tau"),
    "max_budget 0": (spoil_policy(max_budget_tokens=0), r"sparsity\.max_budget"),
    "block_size 0": (spoil_policy(block_size=0), r"sparsity\.block_size"),
    "block_size 100": (spoil_policy(block_size=100), r"sparsity\.block_size"),
    "block_size 2^31": (spoil_policy(block_size=2**31), r"sparsity\.block_size"),
    "min_captured_mass NaN": (spoil_policy(min_captured_mass=math.nan),
                              r"sparsity\.min_captured_mass"),
    "min_captured_mass 1.5": (spoil_policy(min_captured_mass=1.5),
                              r"sparsity\.min_captured_mass"),
    "unknown method": (spoil_policy(method=77), r"sparsity\.method"),
    "unknown report level": (spoil_policy(report_level=9), r"sparsity\.report_level"),
    "softmax_scale 0": (spoil_field(softmax_scale=0), "softmax_scale"),
    "softmax_scale -1": (spoil_field(softmax_scale=-1), "softmax_scale"),
    "softmax_scale NaN": (spoil_field(softmax_scale=math.nan), "softmax_scale"),
    "softmax_scale inf": (spoil_field(softmax_scale=math.inf), "softmax_scale"),
    "priority 101": (spoil_field(priority=101), "priority"),
    "priority -101": (spoil_field(priority=-101), "priority"),
    "long request_id": (spoil_field(request_id="x" * 65), "request_id"),
    "request_id with a space": (spoil_field(request_id="a b"), "request_id"),
    "request_id with a quote": (spoil_field(request_id='a"b'), "request_id"),
    "cu_seqlens only for q": (cu([0, 300], []), "cu_seqlens"),
    "cu_seqlens from 1": (cu([1, 300], [0, 300]), "cu_seqlens"),
    "cu_seqlens past the end": (cu([0, 301], [0, 300]), "cu_seqlens"),
    "cu_seqlens short of the end": (cu([0, 299], [0, 300]), "cu_seqlens"),
    "cu_seqlens falls": (cu([0, 200, 100, 300], [0, 200, 250, 300]), "cu_seqlens"),
    "cu_seqlens with an empty sequence": (cu([0, 100, 100, 300], [0, 100, 200, 300]),
                                          "cu_seqlens"),
    "cu_seqlens of one number": (cu([0], [0]), "cu_seqlens"),
    "a sequence with more queries than keys": (cu([0, 200, 300], [0, 100, 300]), "cu_seqlens"),
    "numbers of sequences differ": (cu([0, 100, 300], [0, 300]), "cu_seqlens"),
    "2^32-1": (cu([0, 2**32 - 1], [0, 300]), "cu_seqlens"),
    "a hundred thousand sequences": (cu([0] * 100000, [0] * 100000), "cu_seqlens"),
}


@pytest.mark.parametrize("case", INVALID_HEADERS)
def test_invalid_header(server, qkv, case):
    spoil, field = INVALID_HEADERS[case]
    head = attending.header(*qkv)
    spoil(head)
    call = attending.Call(server.prefill)
    call.send(head)
    with refused(INVALID, field):
        call.receive()
    call.half_close()
    attending.serves_a_good_request(server)


def test_too_many_sequences(server):
    arrays = attending.small(tokens=1100, q_heads=1, kv_heads=1)
    head = attending.header(*arrays, cu_seqlens_q=range(1101), cu_seqlens_k=range(1101))
    call = attending.Call(server.prefill)
    call.send(head)
    with refused(INVALID, "cu_seqlens"):
        call.receive()
    call.half_close()


UNSERVED_HEADERS = {
    "head_dim 80": spoil_tensors(lambda t: [spoil_last(s, 80) for s in t]),
    "method flashprefill": spoil_policy(method=sparsity_pb2.METHOD_FLASHPREFILL),
    "method minference": spoil_policy(method=sparsity_pb2.METHOD_MINFERENCE),
    "method streaming": spoil_policy(method=sparsity_pb2.METHOD_STREAMING),
    "head overrides": lambda head: head.sparsity.head_overrides.add(head=0, gamma=.5),
    "alpha": spoil_policy(alpha=.1),
    "mean correction": spoil_policy(mean_correction=True),
    "buffers": lambda head: head.buffers.add(name="q", byte_length=1),
}


def spoil_last(tensor, value):
    tensor.shape[2] = value


@pytest.mark.parametrize("case", UNSERVED_HEADERS)
def test_legal_but_unserved(server, qkv, case):
    head = attending.header(*qkv)
    UNSERVED_HEADERS[case](head)
    call = attending.Call(server.prefill)
    call.send(head)
    with refused(UNIMPLEMENTED) as failure:
        call.receive()
    if case == "head_dim 80":  # what was asked, and what exists
        assert all(word in failure[0].message for word in ("80", "64", "96", "128", "256"))
    call.half_close()
    attending.serves_a_good_request(server)


def test_flexprefill_needs_as_many_queries_as_keys(server):
    arrays = attending.small(tokens=100, prefix=50)
    call = attending.Call(server.prefill)
    call.send(attending.header(*arrays, sparsity=attending.policy("flexprefill")))
    with refused(UNIMPLEMENTED) as failure:
        call.receive()
    assert "flexprefill" in failure[0].message
    call.half_close()


def test_values_that_the_method_does_not_use_are_ignored(server, qkv):
    outputs, _ = attending.attend(
        server.prefill, *qkv, sparsity=attending.policy("dense", gamma=.5, min_budget_tokens=10**9))
    np.testing.assert_array_equal(outputs["o"], attending.attend(server.prefill, *qkv)[0]["o"])


# --- resources ------------------------------------------------------------------------------------


def test_upload_credit_counts_down_and_a_cancelled_upload_gives_it_back(server, qkv):
    size = sum(x.nbytes for x in qkv)
    call = attending.Call(server.prefill)
    call.admit(attending.header(*qkv))
    assert server.metric("prefilld_upload_bytes_inflight") == size
    parts = attending.chunks(qkv, size=1 << 14)
    for chunk in parts[:4]:
        call.send(chunk)
    harness.eventually(
        lambda: server.metric("prefilld_upload_bytes_inflight") == size - 4 * (1 << 14))
    call.cancel()
    harness.eventually(lambda: server.metric("prefilld_upload_bytes_inflight") == 0)


def test_what_was_cancelled_while_its_outputs_went_out_holds_nothing(start_server):
    arrays = attending.small(tokens=4000)  # outputs of four chunks, 12 MiB in all
    with start_server("--attend_memory=40MiB", "--drain_timeout=10s") as server, \
            server.new_channel([("grpc.http2.bdp_probe", 0)]) as channel:  # takes 64 KiB ahead
        stub = prefill_service_pb2_grpc.PrefillServiceStub(channel)
        for count in range(1, 6):
            call = attending.Call(stub)
            call.admit(attending.header(*arrays))
            for chunk in attending.chunks(arrays):
                call.send(chunk)
            assert call.receive().WhichOneof("part") == "outputs"
            assert call.receive().WhichOneof("part") == "chunk"
            call.cancel()
            harness.eventually(lambda: server.metric(
                "prefilld_requests_total", method="Attend", code="CANCELLED") == count)
    drained = [line for line in server.log() if line["event"] == "drained"]
    assert drained and drained[0]["calls_ended"], drained


def test_requests_beyond_the_limits_are_refused_before_a_byte_is_sent(server):
    limits = server.handoff.Negotiate(kv.NegotiateRequest()).limits
    tokens = limits.max_attend_bytes // (4 * 64 * 4) + 1
    head = attending.header(*attending.small(tokens=1))
    for tensor in head.tensors:
        tensor.shape[0] = tokens
    call = attending.Call(server.prefill)
    call.send(head)
    with refused({INVALID, grpc.StatusCode.RESOURCE_EXHAUSTED}):
        call.receive()
    call.half_close()
