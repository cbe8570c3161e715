"""The router between a prefilld and a vLLM that are both made of plain Python."""

import asyncio
import contextlib
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import aiohttp
import grpc
import pytest
from aiohttp import web

EXAMPLES = pathlib.Path(__file__).resolve().parents[3] / "client/python/examples"
sys.path.insert(0, str(EXAMPLES))

import router  # noqa: E402
from fake_server import LAYERS, MODEL, Abort, FakeServer, retry_info  # noqa: E402
from prefilld.v1 import sparsity_pb2  # noqa: E402

ABANDONED = 2
FINGERPRINT = "ab" * 32
LONG = list(range(8))       # the threshold is 8 tokens here
SHORT = list(range(7))
WORDS = "a b c d e f g h"   # a token each


class FakePrefilld(FakeServer):
    """With a health service, methods that are not served, and a computation that waits for the
    test."""

    def __init__(self):
        super().__init__()
        self.serving = True
        self.methods = {sparsity_pb2.METHOD_DENSE, sparsity_pb2.METHOD_JOINT}
        self.compute = threading.Event()   # layers come once it is set
        self.compute.set()
        self.silent = self.empty = False   # no admission: for ever, or the stream ends
        self.abandoned = threading.Semaphore(0)   # one permit per stream that went away
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health", {"Check": grpc.unary_unary_rpc_method_handler(
                lambda request, context: b"\x08\x01" if self.serving else b"\x08\x02")}),))

    def Prefill(self, request, context):
        if request.validate_only:
            if request.model != MODEL:
                context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
            if request.sparsity.method not in self.methods:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, "not served yet")
            return
        if self.empty:
            return
        if self.silent:
            self.calls["Prefill"].append(request)
            return self._wait_for(threading.Event(), context)
        for event in super().Prefill(request, context):
            admission = event.WhichOneof("event") == "admission"
            if admission:
                event.admission.fingerprint = FINGERPRINT
            yield event
            if admission and not self._wait_for(self.compute, context):
                return

    def _wait_for(self, event, context):
        while not event.wait(0.01):
            if not context.is_active():
                self.abandoned.release()
                return False
        return True


class FakeVllm:
    """Tokenises by words. Answers with `chunks`, each of which needs a permit."""

    def __init__(self):
        self.status = 200
        self.chunks = [b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"]
        self.permits = asyncio.Semaphore(100)
        self.break_off = False
        self.tokenize_status = 200
        self.questions, self.bodies, self.headers = [], [], []
        self.cancelled = 0

    def app(self):
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        return app

    async def models(self, request):
        return web.json_response({"data": [MODEL]})

    async def health(self, request):
        return web.Response(status=self.status)

    async def tokenize(self, request):
        question = await request.json()
        self.questions.append(question)
        texts = [question["prompt"]] if "prompt" in question else [
            m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]
            for m in question["messages"]]
        tokens = [ord(word[0]) for text in texts for word in text.split()]
        return web.json_response({"tokens": tokens, "count": len(tokens), "max_model_len": 99},
                                 status=self.tokenize_status)

    async def complete(self, request):
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        if self.status != 200:
            return web.json_response({"error": "of vLLM"}, status=self.status)
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream",
                                                   "X-Request-Id": "of vLLM"})
            await response.prepare(request)
            for chunk in self.chunks:
                await self.permits.acquire()
                await response.write(chunk)
                if self.break_off:
                    request.transport.abort()
            return response
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class World:
    """A router on a port of its own, with everything around it."""

    def __init__(self, url, client, vllm, servers):
        self.url, self.client, self.vllm, self.servers = url, client, vllm, servers

    async def post(self, body=None, path="/v1/completions", **fields):
        """(status, x-prefilld, text)"""
        body = {"model": MODEL, "prompt": LONG} if body is None else body
        async with self.client.post(self.url + path, json={**body, **fields}) as answer:
            return answer.status, answer.headers.get("x-prefilld"), await answer.text()

    async def metric(self, name):
        async with self.client.get(self.url + "/metrics") as answer:
            found = re.search(rf"^{re.escape(name)} (.*)$", await answer.text(), re.MULTILINE)
        return float(found.group(1))

    async def outstanding(self, server):
        return await self.metric(f'router_outstanding_tokens{{target="{server.target}"}}')

    async def all_computed(self):
        for server in self.servers:
            while await self.outstanding(server) != 0:
                await asyncio.sleep(0.01)

    async def all_given_back(self):
        await eventually(lambda: all(len(s.calls["ReleaseLease"]) == len(s.calls["Prefill"])
                                     for s in self.servers))
        for server in self.servers:
            assert {r.reason for r in server.calls["ReleaseLease"]} <= {ABANDONED}
        await self.all_computed()


