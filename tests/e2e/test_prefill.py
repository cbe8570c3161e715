"""Prefill: the KV cache and logits it makes, how the work is shared, and what it refuses."""

import concurrent.futures
import json

import grpc
import numpy as np
import pytest
from google.protobuf import duration_pb2

from e2e import attending, harness, prefilling, safetensors_file
from e2e.conftest import FIXTURES, ROOT
from e2e.harness import refused
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import model_service_pb2
from prefilld.v1 import prefill_service_pb2 as pb
from prefilld.v1 import tensor_pb2
from spec import llama
from spec import sparse_attention as spec

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PARITY = 1e-4  # relative Frobenius error in float32


def assert_same_model(pulled, logits, expected):
    """Pulled [(k, v)] and logits against the reference, layer by layer."""
    keys, values, expected_logits = expected
    assert len(pulled) == len(keys)
    for layer, ((k, v), ref_k, ref_v) in enumerate(zip(pulled, keys, values)):
        for name, got, ref in (("K", k, ref_k), ("V", v, ref_v)):
            error = prefilling.relative_error(got, ref)
            assert error <= PARITY, f"{name} of layer {layer}: relative error {error:.3g}"
    assert prefilling.relative_error(logits, expected_logits) <= PARITY


# At the sparse lengths no choice of a block is so close that float32 activations turn it.
@pytest.mark.parametrize("method,tokens", [
    ("dense", 1), ("dense", 127), ("dense", 128), ("dense", 129), ("dense", 500),
    ("joint", 129), ("joint", 1000), ("flexprefill", 1000)])
def test_kv_and_logits_equal_the_reference(server, tiny, method, tokens):
    ids = tiny.tokens(tokens)
    policy = spec.Policy(method, .8, min_budget=128 if method == "flexprefill" else None)
    sparsity = attending.policy(method, gamma=.8, min_budget_tokens=policy.min_budget or 0)
    with prefilling.prefilled(server, ids, sparsity=sparsity, return_logits=True) as done:
        data = prefilling.pull(server, done.ready)
    pulled = prefilling.arrays(data, tiny.config, tokens)
    assert_same_model(pulled, done.logits, llama.prefill(tiny.config, tiny.weights, ids, policy))
    if tokens == 1000:
        assert done.summary.sparsity.mean_density < .99


@pytest.mark.parametrize("name", [path.name for path in FIXTURES])
def test_kv_and_logits_equal_transformers(server, name):
    """Small models of every variant, with what transformers computes from them."""
    directory = ROOT / "tests/fixtures/models" / name
    expected = safetensors_file.load(directory / "expected.safetensors")
    config = json.loads((directory / "config.json").read_text())
    ids = expected["token_ids"].tolist()
    with prefilling.prefilled(server, ids, model=name, return_logits=True) as done:
        wide = kv.KvLayout(data_type=tensor_pb2.DATA_TYPE_F32)
        data = prefilling.pull(server, done.ready, layout=wide)
    pulled = prefilling.arrays(data, config, len(ids))
    got = {"k": np.stack([k.transpose(1, 0, 2) for k, _ in pulled]),
           "v": np.stack([v.transpose(1, 0, 2) for _, v in pulled]), "logits": done.logits}
    for part, array in got.items():
        own = expected.get("own_error_" + part)  # of transformers in the checkpoint's own dtype
        limit = PARITY if own is None else 1.5 * own[0]
        assert array.shape == expected[part].shape
        assert prefilling.relative_error(array, expected[part]) <= limit, part


def test_events_come_in_the_order_of_the_contract(server, tiny):
    layers = tiny.config["num_hidden_layers"]
    with prefilling.prefilled(server, tiny.tokens(200), return_logits=True,
                              request_id="events") as done:
        assert done.order == (["admission"] + ["layer_ready"] * layers
                              + ["logits", "kv_ready", "summary"])
        assert [event.layer for event in done.layers] == list(range(layers))
        assert all(event.density == 1 for event in done.layers)
        lease = done.admission.lease
        assert done.admission.request_id == "events"
        assert (lease.layers, lease.tokens) == (layers, 200)
        assert lease.name and lease.boot_id and lease.ttl.ToMilliseconds() > 0
        assert (done.ready.name, done.ready.generation) == (lease.name, lease.generation)
        assert done.summary.tokens == 200
        assert done.summary.linear.ToNanoseconds() > 0
        model = server.models.GetModel(model_service_pb2.GetModelRequest(name="tiny"))
        assert done.admission.fingerprint == model.fingerprint


