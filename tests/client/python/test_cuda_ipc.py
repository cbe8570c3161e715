"""cuda_ipc: attend's tensors and caches in the server's device memory, only where the caller's GPU
reaches it, mapped as long as a tensor is left. torch, the driver and the memory are fakes; socket
and descriptors are real."""

import gc
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

import fake_torch
from fake_handout import send
from fake_server import LAYERS, MODEL, Abort, Tamper, expected_layer, retry_info
from google.rpc import error_details_pb2
from prefilld import PrefillClient, PrefilldError, RetryPolicy, cuda_ipc, transport
from prefilld.v1 import kv_handoff_service_pb2 as kv

FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
DATA_LOSS = grpc.StatusCode.DATA_LOSS
GRPC, SHM, IPC = kv.TRANSPORT_GRPC, kv.TRANSPORT_POSIX_SHM, kv.TRANSPORT_CUDA_IPC


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    fake = fake_torch.Driver()
    monkeypatch.setitem(sys.modules, "torch", fake_torch.module(fake))
    monkeypatch.setattr(cuda_ipc, "driver", lambda: fake)
    yield fake
    gc.collect()  # what an exception's frames held
    assert fake.mapped == []


@pytest.fixture
def server(server):
    server.gpu = "GPU-1"
    yield server
    gc.collect()
    assert server.handout.idle()