async def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def served(app, **options):
    runner = web.AppRunner(app, handler_cancellation=True, **options)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def world(servers, *flags, ready=True):
    vllm = FakeVllm()
    async with served(vllm.app(), shutdown_timeout=0.1) as vllm_url:
        made = router.Router(router.parse_args([
            f"--vllm={vllm_url}", f"--model={MODEL}", "--min_tokens=8",
            *(f"--prefilld={server.target}" for server in servers), *flags]))
        async with (served(made.app(), shutdown_timeout=1) as url,
                    aiohttp.ClientSession() as client):
            if ready:
                await eventually(lambda: all(server.ready for server in made._servers))
            yield World(url, client, vllm, servers)


@pytest.fixture
def two(monkeypatch):
    """Two servers; of two that are as busy the first is taken."""
    monkeypatch.setattr(router.random, "random", lambda: 0)
    fakes = [FakePrefilld(), FakePrefilld()]
    yield fakes
    for fake in fakes:
        fake.compute.set()
        fake.stop()


@pytest.fixture
def one(two):
    return two[:1]


def run(test, *args, **options):
    async def bounded():
        async with world(*args, **options) as w:
            await asyncio.wait_for(test(w), 30)
    asyncio.run(bounded())


# --- what is handed over

def test_token_ids_are_handed_over_with_the_lease(one):
    async def test(w):
        status, mark, text = await w.post(temperature=0.5, stream=True)
        request_id = one[0].calls["Prefill"][0].request_id
        lease = f"{request_id}/{len(LONG)}"
        assert (status, mark) == (200, f"target={one[0].target}; request={request_id}")
        assert text == "".join(chunk.decode() for chunk in w.vllm.chunks)
        assert w.vllm.bodies == [{
            "model": MODEL, "prompt": LONG, "temperature": 0.5, "stream": True,
            "kv_transfer_params": {
                "target": one[0].target, "tokens": len(LONG), "fingerprint": FINGERPRINT,
                "model": MODEL, "lease": {
                    "name": lease, "generation": 7, "boot_id": "boot", "layers": LAYERS,
                    "tokens": len(LONG), "ttl": 60.0}}}]
        request = one[0].calls["Prefill"][0]
        assert (list(request.token_ids), request.model) == (LONG, MODEL)
        assert not w.vllm.questions
        assert not one[0].calls["ReleaseLease"]  # vLLM's to release
        assert await w.metric('router_requests_total{path="prefilld"}') == 1
        assert await w.metric("router_prefill_admission_seconds_count") == 1
        await w.all_computed()
    run(test, one)


def test_text_is_tokenised_by_vllm_and_travels_as_tokens(one):
    async def test(w):
        for prompt in WORDS, [WORDS]:
            assert (await w.post(prompt=prompt, add_special_tokens=False, seed=3))[0] == 200
        tokens = [ord(c) for c in "abcdefgh"]
        assert w.vllm.questions == 2 * [
            {"model": MODEL, "prompt": WORDS, "add_special_tokens": False}]
        assert [list(r.token_ids) for r in one[0].calls["Prefill"]] == [tokens, tokens]
        assert all(body["prompt"] == tokens and body["seed"] == 3 for body in w.vllm.bodies)
    run(test, one)


