"""posix_shm: the bytes of gRPC, only for who shares the memory, and nothing left of it."""

import contextlib
import fcntl
import gc
import mmap
import os
import resource
import shlex
import signal
import subprocess
import sys

import grpc
import numpy as np
import pytest

from e2e import attending, harness, mapping, prefilling
from e2e.harness import refused
from e2e.mapping import SHM
from e2e.test_startup import start_fails
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import prefill_service_pb2 as pb
from prefilld.v1 import tensor_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DATA_LOSS = grpc.StatusCode.DATA_LOSS
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
ABANDONED = kv.RELEASE_REASON_ABANDONED
MODELS = {path.parent.name: path.parent
          for path in (harness.ROOT / "tests/fixtures/models").glob("*/config.json")}


@pytest.fixture
def server(server):
    """Nor may a segment be left."""
    harness.eventually(lambda: mapping.segments(server) == 0)
    yield server
    gc.collect()  # what an exception's frames held
    harness.eventually(lambda: mapping.segments(server) == 0, message="no segment")


@pytest.fixture
def own_server(start_server, tiny):
    with start_server("--kv_memory=64MiB", models=[("tiny", tiny.directory)]) as own:
        yield own


@pytest.fixture
def mortal(start_server, tiny):
    """A server that the test itself ends."""
    started = []

    def start(*flags):
        started.append(start_server("--kv_memory=64MiB", *flags, models=[("tiny", tiny.directory)]))
        return started[-1]

    yield start
    for each in started:
        each.channel.close()
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.fixture
def cache(server, tiny):
    """A finished Prefill of 1000 tokens in a segment, with its bytes as gRPC has them."""
    call = mapping.start(server, tiny.tokens(1000)).finish()
    yield call.ready, prefilling.pull(server, call.ready)
    prefilling.release(server, call.ready)


# --- negotiation ----------------------------------------------------------------------------------


def negotiate(server, *transports, shm_domain=""):
    return server.handoff.Negotiate(
        kv.NegotiateRequest(transports=transports, shm_domain=shm_domain), timeout=10)


def test_the_domain_is_what_the_contract_says(server):
    assert negotiate(server).shm_domain == mapping.domain()


@pytest.mark.parametrize("transports,here,elsewhere", [
    ([], SHM, kv.TRANSPORT_GRPC),
    ([kv.TRANSPORT_UNSPECIFIED], SHM, kv.TRANSPORT_GRPC),
    ([kv.TRANSPORT_GRPC, SHM], kv.TRANSPORT_GRPC, kv.TRANSPORT_GRPC),
    ([SHM, kv.TRANSPORT_GRPC], SHM, kv.TRANSPORT_GRPC),
    ([kv.TRANSPORT_CUDA_IPC, SHM], SHM, FAILED_PRECONDITION),
    ([kv.TRANSPORT_CUDA_IPC, kv.TRANSPORT_UNSPECIFIED], SHM, kv.TRANSPORT_GRPC),
    ([SHM], SHM, FAILED_PRECONDITION),
    ([kv.TRANSPORT_CUDA_IPC], FAILED_PRECONDITION, FAILED_PRECONDITION),
])
def test_the_first_possible_transport_is_agreed_on(server, transports, here, elsewhere):
    for domain, expected in ((mapping.domain(), here), ("", elsewhere), ("another:1", elsewhere)):
        if isinstance(expected, grpc.StatusCode):
            with refused(expected):
                negotiate(server, *transports, shm_domain=domain)
        else:
            assert negotiate(server, *transports, shm_domain=domain).transport == expected


def test_a_refused_domain_is_told_with_the_servers(server):
    with refused(FAILED_PRECONDITION) as failure:
        negotiate(server, SHM, shm_domain="another:1")
    assert "another:1" in failure[0].message and mapping.domain() in failure[0].message
    with refused(FAILED_PRECONDITION):
        negotiate(server, SHM, shm_domain="x" * 100_000)
    with refused(INVALID, r"transports\[0\]"):
        negotiate(server, 42, shm_domain=mapping.domain())


