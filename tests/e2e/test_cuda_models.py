"""Models on a GPU: K, V and logits are those of the CPU's server but for the rounding of the rows,
over every transport and however many prompts go together; a cache that stays on the GPU (cuda_ipc)
is the same bytes, as long as somebody has it mapped. Skipped where there is no GPU, no CUDA in the
build or no cuBLASLt."""

import concurrent.futures
import os
import subprocess
import sys

import grpc
import numpy as np
import pytest

from e2e import checkpoints, device_mapping, harness, mapping, prefilling, safetensors_file
from e2e.conftest import FIXTURES
from e2e.test_cuda import start
from prefilld import PrefillClient, PrefilldError
from prefilld.v1 import kv_handoff_service_pb2 as kv

LENGTHS = (1, 129, 1000, 5000)
# Of the norm of K, V or logits. Rows are rounded between operations, 2^-9, 2^-12 or 2^-24 of a
# value, about ten times a layer of four.
BOUNDS = {"bfloat16": 0.03, "float16": 0.004, "float32": 1e-4}


@pytest.fixture(scope="module", params=sorted(BOUNDS))
def checkpoint(request, tmp_path_factory):
    return checkpoints.Checkpoint.create(
        tmp_path_factory.mktemp("model") / "tiny", torch_dtype=request.param)


@pytest.fixture(scope="module")
def servers(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = f"--model=tiny={checkpoint.directory}"
    with (start(folder / "cuda.jsonl", model) as cuda,
          harness.Server(model, log_path=folder / "cpu.jsonl") as cpu):
        yield cuda, cpu


def prefill(server, ids, transport=None, **policy):
    with (PrefillClient(server.target, transport=transport) as client,
          client.prefill("tiny", ids, return_logits=True, **policy) as call):
        layers = [(layer.k.astype(np.float32), layer.v.astype(np.float32)) for layer in call]
        return {"k": np.stack([k for k, _ in layers]), "v": np.stack([v for _, v in layers]),
                "logits": call.logits}, call.summary.report


def differences(got, want):
    return {what: float(np.linalg.norm(got[what] - want[what]) / np.linalg.norm(want[what]))
            for what in want}


@pytest.mark.parametrize("directory", FIXTURES, ids=lambda path: path.name)
def test_kv_and_logits_equal_transformers(directory, tmp_path):
    """Small models of every variant, with what transformers computes from them."""
    expected = safetensors_file.load(directory / "expected.safetensors")
    with start(tmp_path / "log.jsonl", f"--model=tiny={directory}") as server:
        got, _ = prefill(server, expected["token_ids"].tolist(), method="dense")
    got |= {part: got[part].transpose(0, 2, 1, 3) for part in ("k", "v")}
    for part, array in got.items():
        own = expected.get("own_error_" + part)  # of transformers in the checkpoint's own dtype
        assert array.shape == expected[part].shape
        error = prefilling.relative_error(array, expected[part])
        assert error <= (1e-4 if own is None else 1.5 * own[0]), (part, error)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_dense_prefill_is_the_cpus(servers, checkpoint, tokens):
    cuda, cpu = servers
    ids = checkpoint.tokens(tokens)
    got, _ = prefill(cuda, ids, method="dense")
    want, _ = prefill(cpu, ids, method="dense")
    assert got["k"].shape == want["k"].shape
    bound = BOUNDS[checkpoint.config["torch_dtype"]]
    assert all(difference < bound for difference in differences(got, want).values()), (
        differences(got, want))


def test_prompts_take_no_memory_of_the_device(servers, checkpoint):
    cuda, _ = servers
    held = cuda.metric("prefilld_gpu_memory_bytes", kind="device")
    assert held > cuda.metric("prefilld_memory_plan_bytes", what="batches", place="device") > 0
    for tokens in (checkpoint.config["max_position_embeddings"], 1, 3000):
        for method in ("dense", "joint", "flexprefill"):
            prefill(cuda, checkpoint.tokens(tokens), method=method)
    assert cuda.metric("prefilld_gpu_memory_bytes", kind="device") == held


def test_a_plan_that_does_not_fit_is_refused(servers, checkpoint, tmp_path):
    with pytest.raises(RuntimeError, match="--max_prompt_tokens: .* no prompt fits"):
        harness.Server("--backend=cuda", "--attend_memory=4000GiB",
                       f"--model=tiny={checkpoint.directory}", log_path=tmp_path / "log.jsonl")


@pytest.mark.parametrize("method", ["joint", "flexprefill"])
def test_sparse_prefill_reports_what_it_did(servers, checkpoint, method):
    cuda, cpu = servers
    ids = checkpoint.tokens(5000)
    got, report = prefill(cuda, ids, method=method, gamma=0.9)
    want, expected = prefill(cpu, ids, method=method, gamma=0.9)
    assert report.mean_density == pytest.approx(expected.mean_density, abs=0.05)
    # Where rounding, be it that of F32, makes a near tie of blocks or of patterns fall the other
    # way, rows differ by more than it: by up to 0.023 of K was seen with these random weights.
    assert differences(got, want)["k"] < max(0.05, 2 * BOUNDS[checkpoint.config["torch_dtype"]])


def test_every_transport_has_the_same_bits(servers, checkpoint):
    cuda, _ = servers
    ids = checkpoint.tokens(1500)
    sent, _ = prefill(cuda, ids, transport="grpc", method="dense")
    mapped, _ = prefill(cuda, ids, transport="posix_shm", method="dense")
    assert all(np.array_equal(sent[what], mapped[what]) for what in sent)


def test_prompts_that_go_together_have_the_same_cache(servers, checkpoint):
    cuda, _ = servers
    prompts = [checkpoint.tokens(tokens, seed=tokens) for tokens in (300, 700, 40, 511)]
    alone = [prefill(cuda, ids, method="dense")[0] for ids in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda ids: prefill(cuda, ids, method="dense")[0], prompts))
    bound = BOUNDS[checkpoint.config["torch_dtype"]]
    for one, other in zip(alone, together, strict=True):
        assert all(difference < bound for difference in differences(other, one).values())