def test_chat_is_tokenised_by_vllm_and_stays_chat(one):
    async def test(w):
        body = {"messages": [{"role": "system", "content": "a b c d"},
                             {"role": "user", "content": [{"type": "text", "text": "e f g h"}]}],
                "chat_template_kwargs": {"x": 1}, "tools": [{"type": "function"}], "top_p": 0.3}
        status, mark, _ = await w.post(body, "/v1/chat/completions")
        assert status == 200 and mark.startswith("target=")
        assert w.vllm.questions == [{k: v for k, v in body.items() if k != "top_p"}]
        assert list(one[0].calls["Prefill"][0].token_ids) == [ord(c) for c in "abcdefgh"]
        sent = w.vllm.bodies[0]
        assert sent.pop("kv_transfer_params")["tokens"] == 8
        assert sent == body
    run(test, one)


def test_the_policy_is_the_flags_unless_the_request_has_its_own(one):
    async def test(w):
        await w.post()
        await w.post(prefilld={"gamma": 0.5})
        await w.post(prefilld={"method": "dense", "gamma": None})
        assert [(r.sparsity.method, r.sparsity.gamma) for r in one[0].calls["Prefill"]] == [
            (sparsity_pb2.METHOD_JOINT, 0.8), (sparsity_pb2.METHOD_JOINT, 0.5),
            (sparsity_pb2.METHOD_DENSE, 0)]
        assert not any("prefilld" in body for body in w.vllm.bodies)
        told = [body["kv_transfer_params"] for body in w.vllm.bodies]
        assert [(t["method"], t.get("gamma")) for t in told] == [
            ("joint", 0.8), ("joint", 0.5), ("dense", None)]
    run(test, one, "--method=joint", "--gamma=0.8")


def test_headers_go_both_ways(one):
    async def test(w):
        async with w.client.post(w.url + "/v1/completions", json={"prompt": LONG}, headers={
                "Authorization": "Bearer x", "X-Trace": "t", "Expect": "100-continue"}) as answer:
            assert answer.headers["X-Request-Id"] == "of vLLM"
            assert answer.content_type == "text/event-stream"
        assert w.vllm.headers[0]["Authorization"] == "Bearer x"
        assert w.vllm.headers[0]["X-Trace"] == "t"
    run(test, one)


def test_the_stream_of_events_outlives_the_answer(one):
    one[0].compute.clear()

    async def test(w):
        assert (await w.post())[0] == 200  # vLLM may be that quick: a cached prefix
        await asyncio.sleep(0.1)
        assert await w.outstanding(one[0]) == len(LONG)
        one[0].compute.set()
        await w.all_computed()
        assert not one[0].abandoned.acquire(blocking=False)
        assert not one[0].calls["ReleaseLease"]
    run(test, one)


# --- what is not

def test_short_prompts_are_vllms(one):
    async def test(w):
        for body in {"prompt": SHORT}, {"prompt": WORDS[:-2]}:
            assert (await w.post(body, prefilld={"gamma": 0.5}))[:2] == (200, "below-threshold")
        assert w.vllm.bodies == [{"prompt": SHORT}, {"prompt": WORDS[:-2]}]
        assert not one[0].calls["Prefill"]
        assert await w.metric('router_requests_total{path="below_threshold"}') == 2
        assert await w.metric('router_requests_total{path="fallback"}') == 0
    run(test, one)


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize("path, body", [
    ("completions", {"prompt": LONG, "n": 2}),
    ("completions", {"prompt": LONG, "best_of": 2}),
    ("completions", {"prompt": LONG, "echo": True}),
    ("completions", {"prompt": LONG, "prompt_logprobs": 0}),
    ("completions", {"prompt": LONG, "truncate_prompt_tokens": 4}),
    ("completions", {"prompt": [WORDS, WORDS]}),
    ("completions", {"prompt": [LONG, LONG]}),
    ("completions", {"prompt": [1.5] * 9}),
    ("completions", {"prompt": [True] * 9}),
    ("completions", {"prompt": [-1] * 9}),
    ("completions", {"prompt": [1 << 32] * 9}),
    ("completions", {"prompt": {}}),
    ("completions", {}),
    ("chat/completions", {"prompt": LONG}),
    ("chat/completions", {"messages": [IMAGE]}),
    ("chat/completions", {"messages": ["x", 3]}),
    ("chat/completions", {"messages": [{"content": WORDS}], "reasoning_effort": "low"}),
])
def test_what_cannot_be_handed_over_goes_to_vllm_as_it_is(one, path, body):
    async def test(w):
        assert (await w.post(body, f"/v1/{path}"))[:2] == (200, "fallback; reason=unsupported")
        assert w.vllm.bodies == [body] and not one[0].calls["Prefill"]
        assert await w.metric('router_requests_total{path="fallback"}') == 1
        assert await w.metric('router_fallbacks_total{reason="unsupported"}') == 1
    run(test, one)


