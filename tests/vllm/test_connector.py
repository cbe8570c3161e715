"""The connector's parts, each for itself: the scheduler's half, the writers, the report."""

import pickle
import types

import grpc
import pytest
import torch

from prefilld import PrefilldError
from prefilld.vllm import kv_writer
from prefilld.vllm.failure_reasons import FailureReasons
from prefilld.vllm.metrics import LoadStats
from prefilld.vllm.model_check import ModelCheck
from prefilld.vllm.scheduler import SchedulerHalf
from prefilld.vllm.settings import Settings

LEASE = {"name": "l", "generation": 3, "boot_id": "b", "layers": 2, "tokens": 40, "ttl": 60.0}
HERE = Settings(targets=("127.0.0.1:1",), min_tokens=16)


# --- the comparison of models


@pytest.mark.parametrize("fields", [
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 1e4}])
def test_a_scaling_that_vllm_computes_otherwise_is_refused(fields):
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(dtype=torch.float32,
                                           hf_text_config=types.SimpleNamespace(**fields)),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=types.SimpleNamespace(cache_dtype="auto"))
    with pytest.raises(ValueError, match="rope scaling dynamic is not supported"):
        ModelCheck(config)


# --- the scheduler's half

BLOCK = 16


class Blocks:
    def get_block_ids(self):
        return ([7, 8, 9],)


def request(tokens=40, params=None, **fields):
    return types.SimpleNamespace(**{
        "request_id": "r", "prompt_token_ids": list(range(tokens)), "num_prompt_tokens": tokens,
        "num_tokens": tokens, "num_preemptions": 0, "kv_transfer_params": params,
        "lora_request": None, "sampling_params": object(), "block_hashes": [], **fields})


@pytest.fixture
def half():
    return SchedulerHalf(Settings(allowed_targets=("h",), min_tokens=16), None, BLOCK)


def test_all_but_the_last_token_is_loaded_behind_what_vllm_has(half):
    r = request(params={"target": "h:1"})
    assert half.matched_tokens(r, 0) == (39, True)
    assert half.matched_tokens(r, 0) == (39, True)  # asking changes nothing
    assert half.matched_tokens(r, 16) == (23, True)
    half.allocated(r, Blocks(), 23)
    (order,) = half.take_orders().loads
    assert (order.begin, order.end, order.block_ids) == (16, 39, [7, 8, 9])
    assert order.prompt == r.prompt_token_ids
    half.allocated(r, Blocks(), 0)  # the second call, once it is here
    assert not half.take_orders().loads
    assert pickle.loads(pickle.dumps(order)) == order


@pytest.mark.parametrize(("fields", "computed"), [
    ({"tokens": 16}, 0), ({"tokens": 40}, 32), ({"lora_request": object()}, 0),
    ({"mm_features": [1]}, 0), ({"prompt_token_ids": None}, 0), ({"sampling_params": None}, 0),
    ({"prompt_embeds": object()}, 0), ({"params": None}, 0)])
def test_what_is_not_worth_it_or_not_possible_stays(half, fields, computed):
    r = request(**{"params": {"target": "h:1"}, **fields})
    assert half.matched_tokens(r, computed) == (0, False)


def test_a_failed_load_is_not_tried_again_but_a_preempted_request_is(half):
    r = request(params={"target": "h:1"})
    half.matched_tokens(r, 0)
    half.allocated(r, Blocks(), 39)
    half.loads_ended(["r"])
    assert half.matched_tokens(r, 0) == (0, False)
    r.num_preemptions, r.num_tokens = 1, 50  # ten tokens later
    assert half.matched_tokens(r, 0) == (40, True)  # of the prompt, whose last is no longer needed


def test_a_lease_is_held_until_it_is_loaded_and_abandoned_when_it_is_not(half):
    params = {"target": "h:1", "lease": LEASE}
    for end in ("finished", "cached", "loaded"):
        r = request(params=params, request_id=end)
        half.on_new_request(r)
        assert [plan.lease.name for plan in half.take_orders().hold] == ["l"]
        if end == "cached":
            half.allocated(r, Blocks(), 0)
        elif end == "loaded":
            assert half.matched_tokens(r, 0) == (39, True)
            half.allocated(r, Blocks(), 39)
            half.take_orders()
            r.num_preemptions = 1
            assert half.matched_tokens(r, 0) == (0, False)  # a lease is good for one load
            half.loads_ended([end])
        half.request_finished(end)
        orders = half.take_orders()
        assert len(orders.abandon) == (end != "loaded") and not orders.cancel