def test_models_are_described(server, tiny):
    listed = server.models.ListModels(model_service_pb2.ListModelsRequest()).models
    assert sorted(m.name for m in listed) == sorted(["tiny"] + [path.name for path in FIXTURES])
    model, c = next(m for m in listed if m.name == "tiny"), tiny.config
    assert (model.model_type, model.layers, model.q_heads, model.kv_heads, model.head_dim,
            model.hidden_size, model.vocab_size) == (
        "llama", c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"],
        c["head_dim"], c["hidden_size"], c["vocab_size"])
    assert model.kv_bytes_per_token == tiny.kv_bytes(1)
    assert 1 <= model.max_prompt_tokens <= c["max_position_embeddings"]
    assert len(model.fingerprint) == 64
    with refused(grpc.StatusCode.NOT_FOUND) as failure:
        server.models.GetModel(model_service_pb2.GetModelRequest(name="other"))
    assert failure[0].resource == ("model", "other")


def test_validate_only_checks_and_does_nothing(server, tiny):
    before = server.metric("prefilld_tokens_total")
    call = prefilling.Prefill(
        server.prefill, prefilling.request(tiny.tokens(500), validate_only=True)).finish()
    assert call.order == []
    with refused(INVALID, r"token_ids"):
        prefilling.Prefill(server.prefill,
                           prefilling.request([10**6], validate_only=True)).finish()
    assert server.metric("prefilld_tokens_total") == before


def test_pulls_follow_the_computation(server, tiny):
    """A pull opened right after admission gets layer 0 before the last layer is ready."""
    tokens = 6000
    call = prefilling.start(server, tiny.tokens(tokens))
    stream = prefilling.open_pull(server, call.admission.lease)
    first = next(iter(stream))
    assert (first.layer, first.tensor_index, first.byte_offset) == (0, 0, 0)
    assert not call.stream.done()
    data = {0: [bytearray(first.data), bytearray()]}
    position = (0, 1, 0) if first.last else (0, 0, len(first.data))
    prefilling.collect(prefilling.checked(stream, position), into=data)
    call.finish()
    assert sum(len(part) for layer in data.values() for part in layer) == tiny.kv_bytes(tokens)
    assert prefilling.pull(server, call.ready) == data  # the same bytes, pulled again at leisure
    prefilling.release(server, call.ready)


def test_many_prompts_at_once_give_the_same_kv_as_alone(server, tiny):
    lengths = [1, 5, 64, 127, 128, 129, 200, 300, 31, 500, 2, 260]
    methods = ["dense", "joint"]

    def prefill_one(index):
        with prefilling.prefilled(server, tiny.tokens(lengths[index], seed=index),
                                  method=methods[index % 2], return_logits=True) as done:
            data = prefilling.pull(server, done.ready)
            return prefilling.arrays(data, tiny.config, lengths[index]), done.logits

    alone = [prefill_one(i) for i in range(len(lengths))]
    with concurrent.futures.ThreadPoolExecutor(len(lengths)) as pool:
        together = list(pool.map(prefill_one, range(len(lengths))))
    for (kv_alone, logits_alone), (kv_together, logits_together) in zip(alone, together):
        for (k0, v0), (k1, v1) in zip(kv_alone, kv_together):
            assert prefilling.relative_error(k1, k0) <= 1e-5
            assert prefilling.relative_error(v1, v0) <= 1e-5
        assert prefilling.relative_error(logits_together, logits_alone) <= 1e-5


def test_a_request_id_attaches_to_the_running_work(server, tiny):
    ids = tiny.tokens(4000)
    before = server.metric("prefilld_tokens_total")
    first = prefilling.start(server, ids, request_id="twice")
    second = prefilling.start(server, ids, request_id="twice")
    assert first.admission.lease.name == second.admission.lease.name
    with refused(INVALID, "request_id"):
        prefilling.start(server, ids[:-1], request_id="twice")
    first.finish()
    second.finish()
    assert first.ready.name == second.ready.name
    assert second.summary.request_id == "twice"
    assert server.metric("prefilld_tokens_total") - before == 4000
    prefilling.release(server, first.ready)


def test_one_of_two_callers_may_leave(server, tiny):
    ids = tiny.tokens(4000)
    first = prefilling.start(server, ids, request_id="leave")
    second = prefilling.start(server, ids, request_id="leave")
    first.stream.cancel()
    second.finish()
    assert second.summary is not None
    prefilling.release(server, second.ready)


def test_a_request_id_may_be_used_again_once_its_work_is_over(server, tiny):
    for tokens in (10, 20):
        with prefilling.prefilled(server, tiny.tokens(tokens), request_id="again") as done:
            assert done.admission.lease.tokens == tokens


