"""Stock vLLM decodes from prefilld's KV and produces its own text."""

import concurrent.futures
import contextlib
import dataclasses

import pytest

import faults
import rig
from e2e import harness
from prefilld import PrefillClient
from vllm_server import VllmError, VllmServer

ALONE = {"min_tokens": 10 ** 6}  # the connector keeps out of it
KV_BLOCKS = 70                   # of 128 tokens: the longest prompt and a little more
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def prefilld(tmp_path_factory):
    with rig.prefilld(tmp_path_factory.mktemp("prefilld") / "log.jsonl") as server:
        yield server


@pytest.fixture(scope="module")
def shared(prefilld, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "log"
    with VllmServer(rig.MODEL, log, {"target": prefilld.target, "method": "dense"},
                    flags=[f"--num-gpu-blocks-override={KV_BLOCKS}"]) as vllm:
        yield vllm


@pytest.fixture
def vllm(shared, prefilld):
    """Afterwards nothing is left on either side."""
    before = prefilld.footprint()
    yield shared
    harness.eventually(lambda: prefilld.footprint() == before, message="prefilld at rest")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting",
                 "vllm:prefilld_loads_running", "vllm:kv_cache_usage_perc"):
        harness.eventually(lambda name=name: shared.metric(name) == 0, message=f"{name} 0")


def own_text(vllm, prompt, tokens=NEW_TOKENS):
    """What vLLM says when it computes the prompt itself; the salt keeps its cache apart."""
    return vllm.complete(prompt, ALONE, tokens, cache_salt=f"alone-{len(prompt)}")


@contextlib.contextmanager
def counted(vllm):
    """The block's prompt tokens by source, once it is over."""
    before, moved = vllm.prompt_tokens(), {}
    yield moved
    moved.update({source: count - before[source] for source, count in vllm.prompt_tokens().items()})


def test_eight_at_a_time_give_vllms_own_text(vllm, prefilld, document):
    lengths = (200, 257, 640, 1025, 384, 900, 2000, 511)
    prompts = [document[i * 11:][:n] for i, n in enumerate(lengths)]
    own = [own_text(vllm, prompt) for prompt in prompts]
    before = prefilld.metrics()
    with counted(vllm) as moved:
        assert vllm.complete_all(prompts, tokens=NEW_TOKENS) == own
    assert moved["local_compute"] == len(prompts)
    assert moved["external_kv_transfer"] == sum(map(len, prompts)) - len(prompts)
    # Same host: nothing was sent.
    assert harness.moved(before, prefilld.metrics(), "prefilld_handoff_bytes_total",
                         transport="posix_shm") == sum(map(len, prompts)) * 46080


def test_only_what_vllm_has_not_cached_is_loaded(vllm, document):
    prompt = document[3000:3700]
    own = own_text(vllm, prompt)
    assert vllm.complete(prompt[:400], tokens=1)
    with counted(vllm) as moved:
        assert vllm.complete(prompt, tokens=NEW_TOKENS) == own
    assert moved == {"local_cache_hit": 384, "external_kv_transfer": 315, "local_compute": 1}
    with counted(vllm) as moved:
        assert vllm.complete(prompt, tokens=NEW_TOKENS) == own
    assert moved["external_kv_transfer"] == 0  # fewer tokens than are worth it


def test_sparse_kv_never_serves_a_dense_request(vllm, document):
    prompt = document[1000:3000]
    own = own_text(vllm, prompt)
    joint = vllm.complete(prompt, {"method": "joint", "gamma": 0.5}, NEW_TOKENS)
    with counted(vllm) as moved:
        assert vllm.complete(prompt, {"method": "dense"}, NEW_TOKENS) == own
    assert moved["local_cache_hit"] == 0
    with counted(vllm) as moved:
        assert vllm.complete(prompt, {"method": "joint", "gamma": 0.5}, NEW_TOKENS) == joint
    assert moved["local_cache_hit"] > 0


@pytest.mark.parametrize("when", ["computed", "computing"])
def test_a_router_hands_its_lease_over(vllm, prefilld, document, when):
    prompt = document[4000:4700] if when == "computed" else document[4200:4900]
    own = own_text(vllm, prompt)
    with PrefillClient(prefilld.target) as client:
        run = client.prefill("smol", prompt, method="dense")
        if when == "computed":
            assert run.summary
        params = {"target": prefilld.target, "lease": dataclasses.asdict(run.detach()),
                  "tokens": len(prompt), "fingerprint": run.model.fingerprint}
        with counted(vllm) as moved:
            assert vllm.complete(prompt, params, NEW_TOKENS) == own
    assert moved["local_compute"] == 1
    assert prefilld.metric("prefilld_leases_active") == 0