def test_a_server_that_does_not_offer_it(start_server, tiny):
    with start_server("--transports=grpc", models=[("tiny", tiny.directory)]) as server:
        answer = negotiate(server, shm_domain=mapping.domain())
        assert answer.transport == kv.TRANSPORT_GRPC
        assert answer.shm_domain == answer.memory_socket == ""
        with refused(FAILED_PRECONDITION) as failure:
            negotiate(server, SHM, shm_domain=mapping.domain())
        assert "not offered" in failure[0].message
        with refused(FAILED_PRECONDITION):
            mapping.start(server, [1, 2, 3])
        with refused(FAILED_PRECONDITION):
            mapping.attend(server, *attending.small(tokens=10))
        with prefilling.prefilled(server, [1, 2, 3]) as done:
            assert done.admission.transport == kv.TRANSPORT_GRPC
            with refused(FAILED_PRECONDITION):
                list(prefilling.open_pull(server, done.ready, transport=SHM))
        samples = server.metrics()
        offered = {dict(labels)["transport"] for name, labels in samples
                   if name == "prefilld_handoff_transport_info"}
        assert offered == {"grpc"}


# --- prefill and pull -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
def test_mapped_bytes_are_those_that_grpc_sends(server, tiny, tokens):
    call = mapping.start(server, tiny.tokens(tokens)).finish()
    assert call.admission.transport == SHM
    mapped = mapping.pull(server, call.ready)
    assert mapping.plain(mapped) == prefilling.pull(server, call.ready)
    prefilling.release(server, call.ready)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_model_in_its_own_dtype(server, model):
    ids = list(range(60)) * 4
    call = mapping.start(server, ids, model=model).finish()
    mapped = mapping.plain(mapping.pull(server, call.ready))
    assert mapped == prefilling.pull(server, call.ready)
    plain = mapping.start(server, ids, model=model, transport=kv.TRANSPORT_GRPC).finish()
    assert plain.admission.transport == kv.TRANSPORT_GRPC
    assert mapped == prefilling.pull(server, plain.ready), "the same wherever the cache lies"
    for each in (call, plain):
        prefilling.release(server, each.ready)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_and_its_conversions(start_server, tmp_path, dtype):
    from e2e import checkpoints
    checkpoint = checkpoints.Checkpoint.create(tmp_path / dtype, torch_dtype=dtype)
    with start_server("--kv_memory=64MiB", models=[("tiny", checkpoint.directory)]) as server:
        call = mapping.start(server, checkpoint.tokens(700)).finish()
        mapped = mapping.pull(server, call.ready)
        assert mapping.plain(mapped) == prefilling.pull(server, call.ready)
        own = server.handoff.Negotiate(kv.NegotiateRequest(model="tiny")).layout.data_type
        for other in attending.DTYPES.values():
            layout = kv.KvLayout(data_type=other)
            if other == own:
                assert mapping.plain(mapping.pull(server, call.ready, layout=layout)) == \
                    mapping.plain(mapped)
                continue
            with refused(FAILED_PRECONDITION):
                mapping.pull(server, call.ready, layout=layout)
            prefilling.pull(server, call.ready, layout=layout)  # gRPC converts
        prefilling.release(server, call.ready)


def test_a_pull_follows_the_computation(server, tiny):
    call = mapping.start(server, tiny.tokens(5000))
    stream = prefilling.open_pull(server, call.admission.lease, transport=SHM)
    first = next(iter(stream))
    early = mapping.open_buffer(server, first.buffer).tobytes()
    assert server.metric("prefilld_requests_running") == 1, "it came before the end"
    assert [(c.layer, c.tensor_index) for c in stream] == [
        (layer, tensor) for layer in range(4) for tensor in (0, 1)][1:]
    call.finish()
    assert early == prefilling.pull(server, call.ready)[0][0]
    prefilling.release(server, call.ready)


@pytest.mark.parametrize("layer,tensor,at_end", [(0, 0, True), (1, 1, False), (2, 1, True),
                                                 (3, 1, True), (3, 0, False)])