@pytest.fixture
def segmented(checkpoint, tmp_path):
    """A server whose segments are ready: one of 32 MiB and one of 16."""
    with start(tmp_path / "log.jsonl", "--kv_memory=128MiB",
               f"--model=tiny={checkpoint.directory}") as server:
        await_segments(server)
        yield server


def segments(server, state):
    """Bytes."""
    return server.metric("prefilld_kv_segment_bytes", transport="posix_shm", state=state)


def await_segments(server, ready=48 << 20):
    harness.eventually(lambda: segments(server, "ready") == ready)


def test_a_segment_is_ready_before_the_prompt_and_nobody_elses_while_it_is_mapped(
        segmented, checkpoint):
    assert mapping.segments(segmented) == 2
    blocks = segmented.metric("prefilld_kv_blocks", state="free")
    call = mapping.start(segmented, checkpoint.tokens(900)).finish()
    assert mapping.segments(segmented) == 2
    assert segmented.metric("prefilld_kv_blocks", state="free") == blocks
    assert segments(segmented, "lent") == 16 << 20
    chunks = list(prefilling.open_pull(segmented, call.ready, transport=mapping.SHM))
    name = chunks[0].buffer.name
    assert {chunk.buffer.name for chunk in chunks} == {name}
    kept, whole = mapping.pull(segmented, call.ready), prefilling.pull(segmented, call.ready)
    prefilling.release(segmented, call.ready)
    with pytest.raises(FileNotFoundError):
        mapping.open_segment(segmented, name)
    for seed in range(3):
        again = mapping.start(segmented, checkpoint.tokens(900, seed=seed)).finish()
        other = next(iter(prefilling.open_pull(segmented, again.ready, transport=mapping.SHM)))
        assert other.buffer.name != name
        prefilling.release(segmented, again.ready)
    assert mapping.plain(kept) == whole, "who has mapped it keeps it"
    assert segments(segmented, "lent") >= 16 << 20
    kept.clear()
    await_segments(segmented)