def test_a_lease_of_another_prompt_is_computed_again(vllm, prefilld, document):
    prompt = document[100:500]
    own = own_text(vllm, prompt)
    with PrefillClient(prefilld.target) as client:
        run = client.prefill("smol", prompt + prompt[:1], method="dense")
        params = {"target": prefilld.target, "lease": dataclasses.asdict(run.detach())}
        assert vllm.complete(prompt, params, NEW_TOKENS) == own
    assert vllm.metric("vllm:prefilld_load_failures_total", reason="invalid_argument") == 1


def test_a_lease_that_claims_other_layers_is_computed_again(vllm, prefilld, document):
    prompt = document[1500:1900]
    own = own_text(vllm, prompt)
    for layers in (0, 1, 31):
        with PrefillClient(prefilld.target) as client:
            run = client.prefill("smol", prompt, method="dense")
            lease = {**dataclasses.asdict(run.detach()), "layers": layers}
        params = {"target": prefilld.target, "lease": lease, "method": "dense"}
        with counted(vllm) as moved:
            assert vllm.complete(prompt, params, NEW_TOKENS, cache_salt=str(layers)) == own
        assert moved["external_kv_transfer"] == 0


def test_one_lease_for_two_answers_loads_once(vllm, prefilld, document):
    prompt = document[2500:2900]
    own = own_text(vllm, prompt)
    with PrefillClient(prefilld.target) as client:
        lease = dataclasses.asdict(client.prefill("smol", prompt, method="dense").detach())
    status, body = vllm.post("/v1/completions", prompt=prompt, n=2, max_tokens=NEW_TOKENS, seed=1,
                             temperature=0.7, top_k=1, return_token_ids=True,
                             kv_transfer_params={"target": prefilld.target, "lease": lease})
    assert status == 200, body
    assert [choice["token_ids"] for choice in body["choices"]] == [own, own]


def test_chat_and_text_go_the_same_way(vllm, document):
    words = "The quick brown fox jumps over the lazy dog. " * 40
    for path, body in (("/v1/chat/completions", {"messages": [{"role": "user", "content": words}]}),
                       ("/v1/completions", {"prompt": words})):
        def ask(**fields):
            status, answer = vllm.post(path, max_tokens=NEW_TOKENS, temperature=0, **body, **fields)
            assert status == 200, answer
            choice = answer["choices"][0]
            return choice.get("text") or choice["message"]["content"]

        own = ask(kv_transfer_params=ALONE, cache_salt="words")
        with counted(vllm) as moved:
            assert ask() == own
        assert moved["local_compute"] == 1


def test_an_aborted_request_abandons_its_lease(vllm, prefilld, document):
    before = vllm.metric("vllm:prefilld_loads_aborted_total")
    with pytest.raises(TimeoutError):  # the client leaves while prefilld computes
        vllm.post("/v1/completions", timeout=1, prompt=document[:7000], max_tokens=4)
    harness.eventually(lambda: prefilld.metric("prefilld_leases_active") == 0, timeout=20)
    harness.eventually(lambda: vllm.metric("vllm:prefilld_loads_aborted_total") == before + 1,
                       timeout=20)
    prompt = document[:300]
    assert vllm.complete(prompt, tokens=4) == own_text(vllm, prompt, 4)


def test_preempted_requests_go_on_with_their_own_text(vllm, prefilld, document):
    prompts = [document[i:][:1270] for i in range(0, 3000, 500)]
    tokens = 290  # 13 blocks each in the end, of which there are not enough for all six
    own = vllm.complete_all(prompts, ALONE, tokens=tokens, cache_salt="alone")
    with PrefillClient(prefilld.target) as client:  # finished caches: all start at once
        runs = [client.prefill("smol", prompt, method="dense") for prompt in prompts]
        assert all(run.summary for run in runs)
        handed = [{"target": prefilld.target, "lease": dataclasses.asdict(run.detach())}
                  for run in runs]
    before = vllm.metric("vllm:num_preemptions_total")
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as threads:
        texts = list(threads.map(lambda p, h: vllm.complete(p, h, tokens), prompts, handed))
    assert texts == own
    assert vllm.metric("vllm:num_preemptions_total") > before


def test_a_model_that_is_not_vllms_ends_the_start(tmp_path):
    with rig.prefilld(tmp_path / "log.jsonl", models=[("tiny", rig.FIXTURES / "base")]) as server:
        with pytest.raises(VllmError) as failed:
            with VllmServer(rig.MODEL, tmp_path / "vllm.log",
                            {"target": server.target, "model": "tiny"}):
                pass
    log = (tmp_path / "vllm.log").read_text()
    assert failed.value and "layers is 30 here, 2 there" in log


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_no_fault_gives_a_wrong_text_or_none(policy, tmp_path):
    rows = faults.table(1, [policy], tmp_path)
    assert len(rows) == len(faults.FAULTS)
    assert [dataclasses.asdict(row) for row in rows if not row.good] == []