def test_a_broken_pull_resumes_at_a_tensor(server, cache, layer, tensor, at_end):
    lease, whole = cache
    offset = len(whole[0][0]) if at_end else 0
    chunks = list(prefilling.open_pull(server, lease, transport=SHM, first_layer=layer,
                                       resume_tensor_index=tensor, resume_byte_offset=offset))
    begin = 2 * layer + tensor + at_end
    assert [2 * c.layer + c.tensor_index for c in chunks] == list(range(begin, 8))
    for chunk in chunks:
        mapped = mapping.open_buffer(server, chunk.buffer)
        assert mapped.tobytes() == whole[chunk.layer][chunk.tensor_index]


def test_a_range_of_layers(server, cache):
    lease, whole = cache
    mapped = mapping.plain(mapping.pull(server, lease, first_layer=1, layer_count=2))
    assert mapped == {1: whole[1], 2: whole[2]}


def test_a_caller_that_leaves_the_transport_open_can_pull_both_ways(server, tiny):
    with prefilling.prefilled(server, tiny.tokens(300)) as done:
        assert done.admission.transport == SHM
        assert mapping.plain(mapping.pull(server, done.ready)) == \
            prefilling.pull(server, done.ready)


def test_the_mapping_stays_as_it_was_after_the_release(server, tiny):
    call = mapping.start(server, tiny.tokens(800)).finish()
    mapped, whole = mapping.pull(server, call.ready), prefilling.pull(server, call.ready)
    name = next(iter(prefilling.open_pull(server, call.ready, transport=SHM))).buffer.name
    prefilling.release(server, call.ready)
    with pytest.raises(FileNotFoundError, match="no memory has this name"):
        mapping.open_segment(server, name)
    for _ in range(3):  # its memory is used by nobody else
        with prefilling.prefilled(server, tiny.tokens(800, seed=1)):
            pass
    assert mapping.plain(mapped) == whole


def test_each_cache_has_memory_of_its_own(server, tiny):
    calls = [mapping.start(server, tiny.tokens(100 + i)).finish() for i in range(3)]
    names = {c.buffer.name for call in calls
             for c in prefilling.open_pull(server, call.ready, transport=SHM)}
    assert len(names) == 3 and all(len(name) == 32 for name in names)
    assert {call.admission.buffers[0].name for call in calls} == names
    assert mapping.segments(server) == 3
    for call in calls:
        prefilling.release(server, call.ready)


def test_its_memory_counts_until_its_last_reader_has_hung_up(own_server, tiny):
    before = own_server.footprint()
    call = mapping.start(own_server, tiny.tokens(1000)).finish()
    mapped = mapping.pull(own_server, call.ready)
    blocks = own_server.metric("prefilld_kv_blocks", state="leased")
    prefilling.release(own_server, call.ready)
    assert mapping.segments(own_server) == 1
    assert own_server.metric("prefilld_kv_blocks", state="leased") == blocks == 32
    mapped.clear()
    harness.eventually(lambda: own_server.footprint() == before)
    assert mapping.segments(own_server) == 0


# --- whoever has its descriptor -------------------------------------------------------------------

ADD_SEALS, GET_SEALS = 1033, 1034
SHRINK, GROW, SEAL = 2, 4, 1


def descriptors_of(server, name):
    """As they come from the socket, as /proc has them, and as its own process can open them."""
    connection, received, *_ = mapping.receive(server, name)
    yield received
    again = os.open(f"/proc/self/fd/{received}", os.O_RDWR)
    yield again
    here = os.fstat(received)
    for number in os.listdir(f"/proc/{server.process.pid}/fd"):
        path = f"/proc/{server.process.pid}/fd/{number}"
        with contextlib.suppress(OSError):
            there = os.stat(path)
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                servers = os.open(path, os.O_RDWR)
                yield servers
                os.close(servers)
    for each in (received, again):
        os.close(each)
    connection.close()