def test_neutral_values_are_no_obstacle(one):
    async def test(w):
        _, mark, _ = await w.post(n=1, best_of=None, echo=False, prompt_logprobs=None)
        assert mark.startswith("target=")
    run(test, one)


def test_another_model_goes_to_vllm(one):
    async def test(w):
        assert (await w.post(model="adapter"))[1] == "fallback; reason=other_model"
        assert (await w.post(model="org/tiny"))[1].startswith("target=")
        assert one[0].calls["Prefill"][0].model == MODEL
    run(test, one, "--served_model=org/tiny")


def test_vllm_says_itself_why_it_cannot_tokenise(one):
    async def test(w):
        w.vllm.tokenize_status = w.vllm.status = 400
        status, mark, text = await w.post(prompt=WORDS)
        assert (status, mark) == (400, "fallback; reason=tokenize_failed")
        assert json.loads(text) == {"error": "of vLLM"}
        assert w.vllm.bodies[0]["prompt"] == WORDS
    run(test, one)


# --- which prefilld

def test_the_one_with_fewer_tokens_is_chosen(two):
    async def test(w):
        for server in two:
            server.compute.clear()
        w.vllm.permits = asyncio.Semaphore(0)
        answers = []
        for tokens, first, second in (20, 1, 0), (9, 1, 1), (9, 1, 2), (9, 1, 3), (9, 2, 3):
            answers.append(asyncio.create_task(w.post(prompt=[1] * tokens)))
            await eventually(lambda: len(w.vllm.bodies) == len(answers))
            assert [len(s.calls["Prefill"]) for s in two] == [first, second]
        assert await w.outstanding(two[0]) == 29
        assert await w.outstanding(two[1]) == 27
        for server in two:
            server.compute.set()
        for _ in range(100):
            w.vllm.permits.release()
        assert [(await answer)[0] for answer in answers] == [200] * 5
    run(test, two)


def full():
    return Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_info(0.01))


@pytest.mark.parametrize("spoil", [
    lambda server: server.faults["Prefill"].append(full()),
    lambda server: server.faults["Prefill"].append(Abort(grpc.StatusCode.UNAVAILABLE)),
    lambda server: server.faults["Prefill"].append(Abort(grpc.StatusCode.CANCELLED)),
    lambda server: setattr(server, "empty", True),
    lambda server: setattr(server, "silent", True),
    lambda server: server.stop(),
], ids=["full", "unavailable", "cancelled", "stream ends", "silent", "gone"])
def test_another_one_is_asked(two, spoil):
    async def test(w):
        spoil(two[0])
        status, mark, _ = await w.post()
        assert status == 200 and mark.startswith(f"target={two[1].target};")
        assert await w.metric("router_prefill_retries_total") == 1
        assert await w.metric('router_requests_total{path="prefilld"}') == 1
        assert await w.outstanding(two[0]) == 0
    run(test, two, "--admission_timeout=0.3")


def test_one_that_broke_is_not_asked_again_until_it_is_well(two):
    two[0].faults["Prefill"] = [Abort(grpc.StatusCode.UNAVAILABLE)]

    async def test(w):
        ready = f'router_prefilld_ready{{target="{two[0].target}"}}'
        two[0].serving = False
        await w.post()
        assert await w.metric(ready) == 0
        await w.post()
        assert len(two[0].calls["Prefill"]) == 1
        two[0].serving = True
        while await w.metric(ready) == 0:
            await asyncio.sleep(0.05)
        await w.post()
        assert len(two[0].calls["Prefill"]) == 2
    run(test, two)