def test_prompts_in_segments_go_together_beyond_what_is_ready(segmented, checkpoint):
    calls = [mapping.start(segmented, checkpoint.tokens(900, seed=seed)) for seed in range(6)]
    for call in calls:
        call.finish()
        assert mapping.plain(mapping.pull(segmented, call.ready)) == \
            prefilling.pull(segmented, call.ready)
        prefilling.release(segmented, call.ready)
    harness.eventually(lambda: segments(segmented, "lent") == 0)


def test_nothing_is_made_where_posix_shm_is_not_offered(checkpoint, tmp_path):
    with start(tmp_path / "log.jsonl", "--kv_memory=128MiB", "--transports=grpc",
               f"--model=tiny={checkpoint.directory}") as server:
        assert mapping.segments(server) == -1, "nor one to be tried"
        assert server.metric("prefilld_kv_segment_bytes", transport="posix_shm") == 0


@pytest.mark.parametrize("name", ["base", "biases", "head_dim96", "head_dim128", "tied"])
def test_float32_models_of_every_form_are_the_cpus(name, tmp_path):
    model = f"--model=tiny={FIXTURES[0].parent / name}"
    ids = np.random.default_rng(7).integers(0, 96, 700).tolist()
    with (start(tmp_path / "cuda.jsonl", model) as cuda,
          harness.Server(model, log_path=tmp_path / "cpu.jsonl") as cpu):
        got, _ = prefill(cuda, ids, method="dense")
        want, _ = prefill(cpu, ids, method="dense")
    assert all(difference < BOUNDS["float32"] for difference in differences(got, want).values()), (
        differences(got, want))


# --- caches that stay on the GPU ------------------------------------------------------------------


@pytest.fixture
def on_device(servers):
    """The server; afterwards nothing of its GPU's memory is lent."""
    server, _ = servers
    if server.metric("prefilld_handoff_transport_info", transport="cuda_ipc") != 1:
        pytest.skip("cuda_ipc is not offered here")
    yield server
    harness.eventually(lambda: lent(server) == 0, message="device memory back")


def lent(server):
    return server.metric("prefilld_kv_segment_bytes", transport="cuda_ipc", state="lent")


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("method", ["dense", "joint"])
def test_a_cache_on_the_gpu_is_the_bytes_that_grpc_brings(on_device, checkpoint, tokens, method):
    ids = checkpoint.tokens(tokens)
    for _ in range(2):  # eight layers, after which cuDNN has a plan for the shape: other bits
        prefill(on_device, ids, method=method)
    with prefilling.prefilled(on_device, ids, method=method) as sent:
        expected = prefilling.pull(on_device, sent.ready)
    call = device_mapping.start(on_device, ids, method=method).finish()
    assert device_mapping.pull(on_device, call.ready) == expected
    prefilling.release(on_device, call.ready)


def test_every_tensor_says_whose_memory_it_is_in(on_device, checkpoint):
    (uuid,) = device_mapping.negotiate(on_device).device_uuids
    call = device_mapping.start(on_device, checkpoint.tokens(300)).finish()
    found, name = device_mapping.buffers(on_device, call.ready)
    assert {buffer.device_uuid for parts in found.values() for buffer in parts} == {uuid}
    assert name and name != "probe"
    prefilling.release(on_device, call.ready)