def test_an_aborted_load_is_cancelled_once(half):
    r = request(params={"target": "h:1"})
    half.matched_tokens(r, 0)
    half.allocated(r, Blocks(), 39)
    half.take_orders()
    half.request_finished("r")
    assert half.take_orders().cancel == ["r"]
    half.request_finished("r")
    assert not half.take_orders().cancel


def test_a_lease_of_another_prompt_fails(half):
    r = request(tokens=39, params={"target": "h:1", "lease": LEASE})
    assert half.matched_tokens(r, 0) == (38, True)  # vLLM's policy decides what follows
    half.allocated(r, Blocks(), 38)
    assert "40 tokens, the prompt 39" in half.take_orders().loads[0].plan.error


def test_a_lease_serves_one_request(half):
    params = {"target": "h:1", "lease": LEASE}
    half.on_new_request(request(params=params, request_id="0_r"))
    half.on_new_request(request(params=params, request_id="1_r"))  # n = 2
    orders = half.take_orders()
    assert len(orders.hold) == 1
    half.request_finished("1_r")
    assert not half.take_orders().abandon  # it is still the first one's
    half.request_finished("0_r")
    assert len(half.take_orders().abandon) == 1


# --- the writers

def forms(blocks, block, heads, d):
    """(name, cache, K and V as [blocks, block, heads, d] in the way the form is documented)"""
    def made(shape, order=None):
        if order is None:
            return torch.full(shape, -1.0)
        memory = torch.full([shape[i] for i in order], -1.0)  # another order of strides
        return memory.permute([order.index(i) for i in range(len(shape))])

    for order, physical in ((None, "NHD"), ((0, 1, 3, 2, 4), "HND")):
        cache = made((2, blocks, block, heads, d), order)
        yield f"2,B,N,H,D {physical}", cache, cache[0], cache[1]
        cache = made((blocks, 2, block, heads, d), order)
        yield f"B,2,N,H,D {physical}", cache, cache[:, 0], cache[:, 1]
    cache = made((2, blocks, heads, block, d))
    yield "2,B,H,N,D", cache, cache[0].transpose(1, 2), cache[1].transpose(1, 2)
    for order in (None, (0, 2, 1, 3)):
        cache = made((blocks, heads, block, 2 * d), order)
        packed = cache.transpose(1, 2)
        yield f"B,H,N,2D {order}", cache, packed[..., :d], packed[..., d:]
    cache = made((blocks, block, heads, 2 * d))
    yield "B,N,H,2D", cache, cache[..., :d], cache[..., d:]


@pytest.mark.parametrize(("blocks", "block", "heads", "d"), [(5, 16, 3, 8), (3, 16, 2, 4),
                                                             (7, 32, 8, 64)])