@pytest.fixture
def connect(server):
    clients = []

    def make(transport=None):
        clients.append(PrefillClient(server.target, transport=transport,
                                     retry=RetryPolicy(attempts=3, initial_backoff=0.01)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def tensors(gpu=1, bf16=True, tokens=5):
    rng = np.random.default_rng(7)
    arrays = [rng.integers(-9, 9, (tokens, heads, 64)).astype(np.int16) for heads in (4, 2, 2)]
    device = fake_torch.Device(f"cuda:{gpu}" if gpu is not None else "cpu")
    return [fake_torch.Tensor(array if bf16 else array.astype(np.float16), device, bf16)
            for array in arrays]


def transports(server):
    return [header.transport for header in server.calls["Attend"]]


def test_what_lies_on_the_servers_gpu_stays_there(server, connect):
    for pinned in (None, "cuda_ipc"):
        q, k, v = tensors()
        seen = []
        result = connect(pinned).attend(q, k, v, progress=lambda *step: seen.append(step))
        assert result.transport == "cuda_ipc"
        assert result.o.dtype == "bfloat16" and result.o.device == q.device
        assert server.handout.idle()
        for memory in server.handout.memories.values():
            memory.array[:] = 0xCD  # it is somebody else's now
        np.testing.assert_array_equal(result.o.array, q.array)
        assert result.block_count.dtype == "int32"
        assert result.block_count.array.tolist() == [0, 1, 2]
        assert server.uploaded == [x.array.tobytes() for x in (q, k, v)]
        assert (1.0, "upload") in seen and (1.0, "download") in seen
    assert transports(server) == [IPC, IPC]


def test_strided_tensors_and_other_types(server, connect):
    q, k, v = tensors(bf16=False)
    turned = fake_torch.Tensor(q.array[::-1], q.device)
    result = connect().attend(turned, k, v)
    np.testing.assert_array_equal(result.o.array, q.array[::-1])
    assert result.o.dtype == "float16"
    with pytest.raises(PrefilldError, match="float64"):
        connect().attend(fake_torch.Tensor(q.array.astype(np.float64), q.device), k, v)
    with pytest.raises(PrefilldError, match="does not hold dtype 'bf16'"):
        connect().attend(q, k, v, dtype="bf16")
    with pytest.raises(PrefilldError, match="neither all numpy arrays nor all torch tensors"):
        connect().attend(q, k.array, v)


@pytest.mark.parametrize("gpu", [0, None])
@pytest.mark.parametrize("shm", [False, True])
def test_tensors_elsewhere_go_another_way_and_come_back(server, connect, gpu, shm):
    server.shm = shm
    q, k, v = tensors(gpu)
    result = connect().attend(q, k, v)
    assert result.transport == ("posix_shm" if shm else "grpc")
    assert result.o.dtype == "bfloat16" and result.o.device == q.device
    np.testing.assert_array_equal(result.o.array, q.array)
    assert transports(server) == [SHM if shm else GRPC]


def test_tensors_of_two_gpus_are_sent(server, connect):
    q, k, v = tensors()
    assert connect().attend(q, *tensors(gpu=0)[1:]).transport == "grpc"
    del k, v


def test_numpy_arrays_ask_for_no_gpu(server, connect):
    q, k, v = (np.ones((3, 2, 64), np.float32) for _ in range(3))
    assert connect().attend(q, k, v).transport == "grpc"
    assert not server.calls["Negotiate"][0].device_uuids


def test_negotiated_once_for_each_gpu(server, connect):
    client = connect()
    for gpu in (1, 0, 1, 0, None):
        client.attend(*tensors(gpu))
    asked = [list(request.device_uuids) for request in server.calls["Negotiate"]]
    assert asked == [["GPU-1"], ["GPU-0"], []]
    assert server.calls["Negotiate"][0].cuda_ipc_domain == cuda_ipc.domain()
    assert server.handout.asked.count("probe") == 1
    assert transports(server) == [IPC, GRPC, IPC, GRPC, GRPC]


@pytest.mark.parametrize("change", [
    {"cuda_ipc_domain": "elsewhere"}, {"device_uuids": ["GPU-0"]}, {"device_uuids": []}])
def test_another_host_or_gpu_is_not_believed(server, connect, change):
    fields = {"transport": IPC, "cuda_ipc_domain": cuda_ipc.domain(), "device_uuids": ["GPU-1"],
              "memory_socket": server.handout.path} | change
    client = connect()
    client._negotiator = type(client._negotiator)(
        lambda request, timeout: kv.NegotiateResponse(**fields), None)
    assert client.attend(*tensors()).transport == "grpc"
    assert not server.handout.asked


def test_pinned_and_not_possible(server, connect):
    client = connect("cuda_ipc")
    with pytest.raises(PrefilldError, match="not possible here") as caught:
        client.attend(*tensors(gpu=0))
    assert caught.value.code is FAILED_PRECONDITION
    arrays = [np.ones((3, 2, 64), np.float32) for _ in range(3)]
    for call in (lambda: client.attend(*arrays), lambda: client.attend(*tensors(gpu=None)),
                 lambda: client.prefill(MODEL, [1, 2]),
                 lambda: client.prefill(MODEL, [1, 2], device="cpu")):
        with pytest.raises(PrefilldError, match="the GPU that device= names") as caught:
            call()
        assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED
    assert not server.calls["Attend"] and not server.calls["Prefill"]
    assert client.negotiate().transport == IPC


# --- what is tried, and told


def refusal(reason="REASON_DRIVER"):
    return PrefilldError(FAILED_PRECONDITION, "cannot be mapped here", reason=reason)


def told(server):
    """(asked for a GPU, reasons) of each Negotiate."""
    return [(bool(request.device_uuids), [kv.TransportRefusal.Reason.Name(one.reason)
                                          for one in request.refused])
            for request in server.calls["Negotiate"]]


@pytest.mark.parametrize("reason", ["REASON_DRIVER", "REASON_DESCRIPTOR"])
@pytest.mark.parametrize("shm", [False, True])
def test_what_cannot_be_mapped_is_known_before_a_prompt(server, connect, driver, reason, shm):
    server.shm = shm
    driver.refuse = [refusal(reason)]
    client = connect()
    for _ in range(2):
        with client.prefill(MODEL, [1, 2, 3], device="cuda:1") as call:
            assert call.transport == ("posix_shm" if shm else "grpc")
            assert all(isinstance(layer.k, np.ndarray) for layer in call)
    assert [r.destination.transport for r in server.calls["Prefill"]] == [0, 0]
    assert told(server)[:2] == [(True, []), (True, [reason])]
    assert len(told(server)) == 2 + shm  # without a GPU, for the pull
    probes = [name for name in server.handout.asked if name.startswith("probe")]
    assert probes == ["probe"] + ["probe_shm"] * shm


def test_shared_memory_in_its_place_may_fail_too(server, connect, driver):
    """Both are forgotten, and asked for again."""
    server.shm = True
    client = connect()
    driver.refuse = [refusal()]
    server.faults["Attend"] = [Abort(FAILED_PRECONDITION), None] * 2
    for _ in range(3):
        q, k, v = tensors()
        last = client.attend(q, k, v).transport
    assert transports(server) == [SHM, GRPC, SHM, GRPC, SHM]
    assert last == "posix_shm" and len(server.calls["Negotiate"]) == 4


def test_a_socket_that_is_not_there_is_told(server, connect):
    server.handout.path += "-not"
    assert connect().attend(*tensors()).transport == "grpc"
    assert told(server) == [(True, []), (True, ["REASON_SOCKET"])]
    with pytest.raises(PrefilldError, match="prefilld-fake.*-not cannot be used") as caught:
        connect("cuda_ipc").attend(*tensors())
    assert caught.value.reason == "REASON_SOCKET"


def test_a_probe_that_reads_something_else_is_told(server, connect, driver, monkeypatch):
    monkeypatch.setattr(driver, "write", lambda memory, offset, data: None)
    assert connect().attend(*tensors()).transport == "grpc"
    assert told(server)[1] == (True, ["REASON_DRIVER"])


def test_real_memory_that_cannot_be_mapped(server, connect, driver):
    """The probe could be."""
    driver.refuse = [None, refusal()]
    q, k, v = tensors()
    client = connect()
    for _ in range(2):
        result = client.attend(q, k, v)
        assert result.transport == "grpc"
        np.testing.assert_array_equal(result.o.array, q.array)
    assert transports(server) == [IPC, GRPC, GRPC]
    assert told(server) == [(True, []), (False, []), (True, ["REASON_DRIVER"])]
    driver.refuse = [None, refusal()]
    with pytest.raises(PrefilldError, match="cannot be mapped here"):
        connect("cuda_ipc").attend(q, k, v)


def test_another_server_is_tried_anew(server, connect, driver):
    driver.refuse = [refusal()]
    client = connect()
    assert client.attend(*tensors()).transport == "grpc"
    server.boot_id = "another"
    with client.prefill(MODEL, [1, 2], device="cuda:1") as call:
        assert call.transport == "cuda_ipc"
        list(call)
    assert told(server)[2:] == [(True, ["REASON_DRIVER"]), (True, [])]


# --- caches


def layers_of(call):
    return [(layer.k.array, layer.v.array) for layer in call]


def check(layers, tokens):
    assert len(layers) == LAYERS
    for index, (k, v) in enumerate(layers):
        for got, expected in zip((k, v), expected_layer(index, tokens)):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("pinned", [None, "cuda_ipc"])
@pytest.mark.parametrize("device", ["cuda:1", fake_torch.Device("cuda:1")])
def test_a_cache_lies_on_the_gpu_and_stays(server, connect, driver, pinned, device):
    with connect(pinned).prefill(MODEL, [1] * 9, device=device) as call:
        assert call.transport == "cuda_ipc"
        assert len(driver.mapped) == 1  # before the first layer is there
        layers = list(call)
        assert call.summary.transport == "cuda_ipc"
    (request,), (pull,) = server.calls["Prefill"], server.calls["PullKv"]
    assert request.destination.transport == pull.transport == IPC
    (release,) = server.calls["ReleaseLease"]
    assert release.reason == kv.RELEASE_REASON_CONSUMED
    (memory,) = server.device_caches.values()
    server.stop()  # call, lease and server are gone
    assert server.handout.in_use() == [memory.name] and len(driver.mapped) == 1
    assert layers[1].k.device == fake_torch.Device("cuda:1") and layers[1].density == 0.5
    check([(layer.k.array, layer.v.array) for layer in layers], 9)
    last = layers[1].v  # one tensor keeps it
    del layers
    gc.collect()
    assert server.handout.in_use() == [memory.name] and len(driver.mapped) == 1
    np.testing.assert_array_equal(last.array, expected_layer(1, 9)[1])
    del last
    assert server.handout.idle() and driver.mapped == []


def test_bfloat16_is_not_widened_on_a_gpu(server, connect):
    from prefilld.v1 import tensor_pb2
    server.data_type = tensor_pb2.DATA_TYPE_BF16
    with connect().prefill(MODEL, [1] * 4, device="cuda:1") as call:
        assert {layer.k.dtype for layer in call} == {"bfloat16"}


@pytest.mark.parametrize("options", [{"retain": False}, {"kv_dtype": "f16"}, {"device": "cpu"},
                                     {"device": None}, {"device": "cuda"}, {"device": "cuda:0"}])
def test_what_cuda_ipc_is_not_for(server, connect, options):
    with connect().prefill(MODEL, [1] * 4, **{"device": "cuda:1", **options}) as call:
        assert all(isinstance(layer.k, np.ndarray) for layer in call)
        assert call.transport == "grpc"
    assert server.calls["Prefill"][0].destination.transport == kv.TRANSPORT_UNSPECIFIED


def test_another_gpus_memory_within_reach_is_copied(server, connect, driver):
    driver.peers = [{0, 1}]
    with connect().prefill(MODEL, [1] * 6, device="cuda:0") as call:
        layers = list(call)
    assert list(server.calls["Negotiate"][0].device_uuids) == ["GPU-0", "GPU-1"]
    assert {layer.v.device for layer in layers} == {fake_torch.Device("cuda:0")}
    assert server.handout.idle() and driver.mapped == []
    check([(layer.k.array, layer.v.array) for layer in layers], 6)
    q, k, v = tensors(gpu=0)
    result = connect().attend(q, k, v)
    assert result.transport == "cuda_ipc" and result.o.device == q.device
    np.testing.assert_array_equal(result.o.array, q.array)


def no_room(**delay):
    info = error_details_pb2.ErrorInfo(reason="KV_MEMORY")
    return Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, info, *map(retry_info, delay.values()))


def too_long():
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="token_ids", description="longer than --kv_device_memory")
    return Abort(grpc.StatusCode.INVALID_ARGUMENT, bad)


