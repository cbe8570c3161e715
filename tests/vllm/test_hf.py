"""prefill_into_cache with transformers and a real server.

Run in an environment with torch and transformers; SmolLM2 is taken from the build directory.
"""

import contextlib
import copy
import os
import pathlib
import sys
import threading
import time

import grpc
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "client/python"))  # of this checkout, whatever is installed
sys.path += [str(ROOT / "client/python/examples"), str(ROOT / "tests")]

# Before torch: threads that wait do not spin, for torch, prefilld and others share the processors.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers import MistralConfig, MistralForCausalLM  # noqa: E402

from e2e import harness  # noqa: E402
from prefilld import PrefillClient, PrefilldError, RetryPolicy  # noqa: E402
from prefilld.hf import prefill_into_cache  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SMOLLM2 = harness.BUILD / "models" / "SmolLM2-135M-Instruct"
FIXTURES = ROOT / "tests" / "fixtures" / "models"
TEXT = pathlib.Path("/usr/share/common-licenses/GPL-3")
NEW_TOKENS = 96
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
IDS = [5, 90, 17, 3, 3, 44, 60, 8] * 20  # a prompt of the fixtures' vocabulary of 96


@pytest.fixture(scope="module")
def smol():
    return load(SMOLLM2)


@pytest.fixture(scope="module")
def text_ids():
    return Tokenizer(SMOLLM2).encode(TEXT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smol_server(tmp_path_factory):
    log = tmp_path_factory.mktemp("smol") / "log.jsonl"
    with harness.Server(log_path=log, models=[("smol", SMOLLM2)]) as server:
        yield server


SERVED = ("base", "bf16", "f16", "linear", "llama3", "yarn", "dynamic", "qwen2", "qwen3", "glm",
          "mistral")


@pytest.fixture(scope="module")
def fixture_server(tmp_path_factory):
    """Several small models: dtypes of llama, scalings, the other families."""
    log = tmp_path_factory.mktemp("fixtures") / "log.jsonl"
    models = [(name, FIXTURES / name) for name in SERVED]
    with harness.Server(log_path=log, models=models) as server:
        prefill_into_cache(load(FIXTURES / "base"), IDS, target=server.target, model_handle="base")
        yield server


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def tensor(ids):
    return torch.tensor([list(ids)])


@contextlib.contextmanager
def forward_shapes(model):
    """Collects the shape of input_ids of every forward pass."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def base_like(**changes):
    """A model of the fixture `base`'s shape, with changes; its weights are nowhere."""
    config = LlamaConfig.from_pretrained(FIXTURES / "base")
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@contextlib.contextmanager
def refused(server, code, *words):
    """The block raises PrefilldError with all the words, and the server computed nothing."""
    before = server.metrics()
    with pytest.raises(PrefilldError) as caught:
        yield
    assert caught.value.code is code, caught.value
    assert [word for word in words if word not in caught.value.message] == [], caught.value.message
    after = server.metrics()
    for name in ("prefilld_tokens_total", "prefilld_leases_active"):
        assert harness.moved(before, after, name) == 0


# --- what it is for


@pytest.mark.parametrize(("begin", "count"), [
    (0, 2), (1000, 128), (2000, 129), (300, 700), (0, 1500)])
def test_generate_goes_on_as_transformers_alone(smol, smol_server, text_ids, begin, count):
    ids = tensor(text_ids[begin:begin + count])
    alone = smol.generate(ids, **GREEDY)
    with harness.leaves_nothing_behind(smol_server):
        cache = prefill_into_cache(smol, ids, target=smol_server.target, method="dense")
    assert cache.get_seq_length() == count - 1
    assert smol_server.metric("prefilld_leases_ended_total", reason="expired") == 0
    with forward_shapes(smol) as shapes:
        continued = smol.generate(ids, past_key_values=cache, **GREEDY)
    assert continued[0].tolist() == alone[0].tolist()
    assert shapes == [(1, 1)] * NEW_TOKENS


def test_one_forward_over_the_cache_gives_the_last_position(smol, smol_server, text_ids):
    ids = tensor(text_ids[:400])
    cache = prefill_into_cache(smol, ids, target=smol_server.target, method="dense")
    with torch.inference_mode():
        expected = smol(ids, logits_to_keep=1).logits
        got = smol(ids[:, -1:], past_key_values=cache).logits
    assert got.shape == expected.shape
    assert ((got - expected).norm() / expected.norm()).item() < 1e-4


def test_a_copy_of_the_cache_serves_again_and_many_at_once(smol, smol_server, text_ids):
    ids = tensor(text_ids[:300])
    cache = prefill_into_cache(smol, ids, target=smol_server.target, method="dense")
    three = copy.deepcopy(cache)
    three.batch_repeat_interleave(3)
    options = {"max_new_tokens": 8, "do_sample": False}
    for beams, prefilled in ((1, copy.deepcopy(cache)), (1, cache), (3, three)):
        got = smol.generate(ids, past_key_values=prefilled, num_beams=beams, **options)
        assert got.tolist() == smol.generate(ids, num_beams=beams, **options).tolist()


def test_the_summary_says_what_was_skipped(smol, smol_server, text_ids):
    with PrefillClient(smol_server.target) as client:
        cache, summary = prefill_into_cache(
            smol, text_ids[:3000], client=client, model_handle="smol", method="joint", gamma=.8,
            return_summary=True)
        assert client.health().ready  # the caller's connection stays open
    assert cache.get_seq_length() == 2999
    assert summary.tokens == 3000
    assert 0 < summary.report.mean_density < 1


@pytest.mark.parametrize("form", [
    list, np.array, torch.tensor, tensor, lambda ids: [ids],
    lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_prompts_come_in_several_forms(fixture_server, form):
    model = load(FIXTURES / "base")
    cache = prefill_into_cache(model, form(IDS), target=fixture_server.target,
                               model_handle="base", method="dense")
    with torch.inference_mode():
        expected = model(tensor(IDS)).past_key_values
    assert_same(cache, expected, 1e-5)


@pytest.mark.parametrize("transport", ["grpc", "posix_shm"])
def test_the_cache_is_the_callers_own_memory(fixture_server, transport):
    model = load(FIXTURES / "base")
    with PrefillClient(fixture_server.target, transport=transport) as client:
        cache = prefill_into_cache(model, IDS, client=client, model_handle="base", method="dense")
    with torch.inference_mode():
        assert_same(cache, model(tensor(IDS)).past_key_values, 1e-5)
    for layer in cache.layers:  # writing to a mapping of the server's would end this process
        layer.keys.zero_()
        layer.values.zero_()


def test_nothing_of_the_host_is_mapped_afterwards(fixture_server):
    def used():
        return fixture_server.metric("prefilld_descriptors", kind="segments", state="used")

    before = used()
    model = load(FIXTURES / "base")
    with PrefillClient(fixture_server.target, transport="posix_shm") as client:
        cache = prefill_into_cache(model, IDS, client=client, model_handle="base")
        harness.eventually(lambda: used() == before)
    assert cache.get_seq_length() == len(IDS) - 1


def test_an_attention_mask_of_ones_is_accepted(smol, smol_server, text_ids):
    inputs = {"input_ids": tensor(text_ids[:50]), "attention_mask": torch.ones(1, 50)}
    cache = prefill_into_cache(smol, **inputs, target=smol_server.target, method="dense")
    with forward_shapes(smol) as shapes:
        got = smol.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert shapes == [(1, 1)] * 4
    assert got.tolist() == smol.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()


def test_one_token_needs_no_computation(smol, smol_server):
    before = smol_server.metrics()
    cache, summary = prefill_into_cache(smol, [7], target=smol_server.target, return_summary=True)
    assert cache.get_seq_length() == 0 and summary is None
    assert harness.moved(before, smol_server.metrics(), "prefilld_tokens_total") == 0
    options = {"max_new_tokens": 4, "do_sample": False}
    assert (smol.generate(tensor([7]), past_key_values=cache, **options).tolist()
            == smol.generate(tensor([7]), **options).tolist())


# --- dtypes and rope


def assert_same(cache, expected, bound):
    """Relative Frobenius error of each tensor; expected holds one token more."""
    assert len(cache.layers) == len(expected.layers)
    for got, wanted in zip(cache.layers, expected.layers):
        for g, w in ((got.keys, wanted.keys[:, :, :-1]), (got.values, wanted.values[:, :, :-1])):
            assert g.shape == w.shape and g.dtype == w.dtype and g.device == w.device
            error = ((g.double() - w.double()).norm() / w.double().norm()).item()
            assert error <= bound, error


@pytest.mark.parametrize(("name", "dtype", "bound"), [
    ("linear", torch.float32, 1e-5), ("llama3", torch.float32, 1e-5),
    ("yarn", torch.float32, 1e-5), ("dynamic", torch.float32, 1e-5),
    ("qwen2", torch.float32, 1e-5), ("qwen3", torch.float32, 1e-5), ("glm", torch.float32, 1e-5),
    ("bf16", torch.bfloat16, 1e-2), ("f16", torch.float16, 2e-3)])
def test_dtypes_rope_scalings_and_families(fixture_server, name, dtype, bound):
    """The bound of a half dtype is a few of its roundings: both sides round, at other places."""
    model = load(FIXTURES / name)
    with PrefillClient(fixture_server.target) as client:
        cache = prefill_into_cache(model, IDS, client=client, model_handle=name, method="dense")
        with client.prefill(name, IDS, method="dense") as prompt:
            for layer, kept in zip(prompt, cache.layers):  # not a bit changed on the way
                np.testing.assert_array_equal(kept.keys[0].float(), layer.k[:, :-1])
                np.testing.assert_array_equal(kept.values[0].float(), layer.v[:, :-1])
    assert cache.layers[0].keys.dtype is dtype
    with torch.inference_mode():
        assert_same(cache, model(tensor(IDS)).past_key_values, bound)
    with forward_shapes(model) as shapes:
        out = model.generate(tensor(IDS), past_key_values=cache, max_new_tokens=5,
                             min_new_tokens=5, do_sample=False, pad_token_id=2)
    assert shapes == [(1, 1)] * 5 and out.shape == (1, len(IDS) + 5)


# --- refusals

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(("input_ids", "options", "words"), [
    ([], {}, ["empty"]),
    (torch.empty(1, 0, dtype=torch.long), {}, ["empty"]),
    ([[1, 2], [3, 4]], {}, ["[2, 2]", "one prompt"]),
    ([[1, 2], [3]], {}, ["input_ids"]),
    (torch.ones(1, 1, 3, dtype=torch.long), {}, ["[1, 1, 3]"]),
    ("text", {}, ["input_ids"]),
    ([0.5, 1.0], {}, ["float32"]),
    ([True, False], {}, ["bool"]),
    ([3, 96], {}, ["token 96", "position 1", "0 to 95"]),
    ([-1, 3], {}, ["token -1", "position 0"]),
    ([3, 4, 5], {"attention_mask": [0, 1, 1]}, ["hides 1 of 3"]),
    ([3, 4, 5], {"attention_mask": [1, 1]}, ["2 elements", "3"]),
    ([3, 4, 5], {"gamma": 2.0}, ["gamma"]),
    ([3, 4, 5], {"method": "sliding"}, ["sliding", "dense"]),
])
def test_prompts_that_are_refused(fixture_server, input_ids, options, words):
    model = load(FIXTURES / "base")
    with refused(fixture_server, INVALID, *words):
        prefill_into_cache(model, input_ids, target=fixture_server.target, model_handle="base",
                           **options)


def test_padding_that_generate_would_mask_is_refused(fixture_server):
    model = load(FIXTURES / "base")
    model.generation_config.pad_token_id = 3
    where = {"target": fixture_server.target, "model_handle": "base"}
    with refused(fixture_server, INVALID, "padding token 3", "position 1"):
        prefill_into_cache(model, [5, 3, 7], **where)
    prefill_into_cache(model, [5, 3, 7], attention_mask=[1, 1, 1], **where)
    model.generation_config.eos_token_id = [2, 3]  # then generate masks nothing
    prefill_into_cache(model, [5, 3, 7], **where)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(("changes", "words"), [
    ({"num_hidden_layers": 3}, ["layers is 2 there, 3 here"]),
    ({"num_attention_heads": 8}, ["q_heads is 4 there, 8 here"]),
    ({"num_key_value_heads": 1}, ["kv_heads is 2 there, 1 here"]),
    ({"head_dim": 32}, ["head_dim is 64 there, 32 here"]),
    ({"hidden_size": 128}, ["hidden_size is 64 there, 128 here"]),
    ({"vocab_size": 97}, ["vocab_size is 96 there, 97 here"]),
    ({"rope_parameters": ROPE | {"rope_theta": 500.0}}, ["rope theta is 10000.0 there, 500.0"]),
    ({"rope_parameters": LLAMA3}, ["rope scaling is none there, llama3 here"]),
    ({"num_hidden_layers": 1, "vocab_size": 90}, ["layers", "vocab_size"]),
    ({"sliding_window": 64}, ["layer 0", "Sliding"]),
    ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
     ["layer 1", "Sliding"]),
])
def test_models_that_are_not_the_servers(fixture_server, changes, words):
    with refused(fixture_server, PRECONDITION, *words):
        prefill_into_cache(base_like(**changes), IDS, target=fixture_server.target,
                           model_handle="base")


def test_other_families_dtypes_and_weights_are_refused(fixture_server):
    where = {"target": fixture_server.target, "model_handle": "base"}
    shape = LlamaConfig.from_pretrained(FIXTURES / "base").to_dict() | {"model_type": "mistral"}
    with torch.device("meta"):
        mistral = MistralForCausalLM(MistralConfig(**shape | {"sliding_window": None}))
        windowed = MistralForCausalLM(MistralConfig(**shape | {"sliding_window": 64}))
    with refused(fixture_server, PRECONDITION, "model_type is llama there, mistral here"):
        prefill_into_cache(mistral, IDS, **where)
    with refused(fixture_server, PRECONDITION, "Sliding"):
        prefill_into_cache(windowed, IDS, **where)
    with refused(fixture_server, PRECONDITION, "layer 0", "Sliding"):  # though it is the server's
        prefill_into_cache(load(FIXTURES / "mistral"), IDS, target=fixture_server.target,
                           model_handle="mistral")
    with refused(fixture_server, PRECONDITION, "torch.float32 there, torch.bfloat16 here"):
        prefill_into_cache(load(FIXTURES / "base", dtype=torch.bfloat16), IDS, **where)
    with refused(fixture_server, PRECONDITION, "layer 0", "meta"):
        prefill_into_cache(base_like(), IDS, **where)


def test_other_weights_of_the_same_shape_are_refused(fixture_server, tmp_path):
    model = load(FIXTURES / "base")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path)
    other = load(tmp_path)
    where = {"target": fixture_server.target, "model_handle": "base"}
    with refused(fixture_server, PRECONDITION, "fingerprint", str(tmp_path), "check_weights"):
        prefill_into_cache(other, IDS, **where)
    prefill_into_cache(other, IDS, check_weights=False, **where)


@pytest.mark.parametrize(("attribute", "value", "word"), [
    ("hf_quantizer", object(), "quantised"), ("peft_config", {}, "adapters"),
    ("_tp_size", 2, "tensor parallelism")])
def test_models_that_are_not_their_checkpoint_are_refused(fixture_server, attribute, value, word):
    model = load(FIXTURES / "base")
    setattr(model, attribute, value)
    with refused(fixture_server, PRECONDITION, word):
        prefill_into_cache(model, IDS, target=fixture_server.target, model_handle="base")


def test_the_handle_must_name_one_model(fixture_server):
    model = load(FIXTURES / "base")
    with refused(fixture_server, PRECONDITION, f"{len(SERVED)} models", "base, ", "llama3",
                 "model_handle"):
        prefill_into_cache(model, IDS, target=fixture_server.target)
    with refused(fixture_server, grpc.StatusCode.NOT_FOUND, "'none'", "base, ", "llama3"):
        prefill_into_cache(model, IDS, target=fixture_server.target, model_handle="none")


def test_arguments_that_are_not_there_or_twice():
    model = load(FIXTURES / "base")
    for where in ({}, {"client": object(), "target": "127.0.0.1:1"}):
        with pytest.raises(TypeError, match="either client= or target="):
            prefill_into_cache(model, IDS, **where)


def test_unknown_keywords(fixture_server):
    with pytest.raises(TypeError, match="gama"):
        prefill_into_cache(load(FIXTURES / "base"), IDS, target=fixture_server.target,
                           model_handle="base", gama=.9)


# --- failures on the way


def test_an_interrupted_transfer_abandons_the_lease(smol, smol_server, text_ids):
    def interrupt(fraction, phase):
        if phase == "pull" and fraction > .1:
            raise KeyboardInterrupt

    with harness.leaves_nothing_behind(smol_server):
        with pytest.raises(KeyboardInterrupt):
            prefill_into_cache(smol, text_ids[:2000], target=smol_server.target, method="dense",
                               progress=interrupt)


def test_a_deadline_ends_the_work(smol, smol_server, text_ids):
    with harness.leaves_nothing_behind(smol_server):
        with pytest.raises(PrefilldError):
            prefill_into_cache(smol, text_ids[:6000], target=smol_server.target, method="dense",
                               timeout=.3)


def test_a_server_that_dies_in_the_middle_is_an_error(smol, text_ids, tmp_path):
    server = harness.Server(log_path=tmp_path / "log.jsonl", models=[("smol", SMOLLM2)])

    def kill(fraction, phase):
        if phase == "pull" and fraction > .1 and server.process.poll() is None:
            server.process.kill()
            server.process.wait()

    threads = threading.active_count()
    try:
        with PrefillClient(server.target, retry=RetryPolicy(attempts=3)) as client:
            with pytest.raises(PrefilldError) as caught:
                prefill_into_cache(smol, text_ids[:2000], client=client, method="dense",
                                   progress=kill, timeout=30)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        # Neither the thread that renews the lease nor the one that follows it goes on.
        harness.eventually(lambda: threading.active_count() <= threads)
    finally:
        server.channel.close()
        server.process.kill()
        server.process.wait()


def test_no_server_is_an_error_soon():
    begin = time.monotonic()
    with PrefillClient("127.0.0.1:1", retry=RetryPolicy(attempts=2)) as client:
        with pytest.raises(PrefilldError) as caught:
            prefill_into_cache(load(FIXTURES / "base"), IDS, client=client)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - begin < 10
