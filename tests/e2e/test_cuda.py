"""prefilld on a GPU: an Attend gives what the CPU's gives, the same over every transport; what it
cannot do is refused, what breaks is told. Skipped where there is no GPU or no CUDA in the build.

Over cuda_ipc the caller's tensors are torch's; without it, those tests are skipped too."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import grpc
import numpy as np
import pytest

from e2e import harness
from prefilld import PrefillClient, PrefilldError, RetryPolicy
from spec import inputs

RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
NO_CUDA = ("is not in this build", "no CUDA driver", "no CUDA device")
LLAMA = dict(q_heads=32, kv_heads=8, d=128)


def start(log_path, *flags):
    """A server on the GPU, or a skip where there is none."""
    try:
        return harness.Server("--backend=cuda", "--attend_memory=16GiB", *flags, log_path=log_path)
    except RuntimeError as error:
        if any(reason in str(error) for reason in NO_CUDA):
            pytest.skip("no GPU here, or no CUDA in the build")
        raise


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    with start(tmp_path_factory.mktemp("cuda") / "log.jsonl") as server:
        yield server


@pytest.fixture(scope="module")
def cpu(cuda, tmp_path_factory):
    with harness.Server(log_path=tmp_path_factory.mktemp("cpu") / "log.jsonl") as server:
        yield server


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return module


def bits(tokens, family="sink", **shape):
    return [inputs.to_bf16_bits(x) for x in inputs.make(family, tokens, **shape)]


def on_gpu(torch, arrays):
    return [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda() for x in arrays]


def random_on_gpu(torch, tokens):
    generator = torch.Generator("cuda").manual_seed(7)
    return [torch.randn(tokens, heads, LLAMA["d"], generator=generator, device="cuda",
                        dtype=torch.bfloat16)
            for heads in (LLAMA["q_heads"], LLAMA["kv_heads"], LLAMA["kv_heads"])]


def as_numpy(result):
    """Outputs by name, floats as float32, whatever they were."""
    outputs = {}
    for name in ("o", "lse", "block_count", "block_index", "pattern", "captured_mass"):
        x = getattr(result, name)
        if x is not None and not isinstance(x, np.ndarray):
            x = x.float().cpu().numpy() if x.dtype.is_floating_point else x.cpu().numpy()
        if name == "o" and x.dtype == np.uint16:
            x = inputs.from_bf16_bits(x)
        outputs[name] = x
    return outputs


def offers(server, name):
    return server.metric("prefilld_handoff_transport_info", transport=name) == 1


def attend(server, arrays, transport, torch=None, **options):
    """(outputs by name, result) over this transport; None where the server does not offer it."""
    if not offers(server, transport):
        return None
    once = RetryPolicy(attempts=1)
    with PrefillClient(server.target, transport=transport, retry=once) as client:
        if transport == "cuda_ipc":
            result = client.attend(*on_gpu(torch, arrays), **options)
        else:
            result = client.attend(*arrays, dtype="bf16", **options)
        assert result.transport == transport
        return as_numpy(result), result


def masks(outputs):
    """[q_heads, rows] of sets of key blocks."""
    count, index = outputs["block_count"], outputs["block_index"]
    return [[frozenset(index[h, r, :count[h, r]].tolist()) for r in range(count.shape[1])]
            for h in range(count.shape[0])]


def expect_agreement(got, expected, prefix, error):
    """Of the outputs of an Attend: the same blocks but for near ties, and where they are, o."""
    assert got["o"].shape == expected["o"].shape and np.isfinite(got["o"]).all()
    np.testing.assert_array_equal(got["pattern"], expected["pattern"])
    np.testing.assert_allclose(got["captured_mass"], expected["captured_mass"], atol=0.01)
    ours, theirs = masks(got), masks(expected)
    both = sum(len(a & b) for x, y in zip(ours, theirs) for a, b in zip(x, y))
    either = sum(len(a | b) for x, y in zip(ours, theirs) for a, b in zip(x, y))
    assert both / either >= 0.999
    block = 128
    for h, (x, y) in enumerate(zip(ours, theirs)):
        for r, (a, b) in enumerate(zip(x, y)):
            if a != b:
                continue
            begin = max(0, (prefix // block + r) * block - prefix)
            rows = slice(begin, (prefix // block + r + 1) * block - prefix)
            np.testing.assert_allclose(got["o"][rows, h], expected["o"][rows, h],
                                       rtol=error, atol=error)
            np.testing.assert_allclose(got["lse"][h, rows], expected["lse"][h, rows],
                                       rtol=min(error, 1e-3), atol=min(error, 1e-3))


# --- what comes back ------------------------------------------------------------------------------


WHOLE = (3000, 0, dict(q_heads=8, kv_heads=2, d=128))
AFTER_A_PREFIX = (900, 700, dict(q_heads=4, kv_heads=4, d=64))  # flexprefill has none


@pytest.mark.parametrize("method,tokens,prefix,shape", [
    ("dense", *WHOLE), ("joint", *WHOLE), ("flexprefill", *WHOLE),
    ("dense", *AFTER_A_PREFIX), ("joint", *AFTER_A_PREFIX),
])
def test_every_transport_gives_what_the_cpu_gives(cuda, cpu, torch, method, tokens, prefix, shape):
    arrays = bits(tokens, prefix=prefix, **shape)
    options = dict(method=method, return_lse=True, return_block_index=True)
    expected, _ = attend(cpu, arrays, "grpc", **options)
    first = None
    for transport in ("grpc", "posix_shm", "cuda_ipc"):
        found = attend(cuda, arrays, transport, torch, **options)
        if found is None:
            continue
        outputs, _ = found
        first = first or outputs
        for name, x in outputs.items():  # whichever way: the same bits
            np.testing.assert_array_equal(x, first[name], err_msg=f"{name} over {transport}")
    expect_agreement(first, expected, prefix, error=0.02)


@pytest.mark.parametrize("method,tokens,prefix,shape", [
    ("dense", *WHOLE), ("joint", *WHOLE), ("flexprefill", *WHOLE),
    ("dense", *AFTER_A_PREFIX), ("joint", *AFTER_A_PREFIX),
])
def test_float32_gives_what_the_cpu_gives(cuda, cpu, method, tokens, prefix, shape):
    arrays = [x.astype(np.float32) for x in inputs.make("sink", tokens, prefix=prefix, **shape)]
    outputs = []
    for server in (cuda, cpu):
        with PrefillClient(server.target) as client:
            outputs.append(as_numpy(client.attend(
                *arrays, method=method, return_lse=True, return_block_index=True)))
    assert outputs[0]["o"].dtype == np.float32
    expect_agreement(*outputs, prefix, error=1e-4)


def test_ragged(cuda, cpu, torch):
    arrays = bits(1500, q_heads=4, kv_heads=2, d=128)
    options = dict(method="joint", cu_seqlens_q=[0, 1, 300, 1500], cu_seqlens_k=[0, 1, 300, 1500],
                   return_block_index=True)
    expected, _ = attend(cpu, arrays, "grpc", **options)
    for transport in ("grpc", "cuda_ipc"):
        outputs, result = attend(cuda, arrays, transport, torch, **options)
        assert outputs["pattern"].shape == (3, 4)
        np.testing.assert_allclose(outputs["o"], expected["o"], rtol=0.05, atol=0.05)


def test_torch_tensors_choose_their_way(cuda, torch):
    q, k, v = random_on_gpu(torch, 1000)
    with PrefillClient(cuda.target) as client:
        near = client.attend(q, k, v, method="dense")
        far = client.attend(q.cpu(), k.cpu(), v.cpu(), method="dense")
        strided = client.attend(q.flip(0).flip(0), k.transpose(0, 1).contiguous().transpose(0, 1),
                                v, method="dense")
    assert near.transport == strided.transport == "cuda_ipc" and near.o.is_cuda
    assert far.transport != "cuda_ipc" and not far.o.is_cuda
    assert torch.equal(near.o.cpu(), far.o) and torch.equal(near.o, strided.o)
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None].float() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert torch.allclose(near.o.float(), full[0].transpose(0, 1), rtol=0.02, atol=0.02)


def test_in_place_nothing_is_copied(cuda, torch):
    q, k, v = random_on_gpu(torch, 2000)
    with PrefillClient(cuda.target) as client:
        expected = client.attend(q, k, v, method="dense").o
        with client.attend_in_place(q.shape, k.shape, "bf16", method="dense") as call:
            for place, tensor in zip((call.q, call.k, call.v), (q, k, v)):
                place.copy_(tensor)
            result = call.run()
            assert torch.equal(result.o, expected)
        del place
        for _ in range(3):  # the memory is not another's while somebody holds a tensor in it
            client.attend(k.repeat(1, 4, 1), k, v, method="dense")
        assert torch.equal(result.o, expected)


def test_where_the_time_goes(cuda, torch, capsys):
    """Printed: milliseconds of calls at Llama-3.1-8B's shape, medians."""
    lines = []
    for tokens, method in ((8192, "joint"), (32768, "dense"), (32768, "joint")):
        gpu = random_on_gpu(torch, tokens)
        host = [x.cpu().view(torch.int16).numpy().view(np.uint16) for x in gpu]
        for transport in ("grpc", "posix_shm", "cuda_ipc", "in place"):
            if not offers(cuda, "cuda_ipc" if transport == "in place" else transport):
                continue
            with PrefillClient(
                    cuda.target,
                    transport="cuda_ipc" if transport == "in place" else transport) as client:
                rows = []
                for _ in range(4):
                    begin = time.perf_counter()
                    if transport == "in place":
                        with client.attend_in_place(gpu[0].shape, gpu[1].shape, "bf16",
                                                    method=method) as call:
                            result = call.run()
                    elif transport == "cuda_ipc":
                        result = client.attend(*gpu, method=method)
                    else:
                        result = client.attend(*host, dtype="bf16", method=method)
                    rows.append([time.perf_counter() - begin, *result.summary.seconds.values()])
                names = ["wall", *result.summary.seconds]
                median = 1e3 * np.median(rows[1:], axis=0)  # the first one takes memory
                lines.append(f"{tokens:6} {method:5} {transport:9} " + " ".join(
                    f"{name} {value:.2f}" for name, value in zip(names, median)))
                del result
    with capsys.disabled():
        print("", *lines, sep="\n")