@pytest.mark.parametrize("fault", [no_room(), no_room(delay=0.01), too_long(),
                                   Abort(FAILED_PRECONDITION)])
def test_a_prompt_that_finds_no_room_there_goes_elsewhere(server, connect, fault):
    server.shm = True
    server.faults["Prefill"] = [fault]
    client = connect()
    for _ in range(2):
        with client.prefill(MODEL, [1] * 5, device="cuda:1") as call:
            last = call.transport
            list(call)
    assert [r.destination.transport for r in server.calls["Prefill"]] == [
        IPC, kv.TRANSPORT_UNSPECIFIED, IPC]
    assert [r.transport for r in server.calls["PullKv"]] == [SHM, IPC] and last == "cuda_ipc"
    server.faults["Prefill"] = [fault] * 9
    with pytest.raises(PrefilldError):
        connect("cuda_ipc").prefill(MODEL, [1] * 5, device="cuda:1")


def test_a_lease_of_a_cache_on_the_gpu_and_of_one_elsewhere(server, connect):
    server.shm = True
    client = connect()
    there = client.prefill(MODEL, [1] * 7, device="cuda:1").detach()
    elsewhere = client.prefill(MODEL, [1] * 8).detach()
    for lease, name in ((there, "cuda_ipc"), (elsewhere, "posix_shm")):
        pull = client.pull(lease, MODEL, device="cuda:1")
        layers = list(pull)
        assert pull.transport == name and len(layers) == LAYERS
    assert [r.transport for r in server.calls["PullKv"]] == [IPC, IPC, SHM]


