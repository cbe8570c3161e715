"""A router in front of vLLM: long prompts are prefilled by prefilld, vLLM pulls the KV and decodes.

    python router.py --model llama --vllm http://127.0.0.1:8000 --prefilld 127.0.0.1:50051

For every request: which tokens is its prompt (vLLM's own tokenizer says), does a prefilld take it,
then on to vLLM with the lease, and the answer back as it comes. What prefilld cannot do, or has no
place for, goes to vLLM as it is. docs/router.md has headers and metrics.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import random
import signal
import time
import uuid

import aiohttp
import grpc
import prometheus_client as prometheus
from aiohttp import web
from multidict import CIMultiDict

from prefilld import Credentials, Lease, Policy, PrefilldError
from prefilld.sparsity import METHODS, policy_message
from prefilld.v1 import (kv_handoff_service_pb2 as kv, kv_handoff_service_pb2_grpc,
                         prefill_service_pb2 as pb, prefill_service_pb2_grpc)

HEADER = "x-prefilld"
FALLBACKS = ("unsupported", "other_model", "tokenize_failed", "not_ready", "busy", "rejected")

# With one of these there is more than one output, or logits of the prompt are wanted (that nobody
# computes after a hand-over), or the prompt is not the one that /tokenize would show.
UNSUPPORTED = ("echo", "prompt_logprobs", "use_beam_search", "suffix", "prompt_embeds",
               "truncate_prompt_tokens", "documents", "reasoning_effort", "mm_processor_kwargs",
               "media_io_kwargs")
# What /tokenize is told of a request.
CHAT_FIELDS = ("model", "messages", "add_generation_prompt", "continue_final_message", "tools",
               "add_special_tokens", "chat_template", "chat_template_kwargs")
TEXT_FIELDS = ("model", "prompt", "add_special_tokens")

HOP_BY_HOP = {"connection", "keep-alive", "proxy-authorization", "te", "trailer",
              "transfer-encoding", "upgrade"}
OF_THE_BODY = {"content-encoding", "content-length", "expect", "host"}  # it is written anew

HEALTH_INTERVAL_S = 1.0
SHORT_CALL_S = 10.0
PREFILL_TIMEOUT_S = 3600.0

log = logging.getLogger("router")


class Plainly(Exception):
    """This request goes to vLLM alone."""

    def __init__(self, reason: str | None = None):
        """reason: one of FALLBACKS; None: the prompt is short."""
        self.path, self.reason = "fallback" if reason else "below_threshold", reason
        super().__init__(f"fallback; reason={reason}" if reason else "below-threshold")


class Prefilld:
    """One server: its connection, whether it takes work, and how much it has of ours."""

    def __init__(self, target: str, model: str):
        self.target, self.model = target, model
        self.ready, self._told = False, None
        self.methods = set(METHODS)  # that it serves; all that have a name until it was asked
        self.outstanding = 0  # tokens of prompts that are not computed yet
        self._credentials = Credentials.from_env()
        self._credentials.check(target)
        options = [("grpc.max_reconnect_backoff_ms", 2000), *self._credentials.channel_options()]
        tls = self._credentials.channel_credentials()
        self.channel = (grpc.aio.insecure_channel(target, options=options) if tls is None
                        else grpc.aio.secure_channel(target, tls, options=options))
        self._prefills = prefill_service_pb2_grpc.PrefillServiceStub(self.channel)
        self.leases = kv_handoff_service_pb2_grpc.KvHandoffServiceStub(self.channel)
        self._check = self.channel.unary_unary("/grpc.health.v1.Health/Check")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return self._credentials.metadata()

    async def watch(self) -> None:
        """Keeps `ready` up to date; ends by cancellation."""
        service = b"prefilld.v1.PrefillService"
        while True:
            try:
                reply = await self._check(b"\x0a" + bytes([len(service)]) + service,
                                          timeout=2 * HEALTH_INTERVAL_S,
                                          metadata=self.metadata)
                serving = reply == b"\x08\x01"
                if serving and not self.ready:
                    self.methods = {name for name in METHODS if await self._serves(name)}
                self.set_ready(serving, "says its health check")
            except grpc.RpcError as error:
                failure = PrefilldError.from_rpc(error)
                if failure.retryable and (self.ready or self._told is None):
                    why = await asyncio.to_thread(self._credentials.why_not, self.target)
                    failure = why or failure
                self.set_ready(False, failure)
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _serves(self, method: str) -> bool:
        """By a prompt of one token that is only validated."""
        try:
            await self._prefills.Prefill(pb.PrefillRequest(
                model=self.model, token_ids=[0], sparsity=policy_message(Policy(method=method)),
                validate_only=True), timeout=SHORT_CALL_S, metadata=self.metadata).read()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            return False
        return True

    def set_ready(self, ready: bool, why: object) -> None:
        told = (ready, getattr(why, "code", why))  # the text of one code may differ
        if told != self._told:
            log.info("prefilld %s is %s: %s", self.target, "ready" if ready else "not ready", why)
        self.ready, self._told = ready, told

    async def prefill(self, request: pb.PrefillRequest, timeout: float) -> "Handover":
        """Returns once the prompt is admitted. PrefilldError, UNAVAILABLE also for silence."""
        call = self._prefills.Prefill(request, timeout=PREFILL_TIMEOUT_S, metadata=self.metadata)
        self.outstanding += len(request.token_ids)
        call.add_done_callback(lambda _: self._computed(len(request.token_ids)))
        try:
            event = await asyncio.wait_for(call.read(), timeout)
            if event is grpc.aio.EOF:
                raise PrefilldError(grpc.StatusCode.UNAVAILABLE, "the stream ended")
            return Handover(self, call, event.admission)
        except BaseException as error:  # a client that went away included
            call.cancel()
            if isinstance(error, grpc.RpcError):
                raise PrefilldError.from_rpc(error) from None
            if isinstance(error, asyncio.TimeoutError):
                raise PrefilldError(grpc.StatusCode.UNAVAILABLE,
                                    f"no admission within {timeout} s") from None
            raise

    def _computed(self, tokens: int) -> None:
        self.outstanding -= tokens


class Handover:
    """An admitted prompt on its way to vLLM."""

    def __init__(self, server: Prefilld, call, admission: pb.Admission):
        self.server, self._call = server, call
        self.request_id = admission.request_id  # may be said aloud; the lease's name may not
        self.lease = Lease.from_message(admission.lease)
        self.fingerprint = admission.fingerprint
        self.taken = False           # vLLM has answered, so the lease was its own to release
        self.over = asyncio.Event()  # the answer has ended, or there will be none
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Reads the events to their end: a stream that nobody reads on stops the computation."""
        reading = asyncio.create_task(self._read())
        await self.over.wait()
        if not self.taken:  # give it back
            self._call.cancel()
            with contextlib.suppress(grpc.RpcError):  # then it expires
                await self.server.leases.ReleaseLease(kv.ReleaseLeaseRequest(
                    lease=self.lease.name, generation=self.lease.generation,
                    reason=kv.RELEASE_REASON_ABANDONED), timeout=SHORT_CALL_S,
                    metadata=self.server.metadata)
        await asyncio.wait((reading,))

    async def _read(self) -> None:
        try:
            while await self._call.read() is not grpc.aio.EOF:
                pass
        except grpc.RpcError as error:
            log.warning("prefilld %s: the lease of request %s is lost: %s", self.server.target,
                        self.request_id, PrefilldError.from_rpc(error))