# --- what cannot be done --------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["grpc", "cuda_ipc"])
def test_what_there_is_no_kernel_for_is_refused(cuda, torch, transport):
    with PrefillClient(cuda.target, transport=transport) as client:
        for dtype, d in ((torch.float32, 100), (torch.bfloat16, 80)):
            q, k, v = (torch.ones(200, heads, d, dtype=dtype, device="cuda") for heads in (4, 2, 2))
            with pytest.raises(PrefilldError) as caught:
                client.attend(q, k, v)
            assert caught.value.code is UNIMPLEMENTED, caught.value
        q, k, v = (torch.ones(200, heads, 128, dtype=torch.float16, device="cuda")
                   for heads in (4, 2, 2))
        assert torch.allclose(client.attend(q, k, v).o, q)


def test_no_device_memory_is_told_and_the_next_request_works(torch, tmp_path):
    q, k, v = random_on_gpu(torch, 60_000)
    host = [x.cpu() for x in (q, k, v)]
    once = RetryPolicy(attempts=1)
    with start(tmp_path / "log.jsonl") as server:  # one that keeps nothing yet
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free - (128 << 20), dtype=torch.uint8, device="cuda")
        try:
            for transport, tensors in (("grpc", host), ("cuda_ipc", (q, k, v))):
                with PrefillClient(server.target, transport=transport, retry=once) as client:
                    with pytest.raises(PrefilldError) as caught:
                        client.attend(*tensors, method="joint")
                    assert caught.value.code is RESOURCE_EXHAUSTED, caught.value
                    assert caught.value.retry_delay is not None
        finally:
            del hog
            torch.cuda.empty_cache()
        with PrefillClient(server.target) as client:
            assert client.attend(q, k, v, method="joint").transport == "cuda_ipc"