@pytest.mark.parametrize("what", ["cache", "attend"])
def test_nobody_can_truncate_it(server, tiny, qkv, what):
    """A page that is taken away under those who have it mapped would end them: SIGBUS."""
    if what == "cache":
        call = mapping.start(server, tiny.tokens(1000)).finish()
        name = call.admission.buffers[0].name
    else:
        call = admitted(server, qkv)
        name = call.name
    tried = 0
    for descriptor in descriptors_of(server, name):
        size = os.fstat(descriptor).st_size
        assert fcntl.fcntl(descriptor, GET_SEALS) & (SHRINK | GROW | SEAL) == SHRINK | GROW | SEAL
        for wanted in (0, 1, size - 1, size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, wanted)
            with pytest.raises(PermissionError):
                os.truncate(f"/proc/self/fd/{descriptor}", wanted)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, ADD_SEALS, 8)
        tried += 1
    assert tried == 3, "the server's own too"
    if what == "cache":
        assert len(prefilling.pull(server, call.ready)) == 4
        prefilling.release(server, call.ready)
    else:
        call.write(qkv)
        call.written()
        expected, _ = attending.attend(server.prefill, *qkv)
        np.testing.assert_array_equal(call.finish()[0]["o"], expected["o"])


def test_nobody_can_write_a_cache(server, tiny):
    call = mapping.start(server, tiny.tokens(1000)).finish()
    whole = prefilling.pull(server, call.ready)
    for descriptor in descriptors_of(server, call.admission.buffers[0].name):
        for write in (lambda: os.pwrite(descriptor, b"x", 0),
                      lambda: mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)):
            with pytest.raises(PermissionError):
                write()
    assert prefilling.pull(server, call.ready) == whole
    prefilling.release(server, call.ready)


BAD_PULLS = {
    "within a tensor": (dict(resume_byte_offset=64), INVALID, "resume_byte_offset"),
    "past the end": (dict(resume_byte_offset=512_001), INVALID, "resume_byte_offset"),
    "another dtype": (dict(layout=kv.KvLayout(data_type=tensor_pb2.DATA_TYPE_BF16)),
                      FAILED_PRECONDITION, None),
    "unknown lease": (dict(lease="nobody"), grpc.StatusCode.NOT_FOUND, None),
    "another boot": (dict(boot_id="0" * 32), FAILED_PRECONDITION, None),
    "layer past the end": (dict(first_layer=4), INVALID, "first_layer"),
}


@pytest.mark.parametrize("case", BAD_PULLS)
def test_bad_pull(server, cache, case):
    lease, whole = cache
    fields, code, field = BAD_PULLS[case]
    before = server.metrics()
    with refused(code, field):
        list(prefilling.open_pull(server, lease, **({"transport": SHM} | fields)))
    assert harness.moved(before, server.metrics(), "prefilld_handoff_failures_total",
                         transport="posix_shm", reason="refused") == 1
    assert mapping.plain(mapping.pull(server, lease)) == whole


def test_what_lies_in_no_segment_cannot_be_mapped(server, tiny):
    call = mapping.start(server, tiny.tokens(300), transport=kv.TRANSPORT_GRPC).finish()
    with refused(FAILED_PRECONDITION) as failure:
        mapping.pull(server, call.ready)
    assert "TRANSPORT_POSIX_SHM" in failure[0].message
    assert len(prefilling.pull(server, call.ready)) == 4
    prefilling.release(server, call.ready)


def test_what_passes_through_is_not_mapped(server, tiny):
    with refused(INVALID, "destination.retain"):
        mapping.start(server, tiny.tokens(300), retain=False)
    call = prefilling.start(server, tiny.tokens(300), retain=False)
    assert call.admission.transport == kv.TRANSPORT_GRPC
    assert len(prefilling.pull(server, call.admission.lease)) == 4
    call.finish()
    prefilling.release(server, call.admission.lease)


def test_the_metrics_tell_the_transports_apart(server, tiny):
    before = server.metrics()
    with prefilling.prefilled(server, tiny.tokens(500)) as done:
        mapping.pull(server, done.ready)
    harness.eventually(lambda: harness.moved(
        before, server.metrics(), "prefilld_handoff_duration_seconds_count",
        transport="posix_shm") == 1)
    after = server.metrics()
    assert harness.moved(before, after, "prefilld_handoff_bytes_total", transport="posix_shm",
                         direction="out") == tiny.kv_bytes(500)
    assert harness.moved(before, after, "prefilld_handoff_bytes_total", transport="grpc") == 0
    assert server.metric("prefilld_handoff_transport_info", transport="posix_shm") == 1