class Router:
    """The HTTP side."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._handovers: set[asyncio.Task] = set()
        self._registry = prometheus.CollectorRegistry()

        def metric(kind, name: str, text: str, labels=(), values=()):
            made = kind(f"router_{name}", text, labels, registry=self._registry)
            for value in values:  # a series is there before it first happens
                made.labels(value)
            return made

        self._requests = metric(prometheus.Counter, "requests", "Requests, by the way they took",
                                ("path",), ("prefilld", "below_threshold", "fallback"))
        self._fallbacks = metric(prometheus.Counter, "fallbacks", "Requests to vLLM alone, by why",
                                 ("reason",), FALLBACKS)
        self._retries = metric(prometheus.Counter, "prefill_retries",
                               "Prompts offered to one more prefilld")
        self._admission = metric(prometheus.Histogram, "prefill_admission_seconds",
                                 "From the first offer of a prompt to its lease")
        self._ready = metric(prometheus.Gauge, "prefilld_ready", "1: takes work", ("target",))
        self._outstanding = metric(prometheus.Gauge, "outstanding_tokens",
                                   "Of prompts that are not computed yet", ("target",))

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self._options.max_body_mib << 20,
                              middlewares=[json_errors])
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/v1/models", self._forward)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.cleanup_ctx.append(self._connections)
        return app

    async def _connections(self, app: web.Application):
        """What lives as long as the app. All handlers are over or cancelled when it ends."""
        self._vllm = aiohttp.ClientSession(
            # One connection per request: vLLM may be closing one that was kept.
            connector=aiohttp.TCPConnector(limit=0, force_close=True), auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=SHORT_CALL_S),
            skip_auto_headers=("Accept-Encoding", "User-Agent"))
        self._servers = [Prefilld(target, self._options.model)
                         for target in self._options.prefilld]
        for server in self._servers:
            self._ready.labels(server.target).set_function(lambda s=server: s.ready)
            self._outstanding.labels(server.target).set_function(lambda s=server: s.outstanding)
        watches = [asyncio.create_task(server.watch()) for server in self._servers]
        yield
        if self._handovers:  # leases are given back
            await asyncio.wait(self._handovers, timeout=SHORT_CALL_S)
        for task in (*watches, *self._handovers):
            task.cancel()
        for server in self._servers:
            await server.channel.close()
        await self._vllm.close()

    async def health(self, request: web.Request) -> web.Response:
        """200 when vLLM is well: without a prefilld, requests still get their answer."""
        try:
            async with self._vllm.get(f"{self._options.vllm}/health",
                                      timeout=aiohttp.ClientTimeout(SHORT_CALL_S)) as answer:
                vllm = answer.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            vllm = False
        return web.json_response({"vllm": vllm, "prefilld": {
            server.target: server.ready for server in self._servers}}, status=200 if vllm else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=prometheus.generate_latest(self._registry),
                            headers={"Content-Type": prometheus.CONTENT_TYPE_LATEST})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request)
        served = set().union(*(server.methods for server in self._servers))
        policy = read_policy(body.pop("prefilld", None) or {}, self._options, served)
        try:
            handover = await self._hand_over(request, body, policy)
        except Plainly as plainly:
            self._requests.labels(plainly.path).inc()
            if plainly.reason:
                self._fallbacks.labels(plainly.reason).inc()
            return await self._forward(request, body, str(plainly))
        self._handovers.add(handover.task)
        handover.task.add_done_callback(self._handovers.discard)
        try:
            self._requests.labels("prefilld").inc()
            body["kv_transfer_params"] = {
                "target": handover.server.target, "lease": dataclasses.asdict(handover.lease),
                "tokens": handover.lease.tokens, "fingerprint": handover.fingerprint,
                "model": self._options.model, **policy}
            mark = f"target={handover.server.target}; request={handover.request_id}"
            return await self._forward(request, body, mark, handover)
        finally:
            handover.over.set()

    async def _hand_over(self, request: web.Request, body: dict, policy: Policy) -> Handover:
        """Raises Plainly. Text becomes token IDs in `body`: it need not be tokenised again."""
        if body.get("model") not in (None, self._options.served_model):
            raise Plainly("other_model")
        prompt = prompt_of(body, chat="chat" in request.path)
        tokens = prompt if isinstance(prompt, list) else await self._tokenize(request, prompt)
        if not all(type(token) is int and 0 <= token < 1 << 32 for token in tokens):
            raise Plainly("unsupported")
        if len(tokens) < self._options.min_tokens:
            raise Plainly()
        handover = await self._admit(policy.get("method"), pb.PrefillRequest(
            request_id=str(uuid.uuid4()), model=self._options.model, token_ids=tokens,
            sparsity=policy_message(policy)))
        if "prompt" in prompt:
            body["prompt"] = tokens
        return handover

    async def _tokenize(self, request: web.Request, question: dict) -> list:
        """Where vLLM has no tokens to give, its answer to the request itself will say why."""
        headers = {name: value for name, value in request.headers.items()
                   if name == "Authorization"}
        try:
            async with self._vllm.post(f"{self._options.vllm}/tokenize", json=question,
                                       headers=headers) as answer:
                tokens = (await answer.json())["tokens"] if answer.status == 200 else None
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError, TypeError):
            tokens = None
        if not isinstance(tokens, list):
            raise Plainly("tokenize_failed")
        return tokens

    async def _admit(self, method: str | None, request: pb.PrefillRequest) -> Handover:
        """Offers the prompt to one prefilld after the other that serves the method, the least busy
        first."""
        able = [s for s in self._servers if method is None or method in s.methods]
        start, reason, left = time.monotonic(), "not_ready" if able else "rejected", list(able)
        while ready := [server for server in left if server.ready]:
            server = min(ready, key=lambda s: (s.outstanding, random.random()))
            self._retries.inc(len(left) < len(able))
            left.remove(server)
            try:
                handover = await server.prefill(request, self._options.admission_timeout)
                self._admission.observe(time.monotonic() - start)
                return handover
            except PrefilldError as error:
                log.warning("prefilld %s does not take a prompt: %s", server.target, error)
                if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    server.set_ready(False, error)  # until a health check says otherwise
                elif not error.retryable:
                    raise Plainly("rejected") from error
                reason = "busy"
        raise Plainly(reason)

    async def _forward(self, request: web.Request, body: dict | None = None,
                       mark: str | None = None,
                       handover: Handover | None = None) -> web.StreamResponse:
        """vLLM's answer, passed through as it comes. With its first byte the lease is taken."""
        marks = {HEADER: mark} if mark else {}
        response = None
        try:
            async with self._vllm.request(
                    request.method, self._options.vllm + request.path_qs,
                    data=None if body is None else json.dumps(body).encode(),
                    headers=without(request.headers, HOP_BY_HOP | OF_THE_BODY)) as answer:
                response = web.StreamResponse(status=answer.status, reason=answer.reason,
                                              headers=without(answer.headers, HOP_BY_HOP))
                response.headers.update(marks)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    if handover and answer.status == 200:
                        handover.taken = True
                    await response.write(chunk)
                await response.write_eof()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            log.warning("vLLM's answer is not passed on: %r", error)
            if response is None:
                raise web.HTTPBadGateway(text=f"vLLM does not answer: {error}",
                                         headers=marks) from error
            if request.transport is not None:  # the client must see that this was not the end
                request.transport.close()
        return response


