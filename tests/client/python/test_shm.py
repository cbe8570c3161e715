"""posix_shm: what is mapped is what was named, and everything else is refused or goes by grpc."""

import fcntl
import gc
import mmap
import os
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from fake_handout import F_ADD_SEALS, F_SEAL_SHRINK, PAGE, Handout, Memory, send
from fake_server import LAYERS, MODEL, Abort, Tamper, expected_layer, retry_info
from prefilld import PrefillClient, PrefilldError, RetryPolicy, shm
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import tensor_pb2

TOKENS = list(range(9))
PACKAGE = os.path.dirname(os.path.dirname(shm.__file__))
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
DATA_LOSS = grpc.StatusCode.DATA_LOSS
GRPC, SHM = kv.TRANSPORT_GRPC, kv.TRANSPORT_POSIX_SHM


@pytest.fixture
def server(server):
    """In the end nothing of its memory may be in use."""
    server.shm = True
    yield server
    gc.collect()  # what an exception's frames held
    assert server.handout.idle() and mappings() == 0


@pytest.fixture
def connect(server):
    """Clients of the server, by transport."""
    clients = []

    def make(transport=None):
        clients.append(PrefillClient(server.target, transport=transport,
                                     retry=RetryPolicy(attempts=3, initial_backoff=0.01)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def check(layers):
    assert [layer.index for layer in layers] == list(range(LAYERS))
    for layer in layers:
        k, v = expected_layer(layer.index, len(TOKENS))
        np.testing.assert_array_equal(layer.k, k)
        np.testing.assert_array_equal(layer.v, v)


def pulls(server):
    return [request.transport for request in server.calls["PullKv"]]


def mappings():
    """Of the fake's memory, in this process, the fake's own excluded."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        return sum(f"/memfd:shm-{os.getpid()}" in line and line.split()[1] == "r--s"
                   for line in file)


def qkv(tokens=5):
    rng = np.random.default_rng(7)
    return [rng.standard_normal((tokens, heads, 64)).astype(np.float32) for heads in (4, 2, 2)]


# --- pull


def test_layers_are_views_that_outlive_the_lease(server, client):
    with client.prefill(MODEL, TOKENS) as prompt:
        assert prompt.transport == "posix_shm"
        layers = list(prompt)
    assert not server.segments  # released
    check(layers)
    assert pulls(server) == [SHM]
    assert not layers[0].k.flags.owndata and not layers[0].k.flags.writeable
    assert layers[0].density == 0.25


def test_one_mapping_that_lives_as_long_as_its_arrays(server, client):
    with client.prefill(MODEL, TOKENS) as prompt:
        layers = list(prompt)
    assert mappings() == 1
    kept = layers[2].v[1]  # a view of a view
    del layers
    gc.collect()
    assert mappings() == 1
    np.testing.assert_array_equal(kept, expected_layer(2, len(TOKENS))[1][1])
    del kept
    gc.collect()
    assert mappings() == 0  # though `prompt` is still here


def test_the_server_knows_how_long_memory_is_in_use(server, client):
    with client.prefill(MODEL, TOKENS) as prompt:
        layers = list(prompt)
        memory, = server.segments.values()
    assert server.handout.in_use() == [memory.name]
    view = layers[0].k[1:]
    del layers
    gc.collect()
    assert server.handout.in_use() == [memory.name]
    del view
    assert server.handout.idle()


def test_copies_are_no_views(server, client):
    server.data_type = tensor_pb2.DATA_TYPE_BF16
    with client.prefill(MODEL, TOKENS) as prompt:
        layers = list(prompt)
        assert layers and server.handout.idle()


KILLED = """
import sys
from prefilld import PrefillClient
with PrefillClient(sys.argv[1]) as client, client.prefill("tiny", range(9)) as prompt:
    layers = list(prompt)
    print(prompt.transport, flush=True)
    sys.stdin.read()
"""


def test_a_client_that_is_killed_has_nothing_in_use(server):
    with subprocess.Popen([sys.executable, "-c", KILLED, server.target], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": PACKAGE}) as client:
        assert client.stdout.readline() == "posix_shm\n"
        assert len(server.handout.in_use()) == 1
        client.kill()
    assert server.handout.idle()


def test_a_lease_of_somebody_else(server, client, connect):
    lease = client.prefill(MODEL, TOKENS).detach()
    for transport in (None, "posix_shm"):
        pull = connect(transport).pull(lease, MODEL)
        assert pull.transport == "posix_shm"
        check(list(pull))
    client.release(lease)


def test_bfloat16(server, client):
    server.data_type = tensor_pb2.DATA_TYPE_BF16
    with client.prefill(MODEL, TOKENS, widen=False) as prompt:
        raw = list(prompt)
    with client.prefill(MODEL, TOKENS) as prompt:
        wide = list(prompt)
    k, _ = expected_layer(1, len(TOKENS))
    np.testing.assert_array_equal(raw[1].k, k.view(np.uint32) >> 16)
    assert raw[1].k.dtype == np.uint16 and wide[1].k.dtype == np.float32
    np.testing.assert_array_equal(wide[1].k.view(np.uint32) >> 16, raw[1].k)
    assert pulls(server) == [SHM, SHM]


# A layer is two chunks. 1: between K and V. 2: between layers. 5: before the last one.
@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_broken_pull_goes_on_from_the_next_tensor(server, client, after):
    server.faults["PullKv"] = [Abort(grpc.StatusCode.UNAVAILABLE, after=after)]
    with client.prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
        assert prompt.transport == "posix_shm"
    second = server.calls["PullKv"][1]
    assert second.transport == SHM
    assert (second.first_layer, second.resume_tensor_index, second.resume_byte_offset) == (
        after // 2, after % 2, 0)


@pytest.mark.parametrize("change", [
    lambda number, chunk: chunk if number < 3 else None,
    lambda number, chunk: None if number == 3 else chunk,
], ids=["cut short", "dropped"])
def test_a_missing_chunk_is_asked_for_again(server, client, change):
    server.faults["PullKv"] = [Tamper(change)]
    with client.prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
    second = server.calls["PullKv"][1]
    assert (second.first_layer, second.resume_tensor_index) == (1, 1)


def is_target(chunk):
    return (chunk.layer, chunk.tensor_index) == (1, 1)


def change_reference(**fields):
    """A fault's change: V of layer 1 names something else."""
    def change(number, chunk):
        if is_target(chunk):
            for name, value in fields.items():
                was = getattr(chunk.buffer, name)
                setattr(chunk.buffer, name, value(was) if callable(value) else value)
        return chunk
    return change


def without_buffer(number, chunk):
    if is_target(chunk):
        chunk.ClearField("buffer")
        chunk.data = b"x"
    return chunk


def with_data(number, chunk):
    chunk.data = b"x"
    return chunk


def without_end_mark(number, chunk):
    chunk.last = False
    return chunk


def wrong_layer(number, chunk):
    chunk.layer += 1
    return chunk


@pytest.mark.parametrize("transport", [None, "posix_shm"])
@pytest.mark.parametrize("change, message", [
    (change_reference(name="/prefilld-1"), "no name of memory"),
    (change_reference(name="a\0b"), "no name of memory"),
    (change_reference(name="a\n"), "no name of memory"),
    (change_reference(name="x" * 65), "no name of memory"),
    (change_reference(name=""), "no name of memory"),
    (change_reference(byte_length=lambda n: n - 1), "a tensor of 287 bytes"),
    (change_reference(byte_length=lambda n: n + 64), "a tensor of 352 bytes"),
    (change_reference(byte_length=0), "a tensor of 0 bytes"),
    (change_reference(byte_offset=lambda n: n + 4), "no multiple of 64"),
    (change_reference(byte_offset=1 << 20), "of memory that has"),
    (change_reference(byte_offset=2**64 - 64), "of memory that has"),
    (change_reference(byte_offset=2**64 - 256), "of memory that has"),  # the end would wrap around
    (without_buffer, "does not name"),
    (with_data, "does not name"),
    (without_end_mark, "does not name"),
    (wrong_layer, "out of order"),
])
def test_a_reference_that_cannot_be_true_is_data_loss(server, connect, transport, change, message):
    server.faults["PullKv"] = [Tamper(change)] * 9
    with pytest.raises(PrefilldError, match=message) as caught:
        with connect(transport).prefill(MODEL, TOKENS) as prompt:
            list(prompt)
    assert caught.value.code is DATA_LOSS
    assert set(pulls(server)) == {SHM}  # tried again, as for a damaged chunk, and never by grpc


# --- what is not mapped


def other_file(sealed=F_SEAL_SHRINK, size=PAGE, flags=0):
    file = os.memfd_create("other", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(file, size)
    if sealed:
        fcntl.fcntl(file, F_ADD_SEALS, sealed)
    return file


def regular_file():
    file = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(file, PAGE)
    return file


@pytest.mark.parametrize("make, said, reason", [
    (lambda: other_file(sealed=0), PAGE, "REASON_DESCRIPTOR"),
    (lambda: other_file(sealed=4), PAGE, "REASON_DESCRIPTOR"),  # it may not grow
    (lambda: other_file(), 2 * PAGE, "REASON_DESCRIPTOR"),
    (lambda: other_file(size=0), PAGE, "REASON_DESCRIPTOR"),
    (lambda: other_file(size=1 << 55), 1 << 55, "REASON_SEGMENT"),
    (regular_file, PAGE, "REASON_DESCRIPTOR"),
    (lambda: os.open("/dev/zero", os.O_RDWR), PAGE, "REASON_DESCRIPTOR"),
    (lambda: os.pipe2(os.O_CLOEXEC)[0], PAGE, "REASON_DESCRIPTOR"),
], ids=["unsealed", "sealed otherwise", "shorter", "empty", "larger than any", "a file",
        "a device", "a pipe"])
def test_what_could_be_taken_away_from_under_us_is_not_mapped(server, connect, make, said, reason):
    """Nobody can make this process read what is not there: that would end it."""
    def answer(connection, name):
        file = make()
        send(connection, said, file)
        os.close(file)

    server.handout.answer = answer
    with connect().prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
        assert prompt.transport == "grpc"
    refused, = [refusal for call in server.calls["Negotiate"] for refusal in call.refused]
    assert kv.TransportRefusal.Reason.Name(refused.reason) == reason
    with pytest.raises(PrefilldError) as caught:
        connect("posix_shm").attend(*qkv())
    assert (caught.value.code, caught.value.reason) == (FAILED_PRECONDITION, reason)
    gc.collect()


def test_memory_of_huge_pages_is_not_mapped():
    """There may be none left when one is touched."""
    try:
        file = other_file(size=2 << 20, flags=os.MFD_HUGETLB)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    with pytest.raises(PrefilldError, match="the descriptor of x"):
        shm._check(file, 2 << 20, "x")
    os.close(file)


# --- falling back, and not


def lose_segment(number, chunk):
    if is_target(chunk):
        chunk.buffer.name = "gone"
    return chunk


def test_a_segment_that_cannot_be_opened_is_pulled_by_grpc(server, connect):
    client = connect()
    server.faults["PullKv"] = [Tamper(lose_segment)]
    with client.prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
        assert prompt.transport == "grpc"
    second = server.calls["PullKv"][1]
    assert (second.transport, second.first_layer, second.resume_tensor_index) == (GRPC, 1, 0)
    with client.prefill(MODEL, TOKENS) as prompt:  # negotiated anew, and it works
        check(list(prompt))
        assert prompt.transport == "posix_shm"
    assert len(server.calls["Negotiate"]) == 2


def test_a_pinned_pull_of_a_segment_that_cannot_be_opened(server, connect):
    server.faults["PullKv"] = [Tamper(lose_segment)]
    with pytest.raises(PrefilldError, match="gives no 'gone'") as caught:
        with connect("posix_shm").prefill(MODEL, TOKENS) as prompt:
            list(prompt)
    assert caught.value.code is FAILED_PRECONDITION
    assert pulls(server) == [SHM]


def test_a_lease_whose_cache_lies_in_no_segment(server, connect):
    lease = connect("grpc").prefill(MODEL, TOKENS).detach()
    pull = connect().pull(lease, MODEL)
    check(list(pull))
    assert pull.transport == "grpc" and pulls(server) == [SHM, GRPC]
    with pytest.raises(PrefilldError, match="no segment") as caught:
        list(connect("posix_shm").pull(lease, MODEL))
    assert caught.value.code is FAILED_PRECONDITION
    assert pulls(server) == [SHM, GRPC, SHM]


@pytest.mark.parametrize("fields", [dict(retain=False), dict(kv_dtype="f16")])
def test_a_cache_that_cannot_be_mapped_is_pulled_by_grpc_at_once(server, client, fields):
    with client.prefill(MODEL, TOKENS, **fields) as prompt:
        assert prompt.transport == "grpc"
        next(iter(prompt))
    assert pulls(server) == [GRPC]


def test_a_pinned_pull_in_another_type_is_refused(server, connect):
    with pytest.raises(PrefilldError) as caught:
        with connect("posix_shm").prefill(MODEL, TOKENS, kv_dtype="f16") as prompt:
            list(prompt)
    assert caught.value.code is FAILED_PRECONDITION


def test_pinned_grpc_maps_nothing_and_asks_nothing(server, connect):
    client = connect("grpc")
    with client.prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
        assert prompt.transport == "grpc" and not server.segments
    assert client.attend(*qkv()).transport == "grpc"
    assert server.calls["Prefill"][0].destination.transport == GRPC
    assert not server.calls["Negotiate"]


@pytest.mark.parametrize("why", ["not offered", "another host"])
def test_where_posix_shm_is_not_possible(server, connect, why):
    if why == "not offered":
        server.shm = False
    else:
        server.shm_domain = shm.domain() + "0"
    with connect().prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
        assert prompt.transport == "grpc"
    assert connect().attend(*qkv()).transport == "grpc"
    pinned = connect("posix_shm")
    for call in (lambda: pinned.prefill(MODEL, TOKENS), lambda: pinned.attend(*qkv()),
                 lambda: pinned.pull(prompt.lease, MODEL), lambda: pinned.negotiate()):
        with pytest.raises(PrefilldError, match="not possible here") as caught:
            call()
        assert caught.value.code is FAILED_PRECONDITION
    assert len(server.calls["Prefill"]) == 1 and len(server.calls["Attend"]) == 1


@pytest.mark.parametrize("shm_domain", ["memfd:elsewhere", shm.domain()[len("memfd:"):] + ":26"])
def test_an_answer_for_other_memory_is_not_believed(server, client, monkeypatch, shm_domain):
    """Another host's, or a server's that names files in /dev/shm."""
    answer = kv.NegotiateResponse(transport=SHM, shm_domain=shm_domain, boot_id="boot")
    monkeypatch.setattr(client, "_negotiator", type(client._negotiator)(
        lambda request, timeout: answer, None))
    with client.prefill(MODEL, TOKENS) as prompt:
        assert prompt.transport == "grpc"


def test_a_server_that_shares_files_in_dev_shm_gets_grpc(server, connect):
    """One from before: it compares its domain with ours, and they are of different forms."""
    server.shm_domain = f"{shm.domain()[len('memfd:'):]}:{os.stat('/dev/shm').st_dev}"
    client = connect()
    with client.prefill(MODEL, TOKENS) as prompt:
        check(list(prompt))
        assert prompt.transport == "grpc"
    q, k, v = qkv()
    result = client.attend(q, k, v)
    assert result.transport == "grpc"
    np.testing.assert_array_equal(result.o, q)
    assert not server.handout.asked
    with pytest.raises(PrefilldError, match="not possible here"):
        connect("posix_shm").attend(q, k, v)


def test_a_socket_out_of_reach(server, connect):
    """Another container's: this process does without, whoever pulls the cache may not have to."""
    server.handout.path += "-not"
    client = connect()
    for _ in range(2):
        with client.prefill(MODEL, TOKENS) as prompt:
            check(list(prompt))
            assert prompt.transport == "grpc"
    assert [call.destination.transport for call in server.calls["Prefill"]] == [0, 0]
    refused, = [refusal for call in server.calls["Negotiate"] for refusal in call.refused]
    assert (refused.transport, refused.reason) == (SHM, kv.TransportRefusal.REASON_SOCKET)


def test_a_server_that_cannot_negotiate_gets_grpc(server, connect):
    unimplemented = Abort(grpc.StatusCode.UNIMPLEMENTED)
    server.faults["Negotiate"] = [unimplemented]
    assert connect().attend(*qkv()).transport == "grpc"
    server.faults["Negotiate"] = [unimplemented]
    with pytest.raises(PrefilldError, match="UNIMPLEMENTED"):
        connect("posix_shm").attend(*qkv())


def test_names_of_transports(server):
    with pytest.raises(PrefilldError, match="'rdma' is not one of grpc, posix_shm"):
        PrefillClient(server.target, transport="rdma")


# --- negotiating


def test_negotiated_once_by_many_threads(server, client):
    start = threading.Barrier(8)
    used = []

    def attend():
        start.wait()
        used.append(client.attend(*qkv()).transport)

    threads = [threading.Thread(target=attend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used == ["posix_shm"] * 8
    assert len(server.calls["Negotiate"]) == 1
    request = server.calls["Negotiate"][0]
    assert not request.transports and request.shm_domain == shm.domain()


def test_negotiated_again_with_another_server_process(server, client):
    def prefill():
        with client.prefill(MODEL, TOKENS) as prompt:
            check(list(prompt))
            return prompt.transport

    assert (prefill(), prefill()) == ("posix_shm", "posix_shm")
    assert len(server.calls["Negotiate"]) == 1
    server.boot_id, server.shm = "boot2", False  # as if started again with other flags
    assert (prefill(), prefill()) == ("grpc", "grpc")
    server.boot_id, server.shm = "boot3", True
    assert (prefill(), prefill()) == ("posix_shm", "posix_shm")
    assert len(server.calls["Negotiate"]) == 2  # "boot2" said at admission that it maps nothing
    assert pulls(server) == [SHM, SHM, GRPC, GRPC, SHM, SHM]


def test_the_answer_is_what_the_client_would_use(server, connect):
    assert connect().negotiate(MODEL).transport == SHM
    assert connect("grpc").negotiate(MODEL).transport == GRPC
    assert connect("posix_shm").negotiate(MODEL).transport == SHM


# --- attend


def test_attend(server, client):
    q, k, v = qkv(tokens=3000)
    seen = []
    result = client.attend(q, k, v, progress=lambda *step: seen.append(step))
    assert result.transport == "posix_shm"
    np.testing.assert_array_equal(result.o, q)
    assert server.uploaded == [x.tobytes() for x in (q, k, v)]
    assert server.calls["Attend"][0].transport == SHM
    assert (1.0, "upload") in seen and (1.0, "download") in seen
    result.o[:] = 0  # the caller's own


def test_attend_with_strided_and_bfloat16_arrays(server, client):
    q, k, v = qkv()
    np.testing.assert_array_equal(client.attend(q[::-1], k[:, :, ::-1], v).o, q[::-1])
    assert server.uploaded[1] == k[:, :, ::-1].tobytes()
    bits = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (q, k, v)]
    result = client.attend(*bits, dtype="bf16")
    assert result.o.dtype == np.uint16
    np.testing.assert_array_equal(result.o, bits[0])


def test_attend_goes_on_over_grpc(server, connect):
    """The server was started again without posix_shm, or its names mean nothing here."""
    client, (q, k, v) = connect(), qkv()
    assert client.attend(q, k, v).transport == "posix_shm"
    server.shm = False
    result = client.attend(q, k, v)
    assert result.transport == "grpc"
    np.testing.assert_array_equal(result.o, q)
    server.shm = True
    client = connect()

    def rename(buffers):
        for buffer in buffers:
            buffer.name = "gone"
        return buffers

    server.change_buffers = rename
    result = client.attend(q, k, v)
    assert result.transport == "grpc"
    np.testing.assert_array_equal(result.o, q)
    with pytest.raises(PrefilldError, match="gives no 'gone'") as caught:
        connect("posix_shm").attend(q, k, v)
    assert caught.value.code is FAILED_PRECONDITION


def test_attend_where_there_is_no_shared_memory(server, connect):
    """It goes on at once: the server's retry_delay is for who needs shared memory."""
    full = Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_info(3600),
                 error_details_pb2.ErrorInfo(reason="SHM_MEMORY"))
    server.faults["Attend"] = [full]
    assert connect().attend(*qkv(), timeout=60).transport == "grpc"
    server.faults["Attend"] = [Abort(grpc.StatusCode.RESOURCE_EXHAUSTED,
                                     error_details_pb2.ErrorInfo(reason="SHM_MEMORY"))]
    with pytest.raises(PrefilldError) as caught:
        connect("posix_shm").attend(*qkv())
    assert caught.value.reason == "SHM_MEMORY"


@pytest.mark.parametrize("probed", [True, False])
def test_memory_that_may_not_be_mapped_is_asked_for_once(server, connect, monkeypatch, probed):
    """A sandbox, a limit: told to the server, and not tried again with every call."""
    client, (q, k, v) = connect(), qkv()
    real, tries = mmap.mmap, []

    def forbidden(descriptor, size, *how, **options):
        tries.extend([descriptor] if how else [])  # else it is the fake server's
        if how and len(tries) > probed:
            raise PermissionError(1, "denied")
        return real(descriptor, size, *how, **options)

    monkeypatch.setattr(shm.mmap, "mmap", forbidden)
    for _ in range(3):
        assert client.attend(q, k, v).transport == "grpc"
        with client.prefill(MODEL, TOKENS) as prompt:
            check(list(prompt))
    assert [header.transport for header in server.calls["Attend"]] == (
        [SHM] * probed + [GRPC, GRPC, GRPC])
    assert {call.destination.transport for call in server.calls["Prefill"]} == {GRPC}
    refused, = [refusal for call in server.calls["Negotiate"] for refusal in call.refused]
    assert (refused.transport, refused.reason) == (SHM, kv.TransportRefusal.REASON_SEGMENT)
    now = time.monotonic()
    monkeypatch.setattr("prefilld.transport.time.monotonic", lambda: now + 60)  # it may go by now
    monkeypatch.setattr(shm.mmap, "mmap", real)
    assert client.attend(q, k, v).transport == "posix_shm"


def test_attend_is_tried_again_when_the_connection_breaks(server, client):
    server.faults["Attend"] = [Abort(grpc.StatusCode.UNAVAILABLE)]
    assert client.attend(*qkv()).transport == "posix_shm"


def grow(buffers):
    buffers[0].byte_length += 64
    return buffers


@pytest.mark.parametrize("change, message", [
    (grow, "a tensor of"),
    (lambda buffers: buffers[:2], "2 buffers for 3 tensors"),
    (lambda buffers: [], "0 buffers for 3 tensors"),
])
def test_attend_never_writes_where_it_must_not(server, client, change, message):
    server.change_buffers = change
    with pytest.raises(PrefilldError, match=message) as caught:
        client.attend(*qkv())
    assert caught.value.code is DATA_LOSS


def no_buffers(number, outputs):
    outputs.ClearField("buffers")
    return outputs


def longer(number, outputs):
    outputs.tensors[0].shape[0] += 1
    return outputs


@pytest.mark.parametrize("change, message", [(no_buffers, "0 buffers"), (longer, "a tensor of")])
def test_attend_with_outputs_that_cannot_be_true(server, client, change, message):
    server.faults["Attend"] = [Tamper(change)]
    with pytest.raises(PrefilldError, match=message) as caught:
        client.attend(*qkv())
    assert caught.value.code is DATA_LOSS


# --- Segments alone


def test_huge_shapes_do_not_overflow():
    handout = Handout()
    memory = handout.share(Memory([64]))
    reference = memory.reference(0)
    reference.byte_length = 2**40
    with pytest.raises(PrefilldError, match="of memory that has"):
        shm.Segments(handout.path).array(reference, np.dtype("<f4"), (2**20, 2**18))
    with pytest.raises(PrefilldError, match="a tensor of 64 bytes"):  # 2**66 elements
        reference.byte_length = 64
        shm.Segments(handout.path).array(reference, np.dtype("u1"), (2**33, 2**33))
    handout.close()