def test_a_pull_that_breaks_goes_on_in_the_same_memory(server, connect):
    server.faults["PullKv"] = [Abort(grpc.StatusCode.UNAVAILABLE, after=3)]
    with connect().prefill(MODEL, [1] * 7, device="cuda:1") as call:
        check(layers_of(call), 7)
    assert len(server.handout.asked) == 2  # the probe, and one


@pytest.mark.parametrize("reason", ["REASON_DRIVER", "REASON_SOCKET"])
def test_what_may_pass_is_tried_again_later(server, connect, driver, monkeypatch, reason):
    monkeypatch.setattr(transport, "_TRIED_AGAIN_S", 0.5)
    driver.refuse = [refusal(reason)]
    client = connect()
    for _ in range(2):
        assert client.attend(*tensors()).transport != "cuda_ipc"
    time.sleep(0.6)
    passed = reason == "REASON_SOCKET"
    assert (client.attend(*tensors()).transport == "cuda_ipc") is passed
    assert [refused for _, refused in told(server)] == [[], [reason]] + ([[]] if passed else [])


@pytest.mark.parametrize("reason", ["REASON_DRIVER", "REASON_SOCKET"])
def test_a_mapping_that_fails_in_the_pull(server, connect, driver, reason):
    """Then nobody else can have the cache. What the driver refuses is not asked for again; the rest
    is tried again."""
    driver.refuse = [None, refusal(reason), refusal(reason)]  # ahead, and again
    client = connect()
    with pytest.raises(PrefilldError, match="cannot be mapped here") as caught:
        with client.prefill(MODEL, [1] * 7, device="cuda:1") as call:
            list(call)
    assert caught.value.reason == reason
    (release,) = server.calls["ReleaseLease"]
    assert release.reason == kv.RELEASE_REASON_ABANDONED
    with client.prefill(MODEL, [1] * 7, device="cuda:1") as call:
        assert len(list(call)) == LAYERS
        assert call.transport == ("grpc" if reason == "REASON_DRIVER" else "cuda_ipc")
    refused = ["REASON_DRIVER"] if reason == "REASON_DRIVER" else []
    assert told(server) == [(True, []), (False, []), (True, refused)]