@web.middleware
async def json_errors(request: web.Request, handler) -> web.StreamResponse:
    """Errors of our own, in the form that clients of this API expect."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
        return web.json_response(
            {"error": {"message": error.text, "type": kind, "code": error.status}},
            status=error.status, headers=without(error.headers, {"content-type"}))


async def read_body(request: web.Request) -> dict:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="the body is not a JSON object")
    if body.get("kv_transfer_params") is not None:  # it could name any server for vLLM to ask
        raise web.HTTPBadRequest(text="kv_transfer_params is the router's to set")
    return body


def read_policy(own: dict, options: argparse.Namespace, served: set[str]) -> Policy:
    """A request's own "prefilld" object over the flags; what neither says is not there. served: the
    methods that a request may name."""
    if not isinstance(own, dict) or not own.keys() <= {"method", "gamma"}:
        raise web.HTTPBadRequest(text="prefilld: expected an object with method, gamma or both")
    method, gamma = own.get("method", options.method), own.get("gamma", options.gamma)
    if method not in (None, options.method, *served):
        raise web.HTTPBadRequest(text=f"prefilld.method: {method!r} is not one of "
                                      f"{', '.join(sorted(served))}")
    if gamma is not None and (type(gamma) not in (int, float) or not 0 < gamma < 1):
        raise web.HTTPBadRequest(text=f"prefilld.gamma: {gamma!r} is not between 0 and 1")
    policy = Policy(method=method, gamma=gamma)
    return Policy(**{key: value for key, value in policy.items() if value is not None})


def prompt_of(body: dict, chat: bool) -> list | dict:
    """Token IDs, or what to ask /tokenize. Plainly unless it is one prompt of text, with one
    answer."""
    fine = all(body.get(name) is None or body[name] is False for name in UNSUPPORTED) and all(
        body.get(name) in (None, 1) for name in ("n", "best_of"))
    prompt, messages = body.get("prompt"), body.get("messages")
    if chat:
        fine = fine and isinstance(messages, list) and all(map(is_text, messages))
    elif isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a list of one prompt
    if not fine or not chat and not isinstance(prompt, str | list):
        raise Plainly("unsupported")
    if not chat and isinstance(prompt, list):
        return prompt
    told = {**body, "prompt": prompt}
    return {name: told[name] for name in (CHAT_FIELDS if chat else TEXT_FIELDS) if name in told}


def is_text(message: object) -> bool:
    content = message.get("content", "") if isinstance(message, dict) else message
    return content is None or isinstance(content, str) or isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content)


def without(headers, names: set[str]) -> CIMultiDict:
    return CIMultiDict((n, value) for n, value in headers.items() if n.lower() not in names)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="default: %(default)s")
    add("--vllm", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    add("--prefilld", action="append", required=True, metavar="HOST:PORT[,...]", help="repeatable")
    add("--model", required=True, help="prefilld's name of the model")
    add("--served_model", help="the model's name in requests; default: as --model")
    add("--min_tokens", type=int, default=1024, help="shorter prompts are vLLM's (%(default)s)")
    add("--method", help="of requests that name none; one that prefilld serves; default: its own")
    add("--gamma", type=float, help="above 0 and below 1; default: prefilld's")
    add("--admission_timeout", type=float, default=5.0, metavar="S",
        help="for one prefilld to take a prompt (%(default)s)")
    add("--max_body_mib", type=int, default=16, help="the largest request (%(default)s)")
    add("--shutdown_timeout", type=float, default=30.0, metavar="S",
        help="for running requests after SIGTERM (%(default)s)")
    options = parser.parse_args(argv)
    if options.method not in (None, *METHODS):
        parser.error(f"--method: there is no method {options.method!r}")
    if options.gamma is not None and not 0 < options.gamma < 1:
        parser.error(f"--gamma: {options.gamma} is not between 0 and 1")
    options.prefilld = [*dict.fromkeys(filter(None, ",".join(options.prefilld).split(",")))]
    options.vllm = options.vllm.rstrip("/")
    options.served_model = options.served_model or options.model
    return options


async def serve(options: argparse.Namespace) -> None:
    """Until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(Router(options).app(), access_log=None, handler_cancellation=True,
                           shutdown_timeout=options.shutdown_timeout / 2)  # waited for twice
    await runner.setup()
    try:
        host, _, port = options.listen.rpartition(":")
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        log.info("listening on %s:%s", *runner.addresses[0][:2])
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(serve(parse_args()))


if __name__ == "__main__":
    main()