@pytest.mark.parametrize("fault", [
    Abort(grpc.StatusCode.INVALID_ARGUMENT), Abort(grpc.StatusCode.NOT_FOUND),
    Abort(grpc.StatusCode.INTERNAL), Abort(grpc.StatusCode.RESOURCE_EXHAUSTED)],
    ids=lambda fault: fault.code.name)
def test_what_is_refused_for_good_is_not_offered_again(two, fault):
    two[0].faults["Prefill"] = [fault]

    async def test(w):
        assert (await w.post())[:2] == (200, "fallback; reason=rejected")
        assert "kv_transfer_params" not in w.vllm.bodies[0]
        assert not two[1].calls["Prefill"]
        assert await w.metric("router_prefill_retries_total") == 0
        assert await w.metric('router_fallbacks_total{reason="rejected"}') == 1
    run(test, two)


def test_when_all_are_full_vllm_is_alone(two):
    for server in two:
        server.faults["Prefill"] = [full()]

    async def test(w):
        assert (await w.post(prompt=WORDS))[:2] == (200, "fallback; reason=busy")
        assert w.vllm.bodies == [{"model": MODEL, "prompt": WORDS}]
        assert [len(s.calls["Prefill"]) for s in two] == [1, 1]
        assert await w.metric('router_fallbacks_total{reason="busy"}') == 1
    run(test, two)


def test_when_none_is_ready_vllm_is_alone(two):
    two[0].serving = False
    two[1].stop()

    async def test(w):
        assert (await w.post())[:2] == (200, "fallback; reason=not_ready")
        assert await w.metric('router_fallbacks_total{reason="not_ready"}') == 1
        async with w.client.get(w.url + "/health") as answer:
            assert answer.status == 200
            assert await answer.json() == {
                "vllm": True, "prefilld": {server.target: False for server in two}}
    run(test, two, ready=False)


# --- the answer

def test_chunks_pass_as_they_come(one):
    async def test(w):
        w.vllm.permits = asyncio.Semaphore(0)
        async with w.client.post(w.url + "/v1/completions",
                                 json={"prompt": LONG, "stream": True}) as answer:
            assert answer.headers["x-prefilld"].startswith("target=")
            for chunk in w.vllm.chunks:  # the next one does not exist yet
                w.vllm.permits.release()
                assert await answer.content.readany() == chunk
            assert await answer.content.read() == b""
    run(test, one)


def test_a_client_that_leaves_before_the_answer_stops_both_sides(one):
    one[0].compute.clear()

    async def test(w):
        w.vllm.permits = asyncio.Semaphore(0)
        answer = asyncio.create_task(w.post())
        await eventually(lambda: w.vllm.bodies)
        answer.cancel()
        await w.all_given_back()
        assert await asyncio.to_thread(one[0].abandoned.acquire, timeout=10)
        await eventually(lambda: w.vllm.cancelled == 1)
    run(test, one)


def test_a_client_that_leaves_before_the_admission_stops_the_offer(one):
    async def test(w):
        one[0].silent = True
        answer = asyncio.create_task(w.post())
        await eventually(lambda: one[0].calls["Prefill"])
        answer.cancel()
        assert await asyncio.to_thread(one[0].abandoned.acquire, timeout=10)
        assert not w.vllm.bodies
        assert await w.outstanding(one[0]) == 0
    run(test, one)


def test_a_client_that_leaves_within_the_answer_leaves_the_lease_to_vllm(one):
    async def test(w):
        w.vllm.permits = asyncio.Semaphore(1)
        async with w.client.post(w.url + "/v1/completions", json={"prompt": LONG}) as answer:
            await answer.content.readany()
        await eventually(lambda: w.vllm.cancelled == 1)
        assert not one[0].calls["ReleaseLease"]
    run(test, one)