def test_a_server_that_keeps_no_caches_there(server, connect):
    server.keeps_on_device = False
    client = connect()
    with client.prefill(MODEL, [1] * 7, device="cuda:1") as call:
        assert call.transport == "grpc"
    assert server.calls["Prefill"][0].destination.transport == kv.TRANSPORT_UNSPECIFIED
    assert client.attend(*tensors()).transport == "cuda_ipc"
    assert server.calls["Negotiate"][0].model == MODEL and not server.calls["Negotiate"][1].model


def test_what_was_tried_for_attend_is_not_tried_for_caches(server, connect):
    client = connect()
    client.attend(*tensors())
    with client.prefill(MODEL, [1] * 7, device="cuda:1") as call:
        assert call.transport == "cuda_ipc"
        list(call)
    assert server.handout.asked.count("probe") == 1


def other_memory(number, chunk):
    chunk.buffer.name = "cuda-another" if chunk.layer == 1 else chunk.buffer.name
    return chunk


def test_a_second_memory_is_not_opened(server, connect):
    server.faults["PullKv"] = [Tamper(other_memory)] * 3
    client = connect()
    lease = client.prefill(MODEL, [1] * 7, device="cuda:1").detach()
    with pytest.raises(PrefilldError, match="in one piece of memory") as caught:
        list(client.pull(lease, MODEL, device="cuda:1"))
    assert caught.value.code is DATA_LOSS and "cuda-another" not in server.handout.asked


