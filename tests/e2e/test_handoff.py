"""Leases and pulls: resuming, freeing layer by layer, expiry, and never a stale byte."""

import threading
import time

import grpc
import pytest
from google.protobuf import duration_pb2

from e2e import checkpoints, harness, prefilling
from e2e.harness import refused
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import kv_handoff_service_pb2_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
GONE = {NOT_FOUND, FAILED_PRECONDITION}


@pytest.fixture
def cache(server, tiny):
    """A finished Prefill of 1000 tokens with its bytes."""
    with prefilling.prefilled(server, tiny.tokens(1000)) as done:
        yield done.ready, prefilling.pull(server, done.ready)


def test_negotiation_tells_what_both_can_do(server):
    answer = server.handoff.Negotiate(kv.NegotiateRequest(model="tiny"))
    assert answer.transport == kv.TRANSPORT_GRPC
    assert list(answer.layout.physical_order) == [kv.AXIS_LAYER, kv.AXIS_KV, kv.AXIS_HEAD,
                                                  kv.AXIS_TOKEN, kv.AXIS_CHANNEL]
    assert (answer.layout.num_kv_heads, answer.layout.head_dim) == (2, 64)
    assert answer.layout.rope_state.applied and answer.layout.rope_state.theta == 10000
    assert len(answer.fingerprint) == 64 and answer.boot_id and answer.server_version
    limits = answer.limits
    for field in ("max_prompt_tokens", "max_attend_bytes", "max_chunk_bytes", "max_sequences",
                  "max_waiting_jobs"):
        assert getattr(limits, field) > 0, field
    assert limits.max_lease_ttl.ToSeconds() >= limits.default_lease_ttl.ToSeconds() > 0


def test_negotiation_refuses_what_does_not_fit(server):
    with refused(FAILED_PRECONDITION):
        server.handoff.Negotiate(kv.NegotiateRequest(model="tiny", fingerprint="0" * 64))
    with refused(NOT_FOUND):
        server.handoff.Negotiate(kv.NegotiateRequest(model="other"))
    with refused(INVALID):
        server.handoff.Negotiate(kv.NegotiateRequest(transports=[1] * 9))
    layout = kv.KvLayout(physical_order=[kv.AXIS_KV, kv.AXIS_LAYER, kv.AXIS_HEAD, kv.AXIS_TOKEN,
                                         kv.AXIS_CHANNEL])
    with refused(FAILED_PRECONDITION):
        server.handoff.Negotiate(kv.NegotiateRequest(model="tiny", layout=layout))
    pinned = kv.NegotiateRequest(transports=[kv.TRANSPORT_CUDA_IPC])
    with refused({FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED}):
        server.handoff.Negotiate(pinned)  # a pinned transport never falls back silently
    several = kv.NegotiateRequest(transports=[kv.TRANSPORT_CUDA_IPC, kv.TRANSPORT_GRPC])
    assert server.handoff.Negotiate(several).transport == kv.TRANSPORT_GRPC


@pytest.mark.parametrize("layer,tensor,offset", [(0, 0, 1), (1, 0, 4096), (2, 1, 0),
                                                 (3, 1, 511_999), (3, 0, 12345)])
def test_a_broken_pull_resumes_from_a_byte(server, cache, layer, tensor, offset):
    lease, whole = cache
    stream = prefilling.open_pull(server, lease, first_layer=layer, resume_tensor_index=tensor,
                                  resume_byte_offset=offset)
    rest = prefilling.collect(prefilling.checked(stream, (layer, tensor, offset)))
    expected = {i: [bytearray(part) for part in whole[i]] for i in range(layer, 4)}
    expected[layer][tensor] = expected[layer][tensor][offset:]
    if tensor == 1:
        expected[layer][0] = bytearray()
    assert rest == expected


def test_a_range_of_layers(server, cache):
    lease, whole = cache
    assert prefilling.pull(server, lease, first_layer=1, layer_count=2) == {1: whole[1],
                                                                            2: whole[2]}


@pytest.mark.parametrize("chunk_bytes", [4096, 5000, 1 << 17])
def test_chunk_sizes(server, cache, chunk_bytes):
    lease, whole = cache
    stream = prefilling.open_pull(server, lease, chunk_bytes=chunk_bytes)
    parts = list(prefilling.checked(stream))
    assert max(len(c.data) for c in parts) <= chunk_bytes
    assert prefilling.collect(parts) == whole