def test_what_vllm_refuses_is_given_back(one):
    one[0].compute.clear()

    async def test(w):
        w.vllm.status = 422
        status, mark, text = await w.post()
        assert (status, json.loads(text)) == (422, {"error": "of vLLM"})
        assert mark.startswith("target=")
        await w.all_given_back()
    run(test, one)


def test_a_vllm_that_is_gone_is_a_bad_gateway(one):
    async def test(w):
        status, mark, text = await w.post()
        assert status == 502 and mark.startswith("target=")
        error = json.loads(text)["error"]
        assert "vLLM does not answer" in error["message"] and error["code"] == 502
        await w.all_given_back()
        async with w.client.get(w.url + "/health") as answer:
            assert answer.status == 503
        assert (await w.post(prompt=WORDS))[:2] == (502, "fallback; reason=tokenize_failed")
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        run(test, one, f"--vllm=http://127.0.0.1:{unused.getsockname()[1]}")


def test_an_answer_that_breaks_off_does_not_look_complete(one):
    async def test(w):
        w.vllm.break_off = True
        with pytest.raises(aiohttp.ClientPayloadError):
            await w.post(stream=True)
        assert not one[0].calls["ReleaseLease"]
    run(test, one)


def test_a_computation_that_fails_ends_quietly(one):
    one[0].faults["Prefill"] = [Abort(grpc.StatusCode.INTERNAL, after=1)]

    async def test(w):
        assert (await w.post())[0] == 200  # vLLM copes, or says so
        await w.all_computed()
    run(test, one)


# --- methods

def test_only_methods_that_a_server_serves_may_be_named(two):
    two[1].methods.add(sparsity_pb2.METHOD_FLEXPREFILL)

    async def test(w):
        status, _, text = await w.post(prefilld={"method": "streaming"})
        assert status == 400
        assert "'streaming' is not one of dense, flexprefill, joint" in json.loads(
            text)["error"]["message"]
        status, mark, _ = await w.post(prefilld={"method": "flexprefill"})
        assert status == 200 and mark.startswith(f"target={two[1].target};"), "the one that has it"
        assert not two[0].calls["Prefill"]
        assert await w.metric("router_prefill_retries_total") == 0
    run(test, two)


def test_methods_are_asked_again_of_a_server_that_comes_back(one):
    async def test(w):
        assert (await w.post(prefilld={"method": "flexprefill"}))[0] == 400
        one[0].serving = False
        while await w.metric(f'router_prefilld_ready{{target="{one[0].target}"}}') == 1:
            await asyncio.sleep(0.05)
        one[0].methods.add(sparsity_pb2.METHOD_FLEXPREFILL)
        one[0].serving = True
        while await w.metric(f'router_prefilld_ready{{target="{one[0].target}"}}') == 0:
            await asyncio.sleep(0.05)
        assert (await w.post(prefilld={"method": "flexprefill"}))[0] == 200
    run(test, one)


def test_a_server_without_the_model_is_not_ready(one, caplog):
    caplog.set_level("INFO", logger="router")

    async def test(w):
        await eventually(lambda: "NOT_FOUND" in caplog.text)
        assert (await w.post(model="none"))[:2] == (200, "fallback; reason=not_ready")
    run(test, one, "--model=none", ready=False)


def test_a_default_that_nobody_serves_leaves_requests_to_vllm(one):
    async def test(w):
        assert (await w.post())[:2] == (200, "fallback; reason=rejected")
        assert (await w.post(prefilld={"method": "dense"}))[1].startswith("target=")
    run(test, one, "--method=streaming")


# --- what is wrong

