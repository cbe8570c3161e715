"""What a peer can cost before a call of ours begins: connections, streams, half messages, calls
that are taken back, uploads that trickle; and that the server stays reachable meanwhile."""

import contextlib
import http.client
import queue
import re
import socket
import time

import grpc
import pytest

from e2e import attending, harness, http2, prefilling
from e2e.harness import refused
from e2e.test_access import one_line
from prefilld.v1 import model_service_pb2

ATTEND = "/prefilld.v1.PrefillService/Attend"
PREFILL = "/prefilld.v1.PrefillService/Prefill"
CHECK = "/grpc.health.v1.Health/Check"


@contextlib.contextmanager
def connections(server, count):
    """Open ones, that say nothing; some may be refused while they are made."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            with contextlib.suppress(ConnectionResetError):
                made.append(stack.enter_context(
                    socket.create_connection(http2.address(server.target), 10)))
        yield made


def serves(server):
    """A client that connects now is served."""
    with server.new_channel() as channel:
        assert channel.unary_unary(CHECK)(b"", timeout=20)


def refusals(server, reason):
    return server.metric("prefilld_connections_refused_total", reason=reason)


def test_after_descriptors_ran_out_the_next_connection_works(start_server):
    """More connections than the process may have descriptors, as fast as they come."""
    flags = ["--max_connections_per_address=384", "--max_connection_rate=100000"]
    with start_server(*flags, descriptors=1024) as server:
        assert server.metric("prefilld_descriptors", kind="connections", state="limit") == 384
        with connections(server, 1100):
            harness.eventually(lambda: refusals(server, "limit") > 600)
            assert server.descriptors() < 1024
        harness.eventually(lambda: server.metric("prefilld_connections") <= 1)
        serves(server)


def test_the_system_has_no_descriptor_left(start_server):
    """The limit is set below what the server counts on while it runs: it accepts and closes."""
    with start_server(descriptors=1024) as server:
        serves(server)
        server.limit_descriptors(server.descriptors() + 5)
        with connections(server, 100):
            time.sleep(.5)  # it cannot be asked meanwhile
        server.limit_descriptors(1024)
        serves(server)
        assert refusals(server, "descriptors") > 50
        assert "accept_failed" in {line["event"] for line in server.log()}


def test_more_connections_than_allowed_are_closed_at_once(start_server):
    with start_server("--max_connections=4", "--max_connections_per_address=4") as server:
        with connections(server, 4):
            harness.eventually(lambda: server.metric("prefilld_connections") == 4)
            with connections(server, 1) as more:
                assert all(http2.ended(connection) for connection in more)
            harness.eventually(lambda: refusals(server, "limit") == 1)
        harness.eventually(lambda: answered(server))  # once the server has seen that they are gone


def test_new_connections_of_one_address_are_rationed(start_server):
    with start_server("--max_connection_rate=1") as server:
        with connections(server, 30):
            harness.eventually(lambda: refusals(server, "rate") > 10)
        harness.eventually(lambda: answered(server))


def answered(server):
    try:
        serves(server)
        return True
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("path", [ATTEND, CHECK])
def test_who_takes_calls_back_as_fast_as_they_begin_is_cut_off(start_server, path):
    with start_server() as server:
        block = http2.headers(path)
        with http2.connect(server.target) as connection:
            connection.settimeout(10)
            with contextlib.suppress(OSError):
                for stream in range(1, 200_000, 2):
                    connection.sendall(
                        http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block)
                        + http2.frame(http2.DATA, http2.END_STREAM, stream, http2.message(b""))
                        + http2.frame(http2.RST_STREAM, 0, stream, b"\0\0\0\x08"))
            assert http2.ended(connection)
        harness.eventually(lambda: refusals(server, "rapid_reset") + refusals(server, "streams"))
        harness.eventually(lambda: answered(server))
        harness.eventually(lambda: server.footprint()["prefilld_requests_running"] == 0)


def test_more_streams_than_allowed_end_the_connection(start_server):
    """A client that does not acknowledge the limit is held to it all the same: unfinished
    messages of a thousand streams would hold a gigabyte."""
    with start_server() as server:
        block = http2.headers(PREFILL)
        with http2.connect(server.target) as connection:
            for stream in range(1, 600, 2):
                connection.sendall(http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block))
            assert http2.ended(connection)
        harness.eventually(lambda: refusals(server, "streams") == 1)
        serves(server)


def test_an_upload_that_trickles_is_given_up(start_server):
    """A chunk every tenth of the time in which something has to move, and far too few bytes."""
    with start_server("--upload_timeout=2s") as server:
        arrays = attending.small(tokens=2000)
        call = attending.Call(server.prefill)
        call.admit(attending.header(*arrays))
        begin = time.monotonic()
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED) as failure:
            for chunk in attending.chunks(arrays, size=64):
                call.send(chunk)
                time.sleep(.2)
                if time.monotonic() - begin > 20 or not call.stream.is_active():
                    break
            call.receive()
        assert "262144 a second" in failure[0].message
        call.half_close()
        harness.eventually(lambda: server.metric("prefilld_requests_uploading") == 0)


def test_uploads_hold_no_place_in_the_queue(start_server, tiny):
    models = [("tiny", tiny.directory)]
    with start_server("--max_waiting_jobs=2", models=models) as server:
        calls = [attending.Call(server.prefill) for _ in range(5)]
        for call in calls:
            call.admit(attending.header(*attending.small(tokens=1)))
        assert server.metric("prefilld_requests_uploading") == 5
        attending.attend(server.prefill, *attending.small(tokens=64))
        with prefilling.prefilled(server, [1, 2, 3]) as done:
            assert done.summary
        for call in calls:
            call.stream.cancel()
        harness.eventually(lambda: server.metric("prefilld_requests_uploading") == 0)


def test_prompts_that_nobody_pulls_keep_nobody_from_starting(start_server, tiny):
    with start_server("--max_waiting_jobs=3", models=[("tiny", tiny.directory)]) as server:
        waiting = [prefilling.start(server, tiny.tokens(300), retain=False) for _ in range(3)]
        harness.eventually(lambda: server.metric("prefilld_requests_waiting") == 0)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED) as failure:
            prefilling.start(server, tiny.tokens(300), retain=False)
        assert "retain = false" in failure[0].message
        with prefilling.prefilled(server, tiny.tokens(100)) as done:
            assert done.summary
        for call in waiting:
            prefilling.release(server, call.admission.lease, reason=2)


def test_connections_have_an_age(start_server):
    with start_server("--max_connection_age=500ms") as server:
        with http2.connect(server.target) as connection:
            assert http2.ended(connection)
        serves(server)


def reflection(server, requests):
    return server.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=bytes, response_deserializer=bytes)(requests, timeout=20)


LIST_SERVICES = b"\x3a\x01*"


def test_reflection(server, start_server):
    listed = next(iter(reflection(server, iter([LIST_SERVICES]))))
    for service in ("PrefillService", "KvHandoffService", "ModelService"):
        assert f"prefilld.v1.{service}".encode() in listed
    with start_server("--reflection=false") as without:
        with pytest.raises(grpc.RpcError) as unknown:
            next(iter(reflection(without, iter([LIST_SERVICES]))))
        assert unknown.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_idle_streams_of_reflection_are_few_threads(start_server):
    with start_server() as server:
        idle = queue.SimpleQueue()
        before = server.threads()
        streams = [reflection(server, iter(idle.get, None)) for _ in range(100)]
        harness.eventually(lambda: sum(s.done() for s in streams) >= 90)
        assert {s.code() for s in streams if s.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert server.threads() <= before + 8
        serves(server)
        for stream in streams:
            idle.put(None)
            stream.cancel()


@pytest.mark.parametrize("size", [9_000, 40_000, 200_000])
def test_much_metadata_is_that_calls_own_affair(server, tiny, size):
    """A stream beside it, on the same connection, goes on."""
    with prefilling.prefilled(server, tiny.tokens(2000)) as done:
        pulling = prefilling.open_pull(server, done.ready)
        chunk = next(pulling)
        with contextlib.ExitStack() as too_much:
            if size > 16 << 10:
                too_much.enter_context(one_line(server, "metadata", "ListModels"))
                too_much.enter_context(refused(grpc.StatusCode.RESOURCE_EXHAUSTED))
            server.models.ListModels(model_service_pb2.ListModelsRequest(), timeout=10,
                                     metadata=[("x-trace", "a" * size)])
        layers, heads, d = 4, 2, 64
        assert len(chunk.data) + sum(len(chunk.data) for chunk in pulling) == (
            layers * 2 * heads * 2000 * d * 4)


def test_the_check_of_itself_passes_with_and_without_tls(start_server):
    """It needs no certificate where clients do: what it wants is an answer."""
    tls = harness.ROOT / "tests/fixtures/tls"
    certified = [f"--tls_cert={tls}/server.pem", f"--tls_key={tls}/server.key"]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(start_server(*flags)) for flags in
                   ([], certified, [*certified, f"--tls_client_ca={tls}/ca.pem"])]

        def checks():
            return [s.metric("prefilld_connections_accepted_total") for s in servers]

        before = checks()
        harness.eventually(lambda: all(now >= then + 4 for now, then in
                                       zip(checks(), before, strict=True)), timeout=60)
        for server in servers:
            assert server.get("/healthz") == (200, "ok\n")
            assert "unreachable" not in {line["event"] for line in server.log()}
            assert server.metric("prefilld_access_refused_total") == 0, "it is no stranger"


def test_who_cannot_reach_itself_is_not_healthy_until_it_can(start_server):
    """Without a descriptor nobody can connect, nor can it; one connection is there already."""
    with start_server(descriptors=1024) as server:
        check = server.channel.unary_unary(CHECK)
        assert check(b"") == b"\x08\x01"
        server.limit_descriptors(3)
        harness.eventually(lambda: check(b"") == b"\x08\x02", timeout=90)
        server.limit_descriptors(1024)
        assert server.get("/healthz")[0] == 503 or check(b"") == b"\x08\x01"
        harness.eventually(lambda: check(b"") == b"\x08\x01", timeout=60)
        assert server.get("/readyz") == (200, "ok\n")
        assert {"unreachable", "reachable"} <= {line["event"] for line in server.log()}


def test_health_over_http(server):
    assert server.get("/healthz") == (200, "ok\n")
    assert server.get("/readyz") == (200, "ok\n")


@pytest.mark.parametrize("path", ["/metrics", "/debug/sparsity", "/healthz"])
def test_head_is_get_without_the_body(server, path):
    connection = http.client.HTTPConnection(server.http, timeout=10)
    connection.request("HEAD", path)
    answer = connection.getresponse()
    assert answer.status == 200 and int(answer.headers["Content-Length"]) > 0
    assert answer.read() == b""


def test_half_requests_keep_no_scraper_waiting(start_server):
    with start_server() as server, contextlib.ExitStack() as stack:
        for _ in range(300):
            half = stack.enter_context(socket.create_connection(http2.address(server.http), 10))
            half.sendall(b"GET /metrics HTTP/1.1\r\nX-a: ")
        assert server.get("/metrics")[0] == 200


def test_ipv6(start_server):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with start_server("--listen=[::1]:0", "--http=[::1]:0", own_addresses=True) as server:
        assert re.fullmatch(r"\[::1\]:\d+", server.target)
        serves(server)
        assert server.get("/healthz")[0] == 200


def test_who_talks_on_after_its_answer_is_cut_off(server):
    with socket.create_connection(http2.address(server.http), 10) as talker:
        talker.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert talker.recv(4096).startswith(b"HTTP/1.1 200")
        with pytest.raises(OSError):
            for _ in range(1000):
                talker.sendall(bytes(1 << 16))