def test_blocks_count_for_what_lies_in_segments(start_server, tiny):
    with start_server("--kv_memory=8MiB", models=[("tiny", tiny.directory)]) as server:
        free = server.metric("prefilld_kv_blocks", state="free")
        first = mapping.start(server, tiny.tokens(1200)).finish()
        assert server.metric("prefilld_kv_blocks", state="free") == free - 40
        assert server.metric("prefilld_kv_blocks", state="leased") == 40
        with refused(RESOURCE_EXHAUSTED):
            mapping.start(server, tiny.tokens(1200))
        assert mapping.segments(server) == 1
        prefilling.release(server, first.ready)
        assert server.metric("prefilld_kv_blocks", state="free") == free


# --- no memory ------------------------------------------------------------------------------------


def test_without_room_a_pinned_caller_is_refused_and_others_are_served(own_server, tiny):
    """A limit on the size of files makes every segment too large."""
    limit = resource.prlimit(own_server.process.pid, resource.RLIMIT_FSIZE)
    negotiate(own_server)  # the connection stays
    before = own_server.metrics()
    with harness.leaves_nothing_behind(own_server):
        resource.prlimit(own_server.process.pid, resource.RLIMIT_FSIZE, (1 << 19, limit[1]))
        with refused(RESOURCE_EXHAUSTED) as failure:
            mapping.start(own_server, tiny.tokens(1000))
        assert failure[0].retry_after > 0 and str(tiny.kv_bytes(1000)) in failure[0].message
        with refused(RESOURCE_EXHAUSTED) as failure:
            mapping.attend(own_server, *attending.small(tokens=2000))
        assert failure[0].retry_after > 0
        assert harness.moved(before, own_server.metrics(), "prefilld_requests_rejected_total",
                             reason="shm_memory") == 2
        with prefilling.prefilled(own_server, tiny.tokens(1000)) as done:
            assert done.admission.transport == kv.TRANSPORT_GRPC
            assert len(prefilling.pull(own_server, done.ready)) == 4
        attending.attend(own_server.prefill, *attending.small(tokens=2000))
        assert mapping.segments(own_server) == 0
        resource.prlimit(own_server.process.pid, resource.RLIMIT_FSIZE, limit)
        with prefilling.prefilled(own_server, tiny.tokens(1000)) as done:
            assert done.admission.transport == SHM


@pytest.fixture
def own_shm(tmp_path, monkeypatch):
    """own_shm(options): servers started from now on see a tmpfs of their own as /dev/shm."""
    def mount(options):
        inner = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", inner, "sh"]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("may not mount")
        script = tmp_path / "prefilld"
        script.write_text("#!/bin/sh\nexec " + shlex.join([*command, str(harness.PREFILLD)])
                          + ' "$@"\n')
        script.chmod(0o755)
        monkeypatch.setattr(harness, "PREFILLD", script)
    return mount


@pytest.mark.parametrize("options", ["ro", "size=1m"])
def test_dev_shm_does_not_matter(start_server, tiny, own_shm, options):
    """In a container it has 64 MiB, and is another one."""
    own_shm(options)
    with start_server("--kv_memory=64MiB", models=[("tiny", tiny.directory)]) as server:
        assert [line for line in server.log() if line["level"] == "warning"] == []
        agreed = server.handoff.Negotiate(kv.NegotiateRequest(model="tiny",
                                                              shm_domain=mapping.domain()))
        assert (agreed.transport, agreed.limits.max_prompt_tokens) == (SHM, 16384)
        call = mapping.start(server, tiny.tokens(2000)).finish()
        assert mapping.plain(mapping.pull(server, call.ready)) == \
            prefilling.pull(server, call.ready)
        prefilling.release(server, call.ready)
        arrays = attending.small(tokens=2000)
        expected, _ = attending.attend(server.prefill, *arrays)
        np.testing.assert_array_equal(mapping.attend(server, *arrays)[0]["o"], expected["o"])


# --- callers from before --------------------------------------------------------------------------