def test_every_form_of_cache_gets_its_rows(blocks, block, heads, d):
    torch.manual_seed(0)
    for name, cache, keys, values in forms(blocks, block, heads, d):
        ids = torch.randperm(blocks)[:2].tolist()
        first, count = 3, block + 5
        slots = kv_writer.Slots(ids, block, first, count)
        k, v = torch.randn(2, heads, first + count + 2, d)[..., first:first + count, :]
        kv_writer.strided_writer(cache, heads, d)(k, v, slots)
        expected_k, expected_v = torch.full((2, blocks, block, heads, d), -1.0)
        for i in range(count):
            place = (ids[(first + i) // block], (first + i) % block)
            expected_k[place], expected_v[place] = k[:, i], v[:, i]
        assert torch.equal(keys, expected_k) and torch.equal(values, expected_v), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_cache_on_a_gpu_gets_what_lies_there(dtype):
    """Tensors of a cache over cuda_ipc: views within one piece of memory, of part of the tokens."""
    blocks, block, heads, d, first, count = 9, 16, 3, 64, 5, 100
    for name, cache, _, _ in forms(blocks, block, heads, d):
        # Strides as they were: the form's own memory is another's order.
        there, here = (torch.empty_strided(cache.shape, cache.stride(), dtype=dtype, device=where)
                       for where in ("cuda", "cpu"))
        there.fill_(-1), here.fill_(-1)
        memory = torch.randn(2, heads, first + count + 2, d, device="cuda").to(dtype)
        slots = kv_writer.Slots(list(range(blocks - 1, -1, -1)), block, first, count)
        k, v = (kv_writer.as_tensor(x)[:, first:first + count] for x in memory)
        assert k.data_ptr() == memory[0, :, first:].data_ptr()
        kv_writer.strided_writer(there, heads, d)(k, v, slots)
        kv_writer.strided_writer(here, heads, d)(k.cpu(), v.cpu(), slots)
        assert torch.equal(there.cpu(), here), name


@pytest.mark.parametrize("shape", [(3, 5, 16, 3, 8), (5, 16, 3, 8), (5, 16, 4, 16), (2, 5, 16, 24),
                                   (5, 2, 16, 3, 9)])
def test_an_unknown_form_is_refused(shape):
    with pytest.raises(ValueError, match=r"of no form known here"):
        kv_writer.block_views(torch.zeros(shape), 3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_writer_does_what_vllm_does(dtype):
    """Blocks are packed for the instruction set: only vLLM's own backend knows how."""
    from vllm.platforms import current_platform
    current_platform.import_kernels()
    from vllm.v1.attention.backends import cpu_attn

    heads, block, d, count = 3, 32, 64, 75
    layer = types.SimpleNamespace(isa=cpu_attn._get_attn_isa(dtype, block, d),
                                  _k_scale_float=1.0, _v_scale_float=1.0)
    k, v = torch.randn(2, heads, count + 1, d).to(dtype)[..., :count, :]
    slots = kv_writer.Slots([4, 0, 2], block, 0, count)
    ours, theirs = torch.zeros(2, 5, heads, block, 2 * d, dtype=dtype)
    kv_writer.cpu_writer(ours, layer)(k, v, slots)
    impl = types.SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto")
    cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update(
        impl, layer, k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous(), theirs,
        slots.tokens)
    assert torch.equal(ours, theirs) and ours.abs().sum() > 0


def test_tensors_are_taken_as_they_are():
    tensor = torch.randn(2, 3, 4)
    assert kv_writer.as_tensor(tensor) is tensor


# --- the report

def test_reports_add_up_and_travel():
    a, b = LoadStats(), LoadStats()
    assert a.is_empty()
    a.loaded(1.5, 10, 100)
    b.loaded(0.5, 5, 50)
    b.failed("r1", PrefilldError(grpc.StatusCode.UNAVAILABLE, "gone"))
    b.failed("r2", PrefilldError(grpc.StatusCode.UNIMPLEMENTED, "what"))
    b.aborted()
    b.running(3)
    total = a.aggregate(LoadStats(data=pickle.loads(pickle.dumps(b.to_dict()))))
    assert total.data["failures"] == {"unavailable": 1, "other": 1}
    assert total.reduce() == {"prefilld loads": 2, "tokens": 15, "MB": 0.0, "mean load s": 1.0,
                              "aborted": 1, "failed": 2}
    assert total.data["running"] == 3


def test_a_reason_is_told_once_and_to_its_request():
    reasons = FailureReasons()
    reasons.learn({"cmpl-1-0-abcd": "one", "cmpl-12-0-abcd": "two"})
    assert reasons.take("cmpl-12") == "two"
    assert reasons.take("cmpl-1") == "one"
    assert reasons.take("cmpl-1") is None
    reasons.learn({str(i): "x" for i in range(5000)})
    assert len(reasons._reasons) == 1024  # bounded


def test_vllms_answer_names_the_reason():
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import GenerationError

    FailureReasons.install().learn({"cmpl-7-0-x": "UNAVAILABLE: nobody there"})
    serving = object.__new__(GenerateBaseServing)
    with pytest.raises(GenerationError, match="could not be loaded: UNAVAILABLE: nobody there"):
        serving._raise_if_error("error", "cmpl-7")
    with pytest.raises(GenerationError, match="Internal server error"):
        serving._raise_if_error("error", "cmpl-7")  # another request's failure
    serving._raise_if_error("stop", "cmpl-7")