def test_memory_is_lent_until_the_last_connection_closes(on_device, checkpoint):
    call = device_mapping.start(on_device, checkpoint.tokens(700)).finish()
    found, name = device_mapping.buffers(on_device, call.ready)
    with device_mapping.opened(on_device, name) as one:
        with device_mapping.opened(on_device, name) as other:
            before = [one.read(buffer) for parts in found.values() for buffer in parts]
            prefilling.release(on_device, call.ready)
            harness.eventually(lambda: on_device.metric("prefilld_leases_active") == 0)
            for seed in range(4):  # nobody else's cache comes to lie there
                again = device_mapping.start(on_device, checkpoint.tokens(700, seed=seed)).finish()
                prefilling.release(on_device, again.ready)
            assert [other.read(b) for parts in found.values() for b in parts] == before
        assert [one.read(b) for parts in found.values() for b in parts] == before
        assert lent(on_device) > 0


def test_a_name_ends_with_its_lease(on_device, checkpoint):
    call = device_mapping.start(on_device, checkpoint.tokens(300)).finish()
    _, name = device_mapping.buffers(on_device, call.ready)
    prefilling.release(on_device, call.ready)

    def gone():
        try:
            device_mapping.Opened(device_mapping.negotiate(on_device).memory_socket, name).close()
        except PrefilldError as error:
            return error.reason == "REASON_DESCRIPTOR"
        return False

    harness.eventually(gone)


def test_who_dies_with_a_cache_gives_it_back(on_device, checkpoint):
    """kill -9 while it is mapped."""
    call = device_mapping.start(on_device, checkpoint.tokens(700)).finish()
    _, name = device_mapping.buffers(on_device, call.ready)
    socket = device_mapping.negotiate(on_device).memory_socket
    script = ("import time; from e2e import device_mapping; "
              f"memory = device_mapping.Opened({socket!r}, {name!r}); "
              "print('open', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        assert child.stdout.readline() == "open\n"
        prefilling.release(on_device, call.ready)
        harness.eventually(lambda: on_device.metric("prefilld_leases_active") == 0)
        assert lent(on_device) > 0
    finally:
        child.kill()
        child.wait()
    harness.eventually(lambda: lent(on_device) == 0, message="the dead one's memory back")


def test_what_stays_on_the_gpu_is_not_sent(on_device, checkpoint):
    call = device_mapping.start(on_device, checkpoint.tokens(300)).finish()
    for transport in (kv.TRANSPORT_GRPC, mapping.SHM):
        with harness.refused(grpc.StatusCode.FAILED_PRECONDITION):
            list(prefilling.open_pull(on_device, call.ready, transport=transport))
    prefilling.release(on_device, call.ready)


def test_what_a_caller_cannot_use_is_not_chosen_and_counted(on_device):
    uuids = device_mapping.negotiate(on_device).device_uuids
    assert device_mapping.negotiate(on_device, uuids).transport == device_mapping.IPC
    assert device_mapping.negotiate(on_device).transport != device_mapping.IPC
    before = on_device.metrics()
    refusal = kv.TransportRefusal(transport=device_mapping.IPC,
                                  reason=kv.TransportRefusal.REASON_DRIVER)
    answer = device_mapping.negotiate(on_device, uuids, refused=[refusal])
    assert answer.transport != device_mapping.IPC
    assert harness.moved(before, on_device.metrics(), "prefilld_transport_refused_total",
                         transport="cuda_ipc", reason="driver") == 1


def test_the_client_takes_a_cache_where_it_lies(on_device, checkpoint):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    ids = checkpoint.tokens(900)
    with PrefillClient(on_device.target) as client:
        with client.prefill("tiny", ids, method="dense", device="cuda") as call:
            layers = list(call)
            assert call.transport == "cuda_ipc"
        sent, _ = prefill(on_device, ids, transport="grpc", method="dense")
        for layer in layers:  # the lease is over
            assert layer.k.is_cuda
            assert np.array_equal(layer.k.float().cpu().numpy(), sent["k"][layer.index])
            assert np.array_equal(layer.v.float().cpu().numpy(), sent["v"][layer.index])
        assert lent(on_device) > 0
        del layer, layers