def test_cancelling_stops_the_work_and_frees_the_cache(server, tiny):
    before = server.metric("prefilld_tokens_total")
    call = prefilling.start(server, tiny.tokens(6000))
    harness.eventually(lambda: server.metric("prefilld_requests_running") == 1)
    call.stream.cancel()
    harness.eventually(lambda: server.metric("prefilld_requests_running") == 0)
    assert server.metric("prefilld_leases_active") == 0
    assert server.metric("prefilld_tokens_total") == before


# --- refusals -------------------------------------------------------------------------------------

BAD_REQUESTS = {
    "empty prompt": (dict(token_ids=[]), "token_ids"),
    "token out of range": (dict(token_ids=[1, 2, 320]), "token_ids"),
    "token 2^32-1": (dict(token_ids=[2**32 - 1]), "token_ids"),
    "prompt over the limit": (dict(token_ids=[1] * 16385), "token_ids"),
    "prompt far over the limit": (dict(token_ids=[1] * 600_000), "token_ids"),
    "long model name": (dict(token_ids=[1], model="m" * 129), "model"),
    "priority 101": (dict(token_ids=[1], priority=101), "priority"),
    "request_id with a newline": (dict(token_ids=[1], request_id="a\nb"), "request_id"),
    "ttl 0": (dict(token_ids=[1], lease_ttl=0), "lease_ttl"),
    "ttl -1": (dict(token_ids=[1], lease_ttl=-1), "lease_ttl"),
    "ttl of a century": (dict(token_ids=[1], lease_ttl=3e9), "lease_ttl"),
    "gamma 1": (dict(token_ids=[1], sparsity=attending.policy("joint", gamma=1)),
                r"sparsity\.gamma"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_invalid_request(server, tiny, case):
    fields, field = BAD_REQUESTS[case]
    with refused(INVALID, field):
        prefilling.start(server, **fields)
    with prefilling.prefilled(server, tiny.tokens(20)) as done:
        assert done.summary


def test_gamma_1_says_what_to_use_instead(server):
    with refused(INVALID) as failure:
        prefilling.start(server, [1], sparsity=attending.policy("joint", gamma=1))
    assert "dense" in failure[0].message


def test_a_duration_out_of_its_range_is_invalid(server):
    message = prefilling.request([1])
    message.destination.lease_ttl.CopyFrom(duration_pb2.Duration(seconds=2**62, nanos=-7))
    with refused(INVALID, "lease_ttl"):
        prefilling.Prefill(server.prefill, message).admit()


def test_unknown_model(server):
    with refused(grpc.StatusCode.NOT_FOUND) as failure:
        prefilling.start(server, [1], model="gpt-5")
    assert failure[0].resource == ("model", "gpt-5")


@pytest.mark.parametrize("change", ["exact reuse", "approximate reuse"])
def test_legal_but_unserved(server, change):
    message = prefilling.request([1])
    if change == "exact reuse":
        message.prefix_reuse.mode = pb.PrefixReuse.MODE_EXACT
    else:
        message.prefix_reuse.mode = pb.PrefixReuse.MODE_APPROXIMATE
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        prefilling.Prefill(server.prefill, message).admit()


def test_a_cache_on_a_gpu_needs_one(server):
    message = prefilling.request([1])
    message.destination.transport = kv.TRANSPORT_CUDA_IPC
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        prefilling.Prefill(server.prefill, message).admit()


@pytest.mark.parametrize("change", ["transport", "reuse", "dtype"])
def test_unknown_enum_values_are_refused(server, change):
    message = prefilling.request([1])
    if change == "transport":
        message.destination.transport = 42
    elif change == "reuse":
        message.prefix_reuse.mode = 42
    else:
        message.destination.layout.data_type = 42
    with refused(INVALID):
        prefilling.Prefill(server.prefill, message).admit()


def test_a_layout_that_is_not_served_is_refused_at_admission(server):
    message = prefilling.request([1])
    message.destination.layout.physical_order[:] = [
        kv.AXIS_LAYER, kv.AXIS_KV, kv.AXIS_BLOCK, kv.AXIS_TOKEN, kv.AXIS_HEAD, kv.AXIS_CHANNEL]
    message.destination.layout.block_size = 16
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        prefilling.Prefill(server.prefill, message).admit()


# --- through the command line ---------------------------------------------------------------------


def test_prefillctl_prefill(server, tiny, tmp_path):
    ids = tiny.tokens(300)
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    done = harness.prefillctl(server, "--json", "prefill", "--model=tiny", "--method=joint",
                              "--gamma=.9", f"--tokens={tmp_path}/ids.json",
                              f"--kv_out={tmp_path}/kv.safetensors",
                              f"--logits_out={tmp_path}/l.safetensors")
    printed = json.loads(done.stdout)
    assert printed["tokens"] == 300 and printed["transport"] == "grpc"
    assert printed["density"] == pytest.approx(1)
    assert printed["ran"] == {"joint": 16}, "4 layers of 4 heads"
    file = safetensors_file.load(tmp_path / "kv.safetensors")
    layers = tiny.config["num_hidden_layers"]
    assert set(file) == {f"layers.{i}.{x}" for i in range(layers) for x in "kv"}
    pulled = [(file[f"layers.{i}.k"], file[f"layers.{i}.v"]) for i in range(layers)]
    logits = next(iter(safetensors_file.load(tmp_path / "l.safetensors").values())).ravel()
    assert_same_model(pulled, logits,
                      llama.prefill(tiny.config, tiny.weights, ids, spec.Policy("joint", .9)))
    report = harness.prefillctl(server, "--json", "sparsity", f"--request={printed['request_id']}")
    assert json.loads(report.stdout)


def test_prefillctl_says_what_ran_where_the_method_was_left_open(server, tiny, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(tiny.tokens(300)))
    arguments = ["prefill", "--model=tiny", f"--tokens={tmp_path}/ids.json"]
    printed = json.loads(harness.prefillctl(server, "--json", *arguments).stdout)
    assert printed["ran"] == {"dense": 16} and printed["reasons"] == ["below_crossover"]
    text = harness.prefillctl(server, *arguments).stdout
    assert "\nran       dense x 16 (below_crossover)\n" in text


@pytest.mark.parametrize("arguments,code", [
    (["prefill", "--model=none", "--tokens={}/ids.json"], "NOT_FOUND"),
    (["prefill", "--model=tiny", "--tokens={}/ids.json", "--method=joint", "--gamma=2"],
     "INVALID_ARGUMENT"),
    (["sparsity", "--request=none"], "NOT_FOUND")])
def test_prefillctl_names_the_code_of_a_refusal(server, tmp_path, arguments, code):
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    done = harness.prefillctl(server, *(a.format(tmp_path) for a in arguments), check=False)
    assert done.returncode != 0 and code in done.stderr


@pytest.mark.parametrize("content", ["", "{}", "[1, -1]", "[1, \"a\"]", "[1.5]", "[1", "[]",
                                     "[99999999999999999999]"])
def test_prefillctl_refuses_a_broken_list_of_tokens(server, tmp_path, content):
    (tmp_path / "ids.json").write_text(content)
    done = harness.prefillctl(server, "prefill", "--model=tiny", f"--tokens={tmp_path}/ids.json",
                              check=False)
    assert done.returncode == 1 and done.stderr.strip()


@pytest.mark.parametrize("damage", ["missing", "empty", "header_length", "offsets", "dtype"])
def test_prefillctl_refuses_a_broken_tensor_file(server, tmp_path, damage):
    path = tmp_path / "in.safetensors"
    safetensors_file.save(path, dict(zip("qkv", attending.small(tokens=10))))
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "header_length":
        path.write_bytes(b"\xff" * 8 + raw[8:])
    elif damage == "offsets":
        path.write_bytes(raw[:-100])
    else:
        path.write_bytes(raw.replace(b'"F32"', b'"I64"', 1))
    done = harness.prefillctl(server, "attend", f"--in={path}", f"--out={tmp_path}/o", check=False)
    assert done.returncode != 0 and done.stderr.strip()


def test_prefillctl_health_and_models(server):
    harness.prefillctl(server, "health")
    assert "tiny" in harness.prefillctl(server, "models").stdout
    assert json.loads(harness.prefillctl(server, "--json", "models").stdout)


def test_prefillctl_says_unavailable_where_nobody_listens(server):
    class Nowhere:
        target = "127.0.0.1:1"
    done = harness.prefillctl(Nowhere, "health", check=False)
    assert done.returncode != 0 and "UNAVAILABLE" in done.stderr


def test_a_kv_pulled_in_another_dtype_is_converted(server, tiny):
    with prefilling.prefilled(server, tiny.tokens(200)) as done:
        exact = prefilling.arrays(prefilling.pull(server, done.ready), tiny.config, 200)
        half = prefilling.pull(server, done.ready, layout=kv.KvLayout(
            data_type=tensor_pb2.DATA_TYPE_F16))
    for (k, v), (k16, v16) in zip(exact, prefilling.arrays(half, tiny.config, 200, np.float16)):
        np.testing.assert_array_equal(k16, k.astype(np.float16))
        np.testing.assert_array_equal(v16, v.astype(np.float16))
