"""prefill_into_cache where the model lies on the server's GPU: the cache is the server's memory, as
long as it is used. Skipped where there is no GPU or no CUDA in the build; what needs none is here
too."""

import contextlib
import copy
import pathlib
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

from e2e import harness  # noqa: E402
from e2e.test_cuda import start  # noqa: E402
from prefilld import Layer, PrefillClient, PrefilldError, hf  # noqa: E402
from prefilld.errors import refused  # noqa: E402

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
IDS = [5, 90, 17, 3, 3, 44, 60, 8] * 20
GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_kept_without_a_copy(dtype):
    layer, (k, v) = DynamicLayer(), torch.randn(2, 3, 7, 8).to(dtype)
    hf._fill(layer, k, v, torch.device("cpu"))
    for kept, given in ((layer.keys, k), (layer.values, v)):
        assert kept.shape == (1, 3, 6, 8) and kept.dtype is dtype
        assert kept.data_ptr() == given.data_ptr()
        assert kept.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    layer.update(*torch.ones(2, 1, 3, 1, 8).to(dtype))  # what generate does
    assert layer.keys.shape == (1, 3, 7, 8)
    assert layer.keys.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
    assert torch.equal(layer.keys[0, :, :6], k[:, :6])


class OncePerCall:
    """A client whose first prompts fail so; then K and V are there, on the CPU."""

    def __init__(self, model, failures):
        self.failures, self.devices = failures, []
        self._shape = (model.config.num_key_value_heads, len(IDS), model.config.head_dim)
        self._layers = model.config.num_hidden_layers
        self.summary = "what was done"

    def prefill(self, name, ids, *, device, **options):
        self.devices.append(device)
        return contextlib.nullcontext(self)

    def __iter__(self):
        if self.failures:
            raise self.failures.pop(0)
        for index in range(self._layers):
            yield Layer(index, *torch.randn(2, *self._shape))


def test_memory_that_cannot_be_opened_is_not_asked_for_twice(monkeypatch):
    """The second time the client has found another way."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base")
    monkeypatch.setattr(hf, "_served_model", lambda client, handle: SimpleNamespace(
        name="base", vocab_size=96))
    monkeypatch.setattr(hf, "_check_same_model", lambda model, info: None)
    failure = refused("REASON_DRIVER", "not here")
    client = OncePerCall(model, [failure])
    cache, summary = hf.prefill_into_cache(model, IDS, client=client, check_weights=False,
                                           return_summary=True)
    assert cache.get_seq_length() == len(IDS) - 1 and summary == "what was done"
    assert client.devices == [torch.device("cpu")] * 2
    for failures in ([failure] * 2, [PrefilldError(grpc.StatusCode.FAILED_PRECONDITION, "no")]):
        client = OncePerCall(model, failures)
        with pytest.raises(PrefilldError):
            hf.prefill_into_cache(model, IDS, client=client, check_weights=False)
        assert not client.failures


@pytest.fixture(scope="module", params=["base", "bf16"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def server(name, tmp_path_factory):
    with start(tmp_path_factory.mktemp("gpu") / "log.jsonl",
               f"--model={name}={FIXTURES / name}") as running:
        yield running


@pytest.fixture(scope="module")
def model(name):
    return AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype="auto").cuda().eval()


def prefilled(server, model, **options):
    with PrefillClient(server.target, **options) as client:
        return hf.prefill_into_cache(model, IDS, client=client, method="dense",
                                     return_summary=True)


@needs_a_gpu
def test_the_cache_is_the_servers_memory_until_the_first_token(server, model):
    def lent():
        return server.metric("prefilld_kv_segment_bytes", transport="cuda_ipc", state="lent")

    assert lent() == 0
    cache, summary = prefilled(server, model)
    assert summary.transport == "cuda_ipc"
    sent, _ = prefilled(server, model, transport="grpc")
    for got, want in zip(cache.layers, sent.layers):
        assert got.keys.is_cuda and got.keys.shape == want.keys.shape
        assert torch.equal(got.keys, want.keys) and torch.equal(got.values, want.values)
    starts = sorted(tensor.data_ptr() for layer in cache.layers
                    for tensor in (layer.keys, layer.values))
    assert len({start // (64 << 20) for start in starts}) <= 2, "one piece of memory"
    again, ids = copy.deepcopy(cache), torch.tensor([IDS], device="cuda")
    harness.eventually(lambda: server.metric("prefilld_leases_active") == 0)
    assert lent() > 0  # the lease has ended, and the memory is in use
    alone = model.generate(ids, **GREEDY)
    assert model.generate(ids, past_key_values=cache, **GREEDY).tolist() == alone.tolist()
    # Each view was replaced.
    harness.eventually(lambda: lent() == 0)
    assert model.generate(ids, past_key_values=again, **GREEDY).tolist() == alone.tolist()


@needs_a_gpu
def test_a_cache_outlives_client_and_server(name, model, tmp_path):
    with start(tmp_path / "log.jsonl", f"--model={name}={FIXTURES / name}") as server:
        cache, summary = prefilled(server, model, transport="cuda_ipc")
        want = [layer.keys.cpu() for layer in cache.layers]
    assert summary.transport == "cuda_ipc"
    for layer, keys in zip(cache.layers, want):
        assert torch.equal(layer.keys.cpu(), keys)


@needs_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_has_each_layer_where_it_computes(name, server):
    layers = len(AutoModelForCausalLM.from_pretrained(FIXTURES / name).model.layers)
    where = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1,
             **{f"model.layers.{i}": int(2 * i >= layers) for i in range(layers)}}
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype="auto", device_map=where)
    cache, _ = prefilled(server, model)
    assert [layer.keys.device.index for layer in cache.layers] == [
        int(2 * i >= layers) for i in range(layers)]


@needs_a_gpu
def test_pinned_and_a_model_on_the_cpu(server, name):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype="auto")
    with pytest.raises(PrefilldError) as caught:
        prefilled(server, model, transport="cuda_ipc")
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED
    _, summary = prefilled(server, model)
    assert summary.transport != "cuda_ipc" and np.isfinite(summary.report.mean_density)