def test_a_caller_that_maps_files_in_dev_shm_is_served_by_grpc(server, tiny, qkv):
    """It tells a domain of another form, and what it released it claims to have unmapped."""
    boot = mapping.domain().removeprefix("memfd:")
    domain = f"{boot}:{os.stat('/dev/shm').st_dev}"
    for transports in ([], [kv.TRANSPORT_UNSPECIFIED], [SHM, kv.TRANSPORT_GRPC]):
        assert negotiate(server, *transports, shm_domain=domain).transport == kv.TRANSPORT_GRPC
    with refused(FAILED_PRECONDITION) as failure:
        negotiate(server, SHM, shm_domain=domain)
    assert domain in failure[0].message and mapping.domain() in failure[0].message
    call = prefilling.start(server, tiny.tokens(300)).finish()  # the transport left open
    assert len(prefilling.pull(server, call.ready)) == 4
    release = kv.ReleaseLeaseRequest(lease=call.ready.name, generation=call.ready.generation,
                                     reason=kv.RELEASE_REASON_CONSUMED)
    release.MergeFromString(b"\x20\x01")  # field 4, true
    server.handoff.ReleaseLease(release, timeout=10)
    harness.eventually(lambda: mapping.segments(server) == 0)


# --- the socket -----------------------------------------------------------------------------------


def test_the_socket_may_be_a_path(start_server, tiny, tmp_path):
    path = tmp_path / "memory"
    models = [("tiny", tiny.directory)]
    with start_server(f"--memory_socket={path}", models=models) as server:
        assert negotiate(server).memory_socket == str(path)
        assert path.stat().st_mode & 0o777 == 0o600
        call = mapping.start(server, tiny.tokens(300)).finish()
        assert mapping.plain(mapping.pull(server, call.ready)) == \
            prefilling.pull(server, call.ready)
        prefilling.release(server, call.ready)
        start_fails(f"--memory_socket={path}", words=("--memory_socket", "by a living server"))
    assert not path.exists()
    start_fails("--memory_socket=relative", words=("--memory_socket", "'relative'"))
    with start_server("--transports=grpc", f"--memory_socket={path}", models=models) as server:
        assert not path.exists(), "nothing is mapped"


# --- attend ---------------------------------------------------------------------------------------


def assert_same(server, arrays, dtype="F32", **fields):
    sent, summary = attending.attend(server.prefill, *arrays, dtype, **fields)
    mapped, other = mapping.attend(server, *arrays, dtype, **fields)
    assert list(mapped) == list(sent)
    for name, x in sent.items():
        assert mapped[name].shape == x.shape and mapped[name].dtype == x.dtype
        assert mapped[name].tobytes() == x.tobytes(), name
    assert (other.bytes_in, other.bytes_out) == (summary.bytes_in, summary.bytes_out)
    return mapped


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("method", ["dense", "flexprefill", "joint"])
def test_attend_is_the_same_bit_for_bit(server, dtype, method):
    assert_same(server, attending.small(tokens=1100), dtype, return_lse=True,
                return_block_index=True, sparsity=attending.policy(method))


def test_attend_over_ragged_sequences(server):
    cu = [0, 1, 300, 777, 1000]
    outputs = assert_same(server, attending.small(tokens=1000), cu_seqlens_q=cu, cu_seqlens_k=cu,
                          return_lse=True, return_block_index=True,
                          sparsity=attending.policy("joint"))
    assert outputs["pattern"].shape == (4, 4)


def test_attend_of_one_token_and_without_extras(server):
    assert list(assert_same(server, attending.small(tokens=1))) == ["o"]


def test_tensors_lie_in_their_announced_order(server):
    q, k, v = attending.small(tokens=130)
    head = attending.header(q, k, v)
    order = [head.tensors[i] for i in (2, 0, 1)]
    del head.tensors[:]
    head.tensors.extend(order)
    call = mapping.Attend(server)
    admission = call.admit(head)
    assert admission.upload_credit_bytes == sum(b.byte_length for b in admission.buffers)
    call.write((v, q, k))
    call.written()
    expected, _ = attending.attend(server.prefill, q, k, v)
    np.testing.assert_array_equal(call.finish()[0]["o"], expected["o"])


def admitted(server, qkv, **fields):
    call = mapping.Attend(server)
    call.admit(attending.header(*qkv, **fields))
    return call