@pytest.mark.parametrize("data, message", [
    (b"{", "not JSON"),
    (b"\xff\xff", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "not a JSON object"),
    (b'{"prompt": [1], "kv_transfer_params": {}}', "kv_transfer_params"),
    (b'{"prefilld": "joint"}', "prefilld: expected"),
    (b'{"prefilld": {"tau": 1}}', "prefilld: expected"),
    (b'{"prefilld": {"method": "fast"}}', "'fast' is not one of dense"),
    (b'{"prefilld": {"method": ["dense"]}}', "is not one of dense"),
    (b'{"prefilld": {"gamma": 1}}', "1 is not between"),
    (b'{"prefilld": {"gamma": NaN}}', "nan is not between"),
    (b'{"prefilld": {"gamma": true}}', "True is not between"),
])
def test_bad_bodies_are_named(one, data, message):
    async def test(w):
        async with w.client.post(w.url + "/v1/completions", data=data) as answer:
            assert answer.status == 400
            error = (await answer.json())["error"]
            assert message in error["message"] and error["type"] == "invalid_request_error"
        assert not w.vllm.bodies and not one[0].calls["Prefill"]
    run(test, one)


def test_bodies_are_capped(one):
    async def test(w):
        status, _, text = await w.post(prompt="x" * (1 << 20))
        assert status == 413 and json.loads(text)["error"]["code"] == 413
    run(test, one, "--max_body_mib=1")


def test_other_paths(one):
    async def test(w):
        async with w.client.get(w.url + "/v1/models") as answer:
            assert await answer.json() == {"data": [MODEL]}
        async with w.client.get(w.url + "/v1/embeddings") as answer:
            assert answer.status == 404 and (await answer.json())["error"]["code"] == 404
        async with w.client.get(w.url + "/v1/completions") as answer:
            assert answer.status == 405 and answer.headers["Allow"] == "POST"
    run(test, one)


def test_flags():
    options = router.parse_args(["--model=m", "--prefilld=a:1,b:2", "--prefilld=a:1",
                                 "--vllm=http://h:1/"])
    assert options.prefilld == ["a:1", "b:2"]
    assert (options.vllm, options.served_model) == ("http://h:1", "m")
    for wrong in ["--gamma=1"], ["--method=fast"]:
        with pytest.raises(SystemExit):
            router.parse_args(["--model=m", "--prefilld=a:1", *wrong])


# --- its end

@pytest.mark.parametrize("patient", [True, False])
def test_sigterm(one, patient):
    """What runs may end within --shutdown_timeout; what does not is given back."""
    async def test():
        vllm = FakeVllm()
        vllm.permits = asyncio.Semaphore(1)
        async with (served(vllm.app(), shutdown_timeout=0.1) as vllm_url,
                    aiohttp.ClientSession() as client):
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(EXAMPLES / "router.py"), "--listen=127.0.0.1:0",
                f"--vllm={vllm_url}", f"--model={MODEL}", f"--prefilld={one[0].target}",
                "--min_tokens=8", f"--shutdown_timeout={20 if patient else 0.2}",
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                said = ""
                while " is ready" not in said or "listening on" not in said:
                    line = await process.stderr.readline()
                    assert line, said
                    said += line.decode()
                address = re.search(r"listening on (\S+)", said).group(1)
                w = World(f"http://{address}", client, vllm, one)
                if not patient:
                    one[0].compute.clear()
                    vllm.permits = asyncio.Semaphore(0)
                    answer = asyncio.create_task(w.post())
                    await eventually(lambda: vllm.bodies)
                    answer.cancel()
                    await eventually(lambda: one[0].calls["ReleaseLease"])
                seen = len(vllm.bodies)
                answer = asyncio.create_task(w.post())
                await eventually(lambda: len(vllm.bodies) > seen)
                process.send_signal(signal.SIGTERM)
                if patient:
                    await asyncio.sleep(0.5)
                    vllm.permits.release()
                    vllm.permits.release()
                    assert (await answer)[2].endswith("[DONE]\n\n")
                else:
                    with pytest.raises(aiohttp.ClientError):
                        await answer
                    await eventually(lambda: len(one[0].calls["ReleaseLease"]) == 2)
                    assert {r.reason for r in one[0].calls["ReleaseLease"]} == {ABANDONED}
                assert await asyncio.wait_for(process.wait(), 15) == 0
                errors = (await process.stderr.read()).decode()
                assert "Traceback" not in errors, errors
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
    asyncio.run(asyncio.wait_for(test(), 40))