def test_the_last_tensor_may_go_on_any_thread(server, connect, driver):
    kept = []
    with connect().prefill(MODEL, [1] * 7, device="cuda:1") as call:
        kept += [layer.k for layer in call]
    threads = [threading.Thread(target=kept.pop) for _ in range(LAYERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.handout.idle() and driver.mapped == []


def test_what_is_mapped_as_the_interpreter_ends_is_unmapped_once(server):
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
import fake_torch
driver = fake_torch.Driver()
unmap = driver.unmap
driver.unmap = lambda memory: (unmap(memory), print("unmapped", flush=True))
sys.modules["torch"] = fake_torch.module(driver)
from prefilld import PrefillClient, cuda_ipc
cuda_ipc.driver = lambda: driver
client = PrefillClient({server.target!r})
with client.prefill({MODEL!r}, [1] * 7, device="cuda:1") as call:
    layers = list(call)
cycle = [layers]
cycle.append(cycle)
print("mapped", len(driver.mapped), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.split("\n") == ["unmapped", "mapped 1", "unmapped", ""]  # first the probe
    assert server.handout.idle()


def test_an_answer_that_says_more_than_there_is(server, connect):
    server.handout.answer = lambda connection, name: send(
        connection, 1 << 40, server.handout.memories[name].file)
    assert connect().attend(*tensors()).transport == "grpc"
    assert told(server)[1] == (True, ["REASON_DESCRIPTOR"])


# --- attend


def test_tried_again_when_the_connection_breaks(server, connect):
    server.faults["Attend"] = [Abort(grpc.StatusCode.UNAVAILABLE),
                               Abort(grpc.StatusCode.UNAVAILABLE, after=1)]
    assert connect().attend(*tensors()).transport == "cuda_ipc"
    assert transports(server) == [IPC] * 3


def change(**fields):
    def apply(buffers):
        for name, value in fields.items():
            was = getattr(buffers[1], name)
            setattr(buffers[1], name, value(was) if callable(value) else value)
        return buffers
    return apply


@pytest.mark.parametrize("change_buffers, message", [
    (lambda buffers: buffers[:2], "2 buffers for 3 tensors"),
    (change(byte_length=lambda n: n + 256), "a tensor of"),
    (change(byte_length=0), "a tensor of 0 bytes"),
    (change(byte_offset=lambda n: n + 4), "no multiple of 64"),
    (change(byte_offset=1 << 20), "of memory that has"),
    (change(byte_offset=2**64 - 64), "of memory that has"),
    (change(name=""), "in one piece of memory"),
    (change(name="cuda-x"), "in one piece of memory"),
    (change(device_uuid="GPU-0"), "memory of GPU 'GPU-0'"),
    (change(device_uuid=""), "memory of GPU ''"),
])
def test_a_reference_that_cannot_be_true_is_data_loss(server, connect, change_buffers, message):
    server.change_buffers = change_buffers
    with pytest.raises(PrefilldError, match=message) as caught:
        connect().attend(*tensors())
    assert caught.value.code is DATA_LOSS
    assert transports(server) == [IPC]


def no_buffers(number, outputs):
    outputs.ClearField("buffers")
    return outputs


def longer(number, outputs):
    outputs.tensors[0].shape[0] += 1
    return outputs


def unknown_type(number, outputs):
    outputs.tensors[0].data_type = 99
    return outputs


@pytest.mark.parametrize("tamper, message", [
    (no_buffers, "0 buffers"), (longer, "a tensor of"), (unknown_type, "has type 99")])
def test_outputs_that_cannot_be_true(server, connect, tamper, message):
    server.faults["Attend"] = [Tamper(tamper)]
    with pytest.raises(PrefilldError, match=message) as caught:
        connect().attend(*tensors())
    assert caught.value.code is DATA_LOSS


def test_in_place(server, connect):
    q, k, v = tensors()
    with connect().attend_in_place(q.shape, k.shape, "bf16", device="cuda:1",
                                   return_block_index=True) as call:
        for place, tensor in zip((call.q, call.k, call.v), (q, k, v)):
            assert place.dtype == "bfloat16" and place.shape == tensor.shape
            place.copy_(tensor)
        result = call.run()
        assert result.o.data_ptr() != call.q.data_ptr()
        np.testing.assert_array_equal(result.o.array, q.array)
    assert not hasattr(call, "q")
    np.testing.assert_array_equal(result.o.array, q.array)  # stays, as long as it is held
    place = result = None  # noqa: F841
    assert server.handout.idle()


def test_in_place_left_early(server, connect, driver):
    client = connect()
    with client.attend_in_place((5, 4, 64), (5, 2, 64), "bf16", device="cuda:1"):
        assert len(driver.mapped) == 1
    with pytest.raises(ZeroDivisionError):
        with client.attend_in_place((5, 4, 64), (5, 2, 64), "bf16", device="cuda:1"):
            1 / 0
    with pytest.raises(PrefilldError, match="not possible with this server and cuda:0"):
        client.attend_in_place((5, 4, 64), (5, 2, 64), "bf16")
    server.faults["Attend"] = [Abort(grpc.StatusCode.INVALID_ARGUMENT)]
    with pytest.raises(PrefilldError) as caught:
        with client.attend_in_place((5, 4, 64), (5, 2, 64), "bf16", device="cuda:1"):
            pass
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_many_threads(server, connect):
    client, used = connect(), []

    def attend():
        q, k, v = tensors()
        result = client.attend(q, k, v)
        np.testing.assert_array_equal(result.o.array, q.array)
        used.append(result.transport)

    threads = [threading.Thread(target=attend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used == ["cuda_ipc"] * 8
