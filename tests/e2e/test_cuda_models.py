"""Models on a GPU: K, V and logits are those of the CPU's server but for the rounding of the rows,
over every transport and however many prompts go together. Skipped where there is no GPU, no CUDA
in the build or no cuBLASLt."""

import concurrent.futures

import numpy as np
import pytest

from e2e import checkpoints, harness
from e2e.test_cuda import start
from prefilld import PrefillClient

LENGTHS = (1, 129, 1000, 5000)
# Of the norm of K, V or logits. Rows are rounded between operations, 2^-9 or 2^-12 of a value,
# about ten times a layer of four.
BOUNDS = {"bfloat16": 0.03, "float16": 0.004}


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
    assert differences(got, want)["k"] < 2 * BOUNDS[checkpoint.config["torch_dtype"]]


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


def test_float32_weights_are_refused_by_name(tmp_path):
    model = checkpoints.Checkpoint.create(tmp_path / "wide")
    with pytest.raises(RuntimeError, match="F32 are not computed by cuda"):
        start(tmp_path / "log.jsonl", f"--model=wide={model.directory}")