def test_outputs_stay_as_they_were_after_the_call(server, qkv):
    call = admitted(server, qkv, return_lse=True)
    call.write(qkv)
    call.written()
    reply = call.receive()
    views = [call.view(b) for b in reply.outputs.buffers]
    assert call.receive().WhichOneof("part") == "summary"
    assert list(call.stream) == []
    call.half_close()
    with pytest.raises(FileNotFoundError):
        mapping.open_segment(server, call.name)
    expected, _ = attending.attend(server.prefill, *qkv, return_lse=True)
    assert [v.tobytes() for v in views] == [expected[n].tobytes() for n in ("o", "lse")]


def test_chunks_and_shared_memory_do_not_mix(server, qkv):
    call = admitted(server, qkv)
    call.send(attending.chunks(qkv)[0])
    with refused(DATA_LOSS):
        call.receive()
    call.half_close()
    call = attending.Call(server.prefill)
    assert call.admit(attending.header(*qkv)).transport == kv.TRANSPORT_GRPC
    call.send(pb.AttendRequest(written=pb.TensorsWritten()))
    with refused(DATA_LOSS):
        call.receive()
    call.half_close()
    call = admitted(server, qkv)
    call.send(attending.header(*qkv))
    with refused(DATA_LOSS):
        call.receive()
    call.half_close()
    call = attending.Call(server.prefill)
    call.admit(attending.header(*qkv))
    chunk = attending.chunks(qkv)[0]
    chunk.buffer.name = "x"
    call.send(chunk)
    with refused(DATA_LOSS):
        call.receive()
    call.half_close()


def test_written_twice_is_data_loss_or_comes_too_late(server, qkv):
    call = admitted(server, qkv)
    call.write(qkv)
    call.written()
    call.written()
    try:
        call.finish()
    except grpc.RpcError as error:
        assert harness.Failure(error).code == DATA_LOSS


def test_a_side_that_closes_before_it_has_written_is_data_loss(server, qkv):
    call = admitted(server, qkv)
    call.half_close()
    with refused(DATA_LOSS):
        call.receive()


@pytest.mark.parametrize("change,code", [
    (lambda head: head.buffers.add(name="x", byte_length=1), UNIMPLEMENTED),
    (lambda head: setattr(head, "transport", kv.TRANSPORT_CUDA_IPC), FAILED_PRECONDITION),
    (lambda head: setattr(head, "transport", 42), INVALID),
])
def test_headers_that_are_refused(server, qkv, change, code):
    head = attending.header(*qkv, transport=SHM)
    change(head)
    call = attending.Call(server.prefill)
    call.send(head)
    with refused(code):
        call.receive()
    call.half_close()
    assert mapping.segments(server) == 0


def test_an_attend_that_is_never_written_is_given_up(mortal, qkv):
    server = mortal("--upload_timeout=300ms")
    call = admitted(server, qkv)
    assert mapping.segments(server) == 1
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        call.receive()
    call.half_close()
    call.mapped = None
    harness.eventually(lambda: mapping.segments(server) == 0)


@pytest.mark.parametrize("written", [False, True])
def test_a_cancelled_attend_leaves_nothing(server, written):
    arrays = attending.small(tokens=4000)
    call = admitted(server, arrays)
    if written:
        call.write(arrays)
        call.written()
    assert mapping.segments(server) == 1
    call.cancel()
    del call
    harness.eventually(lambda: mapping.segments(server) == 0)


def test_memory_of_attends_is_bounded(start_server):
    arrays = attending.small(tokens=1000)
    with start_server("--attend_memory=4MiB") as server:
        call = admitted(server, arrays)
        with refused(RESOURCE_EXHAUSTED) as failure:
            admitted(server, arrays)
        assert failure[0].retry_after > 0
        assert mapping.segments(server) == 1, "a refused call takes nothing"
        call.cancel()
        harness.eventually(lambda: server.metric("prefilld_requests_uploading") == 0)
        with refused(RESOURCE_EXHAUSTED):
            admitted(server, arrays)  # it counts as long as somebody has it mapped
        del call
        harness.eventually(lambda: mapping.segments(server) == 0)
        admitted(server, arrays).cancel()


