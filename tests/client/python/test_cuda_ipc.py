"""cuda_ipc: tensors in the server's device memory, only where it is the caller's device too, closed
before the call ends. torch, the driver and the memory are fakes."""

import sys
import threading

import grpc
import numpy as np
import pytest

import fake_torch
from fake_server import MODEL, Abort, Tamper
from prefilld import PrefillClient, PrefilldError, RetryPolicy, cuda_ipc
from prefilld.v1 import kv_handoff_service_pb2 as kv

FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
DATA_LOSS = grpc.StatusCode.DATA_LOSS
GRPC, SHM, IPC = kv.TRANSPORT_GRPC, kv.TRANSPORT_POSIX_SHM, kv.TRANSPORT_CUDA_IPC


@pytest.fixture(autouse=True)
def torch(monkeypatch):
    module = fake_torch.module()
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.fixture(autouse=True)
def driver(monkeypatch, torch):
    fake = fake_torch.Driver()
    monkeypatch.setattr(cuda_ipc, "driver", lambda: fake)
    yield fake
    assert fake.open_now == []


@pytest.fixture
def server(server, driver):
    server.gpu, server.driver = "GPU-1", driver
    yield server
    assert all(server.closed_before_end)


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
        np.testing.assert_array_equal(result.o.array, q.array)  # after the server wrote over it
        assert result.block_count.dtype == "int32"
        assert result.block_count.array.tolist() == [0, 1, 2]
        assert server.uploaded == [x.array.tobytes() for x in (q, k, v)]
        assert (1.0, "upload") in seen and (1.0, "download") in seen
    assert transports(server) == [IPC, IPC]
    assert len(server.closed_before_end) == 2


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
    assert transports(server) == [IPC, GRPC, IPC, GRPC, GRPC]


def test_another_host_with_the_same_gpu_is_not_believed(server, connect):
    answer = kv.NegotiateResponse(transport=IPC, cuda_ipc_domain="elsewhere:1",
                                  device_uuids=["GPU-1"])
    client = connect()
    client._negotiator = type(client._negotiator)(lambda request, timeout: answer, None)
    assert client.attend(*tensors()).transport == "grpc"
    answer = kv.NegotiateResponse(transport=IPC, cuda_ipc_domain=cuda_ipc.domain(),
                                  device_uuids=["GPU-0"])
    client._negotiator = type(client._negotiator)(lambda request, timeout: answer, None)
    assert client.attend(*tensors()).transport == "grpc"


def test_pinned_and_not_possible(server, connect):
    client = connect("cuda_ipc")
    with pytest.raises(PrefilldError, match="not possible here") as caught:
        client.attend(*tensors(gpu=0))
    assert caught.value.code is FAILED_PRECONDITION
    arrays = [np.ones((3, 2, 64), np.float32) for _ in range(3)]
    for call in (lambda: client.attend(*arrays), lambda: client.attend(*tensors(gpu=None)),
                 lambda: client.prefill(MODEL, [1, 2])):
        with pytest.raises(PrefilldError, match="attend\\(\\) of torch tensors") as caught:
            call()
        assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED
    assert not server.calls["Attend"] and not server.calls["Prefill"]
    assert client.negotiate().transport == IPC


def test_memory_that_cannot_be_opened(server, connect, driver):
    driver.refuse = PrefilldError(FAILED_PRECONDITION, "cannot be opened here")
    q, k, v = tensors()
    result = connect().attend(q, k, v)
    assert result.transport == "grpc"
    np.testing.assert_array_equal(result.o.array, q.array)
    with pytest.raises(PrefilldError, match="cannot be opened here"):
        connect("cuda_ipc").attend(q, k, v)
    assert transports(server) == [IPC, GRPC, IPC]


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
    (change(cuda_ipc_handle=b""), "a handle of 0 bytes"),
    (change(cuda_ipc_handle=b"x" * 65), "a handle of 65 bytes"),
    (change(cuda_ipc_handle=b"x" * 64), "a second handle"),
    (change(device_uuid="GPU-0"), "memory of GPU 'GPU-0'"),
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
        kept = result.clone()
    np.testing.assert_array_equal(kept.o.array, q.array)
    assert server.closed_before_end == [True]


def test_in_place_left_early(server, connect, driver):
    client = connect()
    with client.attend_in_place((5, 4, 64), (5, 2, 64), "bf16", device="cuda:1"):
        assert len(driver.open_now) == 1
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
