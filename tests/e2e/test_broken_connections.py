"""Connections that break, and who comes again: nothing is lost, nothing is computed twice."""

import time

import grpc
import numpy as np
import pytest

import prefilld
from e2e import attending, harness, prefilling, proxy
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import prefill_service_pb2_grpc


@pytest.fixture
def cutting(server):
    with proxy.Proxy(server.target) as made:
        yield made


@pytest.fixture
def stub(cutting):
    """A Prefill stub whose connection `cutting` can break."""
    with grpc.insecure_channel(cutting.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield prefill_service_pb2_grpc.PrefillServiceStub(channel)


def running(server):
    return server.metric("prefilld_requests_running")


def broken(call):
    with pytest.raises(grpc.RpcError):
        call.finish()


def test_a_prefill_outlives_its_connection(server, tiny, cutting, stub):
    before = server.metric("prefilld_tokens_total")
    ids = tiny.tokens(6000)
    first = prefilling.start(server, ids, stub=stub, request_id="outlives")
    harness.eventually(lambda: running(server) == 1)
    cutting.cut()
    broken(first)
    again = prefilling.start(server, ids, request_id="outlives")
    assert again.admission.lease.generation == first.admission.lease.generation
    again.finish()
    assert server.metric("prefilld_tokens_total") == before + 6000, "computed once"
    prefilling.release(server, again.ready)


def test_a_prefill_that_nobody_comes_back_for_ends_with_its_lease(server, tiny, cutting, stub):
    before = server.metric("prefilld_tokens_total")
    call = prefilling.start(server, tiny.tokens(12000), stub=stub, lease_ttl=.2)
    harness.eventually(lambda: running(server) == 1)
    cutting.cut()
    broken(call)
    harness.eventually(lambda: running(server) == 0)
    assert server.metric("prefilld_leases_active") == 0
    assert server.metric("prefilld_tokens_total") == before


def test_a_pull_keeps_what_nobody_follows(server, tiny, cutting, stub):
    call = prefilling.start(server, tiny.tokens(6000), stub=stub, lease_ttl=.3)
    pulling = server.handoff.PullKv(prefilling.pull_request(call.admission.lease), timeout=60)
    cutting.cut()
    broken(call)
    assert sum(1 for _ in pulling) > 0
    prefilling.release(server, call.admission.lease)


def test_a_renewed_lease_outlives_a_call_that_is_taken_back(server, tiny):
    call = prefilling.start(server, tiny.tokens(4000))
    lease = call.admission.lease
    server.handoff.RenewLease(kv.RenewLeaseRequest(lease=lease.name, generation=lease.generation),
                              timeout=10)
    call.stream.cancel()
    time.sleep(.2)
    assert sum(1 for _ in server.handoff.PullKv(prefilling.pull_request(lease), timeout=60)) > 0
    prefilling.release(server, lease)


def test_detach_and_close(server, tiny):
    with prefilld.PrefillClient(server.target) as client:
        lease = client.prefill("tiny", tiny.tokens(4000), method="dense").detach()
    with prefilld.PrefillClient(server.target) as other:
        assert len(list(other.pull(lease, "tiny"))) == 4
        other.release(lease)


def test_cuts_while_it_is_pulled(server, tiny, cutting):
    """The client's own word: each cut is resumed, the bytes are the same."""
    ids = tiny.tokens(3000)
    before = server.metric("prefilld_tokens_total")
    with prefilld.PrefillClient(server.target, transport="grpc") as direct:
        with direct.prefill("tiny", ids, method="dense") as prompt:
            expected = list(prompt)
    with prefilld.PrefillClient(cutting.target, transport="grpc") as client:
        with client.prefill("tiny", ids, method="dense") as prompt:
            pulled = []
            for layer in prompt:
                pulled.append(layer)
                cutting.cut()
    for ours, theirs in zip(pulled, expected, strict=True):
        np.testing.assert_array_equal(ours.k, theirs.k)
        np.testing.assert_array_equal(ours.v, theirs.v)
    assert server.metric("prefilld_tokens_total") == before + 6000, "each was computed once"


def test_an_attend_behind_a_dead_connection_gives_way(server, cutting):
    """Its caller comes again with the same request_id, before anybody notices that it was cut."""
    q, k, v = attending.small(tokens=64)
    with grpc.insecure_channel(cutting.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        dead = attending.Call(prefill_service_pb2_grpc.PrefillServiceStub(channel))
        dead.admit(attending.header(q, k, v, request_id="dead"))
        cutting.half_open()
        outputs, _ = attending.attend(server.prefill, q, k, v, request_id="dead")
        assert np.isfinite(outputs["o"]).all()
        dead.half_close()
    harness.eventually(lambda: server.metric("prefilld_upload_bytes_inflight") == 0)


def test_the_lease_of_a_broken_prefill_can_be_released_at_once(server, tiny, cutting, stub):
    call = prefilling.start(server, tiny.tokens(12000), stub=stub)
    harness.eventually(lambda: running(server) == 1)
    cutting.cut()
    broken(call)
    prefilling.release(server, call.admission.lease, kv.RELEASE_REASON_ABANDONED)
    harness.eventually(lambda: running(server) == 0)