def test_two_pulls_at_once_get_the_same_bytes(server, cache):
    lease, whole = cache
    results = []
    threads = [threading.Thread(target=lambda: results.append(prefilling.pull(server, lease)))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [whole] * 3


BAD_PULLS = {
    "unknown lease": (dict(lease="nobody"), NOT_FOUND, None),
    "old generation": (dict(generation=0), FAILED_PRECONDITION, None),
    "future generation": (dict(generation=2**63), FAILED_PRECONDITION, None),
    "another boot": (dict(boot_id="00000000"), FAILED_PRECONDITION, None),
    "layer past the end": (dict(first_layer=4), INVALID, "first_layer"),
    "layer 2^32-1": (dict(first_layer=2**32 - 1), INVALID, "first_layer"),
    "no layers": (dict(layer_count=0), INVALID, "layer_count"),
    "too many layers": (dict(first_layer=1, layer_count=2**32 - 1), INVALID, "layer_count"),
    "tensor 2": (dict(resume_tensor_index=2), INVALID, "resume_tensor_index"),
    "offset past the end": (dict(resume_byte_offset=512_001), INVALID, "resume_byte_offset"),
    "offset 2^64-1": (dict(resume_byte_offset=2**64 - 1), INVALID, "resume_byte_offset"),
    "tiny chunks": (dict(chunk_bytes=100), INVALID, "chunk_bytes"),
    "huge chunks": (dict(chunk_bytes=2**31), INVALID, "chunk_bytes"),
    "long lease name": (dict(lease="x" * 100_000), {INVALID, NOT_FOUND}, None),
    "transport cuda": (dict(transport=kv.TRANSPORT_CUDA_IPC), FAILED_PRECONDITION, None),
    "unknown transport": (dict(transport=42), INVALID, "transport"),
    "layout of another model": (dict(layout=kv.KvLayout(num_kv_heads=8)), FAILED_PRECONDITION,
                                None),
    "unknown dtype": (dict(layout=kv.KvLayout(data_type=42)), INVALID, "data_type"),
}


@pytest.mark.parametrize("case", BAD_PULLS)
def test_bad_pull(server, cache, case):
    lease, whole = cache
    fields, code, field = BAD_PULLS[case]
    with refused(code, field) as failure:
        list(prefilling.open_pull(server, lease, **fields))
    if failure[0].code == NOT_FOUND:
        assert failure[0].resource[0] == "lease"
    assert prefilling.pull(server, lease) == whole


def test_bad_releases_and_renewals(server, cache):
    lease, whole = cache
    def renew(**fields):
        server.handoff.RenewLease(kv.RenewLeaseRequest(
            **({"lease": lease.name, "generation": lease.generation} | fields)))
    def release(**fields):
        server.handoff.ReleaseLease(kv.ReleaseLeaseRequest(
            **({"lease": lease.name, "generation": lease.generation,
                "reason": kv.RELEASE_REASON_CONSUMED} | fields)))
    for call in (renew, release):
        with refused(NOT_FOUND):
            call(lease="nobody")
        with refused(FAILED_PRECONDITION):
            call(generation=lease.generation + 1)
    with refused(INVALID, "reason"):
        release(reason=kv.RELEASE_REASON_UNSPECIFIED)
    with refused(INVALID, "reason"):
        release(reason=77)
    for ttl in (duration_pb2.Duration(), duration_pb2.Duration(seconds=-1),
                duration_pb2.Duration(seconds=10**9)):
        with refused(INVALID, "ttl"):
            renew(ttl=ttl)
    assert prefilling.pull(server, lease) == whole


@pytest.mark.parametrize("reason", [kv.RELEASE_REASON_CONSUMED, kv.RELEASE_REASON_ABANDONED])
def test_a_released_lease_is_gone_and_its_blocks_are_free(server, tiny, reason):
    free = server.metric("prefilld_kv_blocks", state="free")
    call = prefilling.start(server, tiny.tokens(300)).finish()
    assert server.metric("prefilld_leases_active") == 1
    assert server.metric("prefilld_kv_blocks", state="free") < free
    prefilling.release(server, call.ready, reason)
    harness.eventually(lambda: server.metric("prefilld_kv_blocks", state="free") == free)
    with refused(GONE):
        list(prefilling.open_pull(server, call.ready))
    with refused(GONE):
        prefilling.release(server, call.ready)


def test_abandoning_a_lease_cancels_its_computation(server, tiny):
    call = prefilling.start(server, tiny.tokens(6000))
    prefilling.release(server, call.admission.lease, kv.RELEASE_REASON_ABANDONED)
    with refused({grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}):
        call.finish()
    harness.eventually(lambda: server.metric("prefilld_requests_running") == 0)


def test_an_expired_lease_frees_its_blocks(server, tiny):
    expired = server.metric("prefilld_leases_ended_total", reason="expired")
    call = prefilling.start(server, tiny.tokens(300), lease_ttl=.3).finish()
    assert call.ready.ttl.ToMilliseconds() <= 300
    harness.eventually(
        lambda: server.metric("prefilld_leases_ended_total", reason="expired") == expired + 1)
    with refused(GONE):
        list(prefilling.open_pull(server, call.ready))


def test_renewing_keeps_a_lease(server, tiny):
    call = prefilling.start(server, tiny.tokens(300), lease_ttl=.6).finish()
    for _ in range(5):
        time.sleep(.3)  # the lease's own time is what is tested
        renewed = server.handoff.RenewLease(kv.RenewLeaseRequest(
            lease=call.ready.name, generation=call.ready.generation))
        assert renewed.name == call.ready.name
        assert renewed.ttl.ToMilliseconds() == pytest.approx(600, abs=60)
    assert len(prefilling.pull(server, call.ready)) == 4
    prefilling.release(server, call.ready)


@pytest.fixture
def slow_pull(server):
    """slow_pull(lease) -> (stream, its first chunk): a pull that its reader holds up, on its own
    connection, whose window holds far less than the cache."""
    channels = []
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]

    def start(lease):
        channels.append(server.new_channel(narrow))
        stub = kv_handoff_service_pb2_grpc.KvHandoffServiceStub(channels[-1])
        stream = prefilling.open_pull(server, lease, stub=stub)
        return stream, next(iter(stream))

    yield start
    for channel in channels:
        channel.close()