def test_a_caller_that_dies_takes_nothing_with_it(cuda, torch):
    """kill -9 while the memory is open, and written."""
    harness.eventually(lambda: cuda.metric("prefilld_requests_running") == 0)
    before = cuda.metric("prefilld_gpu_memory_bytes", kind="shared")
    script = textwrap.dedent(f"""
        import sys, time, torch
        from prefilld import PrefillClient
        client = PrefillClient({cuda.target!r})
        call = client.attend_in_place((20000, 32, 128), (20000, 8, 128), "bf16").__enter__()
        call.q.fill_(1)
        torch.cuda.synchronize()
        print("open", flush=True)
        time.sleep(60)
    """)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        assert child.stdout.readline() == "open\n"
        assert cuda.metric("prefilld_gpu_memory_bytes", kind="shared") > before
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    harness.eventually(
        lambda: cuda.metric("prefilld_gpu_memory_bytes", kind="shared") <= before,
        message="the caller's memory is free")
    q, k, v = random_on_gpu(torch, 500)
    with PrefillClient(cuda.target, transport="cuda_ipc") as client:
        assert torch.isfinite(client.attend(q, k, v).o).all()


def test_a_device_that_is_lost_ends_the_server(cuda, torch, tmp_path):
    arrays = bits(500, q_heads=4, kv_heads=2, d=128)
    server = start(tmp_path / "log.jsonl", "--inject_fault=2")
    try:
        once = RetryPolicy(attempts=1)
        with PrefillClient(server.target, transport="grpc", retry=once) as client:
            client.attend(*arrays, dtype="bf16")
            assert client.health().ready
            for _ in range(2):  # the one that broke it, and every one after it
                with pytest.raises(PrefilldError) as caught:
                    client.attend(*arrays, dtype="bf16")
                assert caught.value.code == grpc.StatusCode.UNAVAILABLE, caught.value
            harness.eventually(lambda: not client.health().live, message="not live")
        server.channel.close()
        assert server.wait(timeout=30) != 0
    finally:
        server.process.kill()
        server.process.wait()


def test_cuda_ipc_needs_a_gpu(tmp_path):
    """Of every build."""
    with pytest.raises(RuntimeError, match="--backend=cuda"):
        harness.Server("--transports=cuda_ipc", log_path=tmp_path / "log.jsonl")


def test_what_attends_may_take_is_planned_without_models(cuda, tmp_path):
    told, = [line for line in cuda.log() if line["event"] == "memory_planned"]
    assert told["max_prompt_tokens"] is None
    assert 0 < told["spare_bytes"] == told["free_bytes"] - told["device_bytes"]
    with pytest.raises(RuntimeError, match="--attend_memory: .* of gpu memory are needed"):
        harness.Server("--backend=cuda", "--attend_memory=4000GiB",
                       log_path=tmp_path / "log.jsonl")