def test_a_caller_that_changes_its_tensors_meanwhile_spoils_only_its_own_result(server):
    """What is read from a segment is no index and no size."""
    arrays = attending.small(tokens=2500)
    for seed, method in enumerate(("dense", "flexprefill", "joint")):
        rng = np.random.default_rng(seed)
        call = admitted(server, arrays, return_block_index=True, return_lse=True,
                        sparsity=attending.policy(method))
        call.write(arrays)
        views = [call.view(b) for b in call.admission.buffers]
        noise = [rng.integers(0, 256, len(view), np.uint8) for view in views]
        call.written()
        with np.errstate(all="ignore"):
            for _ in range(20):
                for view, data in zip(views, noise):
                    view[:] = data
                    view[:] = 255  # NaN
        outputs, _ = call.finish()
        counts, index = outputs["block_count"], outputs["block_index"]
        assert (counts >= 0).all() and (index < 20).all() and (index >= -1).all()
    attending.serves_a_good_request(server)


# --- nothing is left ------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["release", "expiry", "cancel"])
def test_the_segment_of_a_cache_ends_with_it(server, tiny, ending):
    tokens = 6000 if ending == "cancel" else 300
    call = mapping.start(server, tiny.tokens(tokens), lease_ttl=1)
    assert mapping.segments(server) == 1
    if ending == "cancel":
        call.stream.cancel()
    else:
        call.finish()
        if ending == "release":
            prefilling.release(server, call.ready)
    harness.eventually(lambda: mapping.segments(server) == 0)


KILLED_CLIENT = """
import sys
sys.path[:0] = sys.argv[1:3]
from e2e import attending, harness, mapping, prefilling
import grpc
class Server: pass
server = Server()
channel = grpc.insecure_channel(sys.argv[3])
server.prefill = harness.prefill_service_pb2_grpc.PrefillServiceStub(channel)
server.handoff = harness.kv_handoff_service_pb2_grpc.KvHandoffServiceStub(channel)
call = mapping.start(server, [i % 300 for i in range(5000)], lease_ttl=1)
stream = prefilling.open_pull(server, call.admission.lease, transport=mapping.SHM)
kept = mapping.open_buffer(server, next(iter(stream)).buffer)
attend = mapping.Attend(server)
attend.admit(attending.header(*attending.small(tokens=3000)))
print("mapped", flush=True)
sys.stdin.read()
"""


def test_a_client_killed_while_it_maps_leaves_nothing(own_server):
    before = own_server.footprint()
    client = subprocess.Popen(
        [sys.executable, "-c", KILLED_CLIENT, str(harness.ROOT / "tests"),
         str(harness.ROOT / "client/python"), own_server.target],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdout.readline() == b"mapped\n"
    assert mapping.segments(own_server) == 2
    client.kill()
    client.wait()
    harness.eventually(lambda: mapping.segments(own_server) == 0, timeout=15)
    harness.eventually(lambda: own_server.footprint() == before)


@pytest.mark.parametrize("how", ["drained", "killed by a second signal", "killed"])
def test_what_is_mapped_stays_though_its_server_ends(mortal, tiny, how):
    server = mortal("--drain_timeout=1s" if how == "drained" else "--drain_timeout=60s")
    cache = mapping.start(server, tiny.tokens(300), lease_ttl=60).finish()
    mapped, whole = mapping.pull(server, cache.ready), prefilling.pull(server, cache.ready)
    call = admitted(server, attending.small(tokens=300))
    if how == "killed":
        server.process.kill()
        server.process.wait()
    else:
        server.process.send_signal(signal.SIGTERM)
        if how != "drained":
            harness.eventually(lambda: server.metric("prefilld_ready") == 0)
            server.process.send_signal(signal.SIGTERM)
        assert server.wait() == (0 if how == "drained" else 1)
    assert mapping.plain(mapped) == whole
    call.half_close()


def test_the_log_tells_the_transport(mortal, tiny):
    server = mortal()
    with prefilling.prefilled(server, tiny.tokens(100)) as done:
        mapping.pull(server, done.ready)
    mapping.attend(server, *attending.small(tokens=10))
    events = ("prefill_admitted", "pull_finished", "attend_admitted")
    harness.eventually(lambda: {line["event"] for line in server.log()} >= set(events))
    for line in server.log():
        if line["event"] in events:
            assert line["transport"] == "posix_shm", line
        if line["event"] == "serving":
            assert line["shm_domain"] == mapping.domain() and line["memory_socket"][0] == "@"