@pytest.mark.parametrize("ending", ["release", "expiry"])
def test_blocks_are_freed_only_after_the_running_pull(server, tiny, slow_pull, ending):
    free = server.metric("prefilld_kv_blocks", state="free")
    call = prefilling.start(server, tiny.tokens(4000), lease_ttl=1).finish()
    whole = prefilling.pull(server, call.ready)
    stream, first = slow_pull(call.ready)
    if ending == "release":
        assert prefilling.release(server, call.ready).running_transfers == 1
    else:
        expired = server.metric("prefilld_leases_ended_total", reason="expired")
        harness.eventually(
            lambda: server.metric("prefilld_leases_ended_total", reason="expired") > expired)
    with refused(GONE):  # no new pull ...
        list(prefilling.open_pull(server, call.ready))
    assert server.metric("prefilld_kv_blocks", state="free") < free
    data = {0: [bytearray(first.data), bytearray()]}
    prefilling.collect(prefilling.checked(stream, (0, 0, len(first.data))), into=data)
    assert data == whole  # ... and the running one gets every byte
    harness.eventually(lambda: server.metric("prefilld_kv_blocks", state="free") == free)


def test_a_puller_that_dies_lets_the_blocks_go(server, tiny, slow_pull):
    free = server.metric("prefilld_kv_blocks", state="free")
    call = prefilling.start(server, tiny.tokens(4000)).finish()
    stream, _ = slow_pull(call.ready)
    prefilling.release(server, call.ready)
    assert server.metric("prefilld_kv_blocks", state="free") < free
    stream.cancel()
    harness.eventually(lambda: server.metric("prefilld_kv_blocks", state="free") == free)


def test_generations_differ(server, tiny):
    seen = set()
    for _ in range(3):
        with prefilling.prefilled(server, tiny.tokens(10)) as done:
            seen.add((done.ready.name, done.ready.generation))
    assert len(seen) == 3


# --- retain = false: a cache larger than the memory ---------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return checkpoints.Checkpoint.create(tmp_path_factory.mktemp("deep") / "deep",
                                         num_hidden_layers=10)


def test_a_cache_larger_than_the_memory_leaves_layer_by_layer(start_server, deep):
    tokens = 2000  # 2 MB a layer, 20 MB in all
    assert deep.kv_bytes(tokens) > 16 << 20
    with start_server("--kv_memory=16MiB", models=[("tiny", deep.directory)]) as server:
        before = server.footprint()
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "token_ids") as failure:
            prefilling.start(server, deep.tokens(tokens), retain=True)
        assert "with destination.retain = false up to 8192" in failure[0].violation
        call = prefilling.start(server, deep.tokens(tokens), retain=False)
        data = prefilling.pull(server, call.admission.lease)
        call.finish()
        assert sum(len(x) for layer in data.values() for x in layer) == deep.kv_bytes(tokens)
        with refused(GONE):  # every layer has been freed
            list(prefilling.open_pull(server, call.admission.lease))
        prefilling.release(server, call.admission.lease)
        harness.eventually(lambda: server.footprint() == before)


def test_the_bytes_of_a_cache_that_is_not_retained_are_the_same(server, tiny):
    ids = tiny.tokens(900)
    with prefilling.prefilled(server, ids) as done:
        retained = prefilling.pull(server, done.ready)
    call = prefilling.start(server, ids, retain=False)
    passing = prefilling.pull(server, call.admission.lease)
    call.finish()
    prefilling.release(server, call.admission.lease)
    assert passing == retained


def test_nobody_pulls_what_is_not_retained_and_others_are_still_served(server, tiny):
    waiting = prefilling.start(server, tiny.tokens(600), retain=False)
    with prefilling.prefilled(server, tiny.tokens(100)) as done:
        assert done.summary
    prefilling.release(server, waiting.admission.lease, kv.RELEASE_REASON_ABANDONED)
    with refused({grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}):
        waiting.finish()


def test_full_memory_is_refused_with_a_hint_and_frees_up(start_server, tiny):
    with start_server("--kv_memory=8MiB", models=[("tiny", tiny.directory)]) as server:
        first = prefilling.start(server, tiny.tokens(1200)).finish()
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED) as failure:
            prefilling.start(server, tiny.tokens(1200))
        assert failure[0].retry_after > 0
        prefilling.release(server, first.ready)
        with prefilling.prefilled(server, tiny.tokens(1200)) as done:
            assert done.summary
