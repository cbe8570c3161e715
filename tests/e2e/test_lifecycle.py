"""SIGTERM, and what a server does with work and leases while it drains."""

import os
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest

from e2e import attending, harness, prefilling
from e2e.harness import refused
from e2e.test_observability import check_health
from e2e.test_scheduling import Busy

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def own_server(start_server, tiny):
    with start_server("--kv_memory=64MiB", models=[("tiny", tiny.directory)]) as server:
        yield server


def ended(server, code=0):
    assert server.wait() == code
    server.channel.close()


@pytest.fixture
def mortal(start_server, tiny):
    """A server that the test itself ends."""
    server = start_server("--kv_memory=64MiB", models=[("tiny", tiny.directory)])
    yield server
    server.channel.close()
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()
        pytest.fail("still running")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_within_two_seconds(mortal, number):
    started = time.monotonic()
    mortal.process.send_signal(number)
    ended(mortal)
    assert time.monotonic() - started < 2


def test_a_step_that_never_ends_ends_the_server(start_server, tiny):
    server = start_server("--inject_hang=2", "--stall_timeout=1s",
                          models=[("tiny", tiny.directory)])
    call = prefilling.start(server, tiny.tokens(100), request_id="hangs")
    started = time.monotonic()
    harness.eventually(lambda: check_health(server, "") != 1, message="not live")
    with refused(UNAVAILABLE):
        call.finish()
    assert time.monotonic() - started < 10
    ended(server, code=1)
    told, = [line for line in server.log() if line["event"] == "step_stalled"]
    assert told["request_ids"] == ["hangs"]
    assert (told["model"], told["layer"], told["behind"]) == ("tiny", 1, [])
    assert 1 < told["seconds"] < 10 and 0 < told["predicted_seconds"] < 1


def test_all_prompts_of_a_batch_that_never_ends_are_named(start_server, tiny):
    server = start_server("--inject_hang=2", "--stall_timeout=1s",
                          models=[("tiny", tiny.directory)])
    busy = Busy(server, tokens=16000)  # in the first of its steps both come; they begin together
    calls = [prefilling.start(server, tiny.tokens(100), request_id=name) for name in "ab"]
    busy.wait()
    for call in calls:
        with refused(UNAVAILABLE):
            call.finish()
    ended(server, code=1)
    told, = [line for line in server.log() if line["event"] == "step_stalled"]
    assert (sorted(told["request_ids"]), told["layer"]) == (["a", "b"], 0)


def test_an_attend_that_never_ends_is_named_too(start_server, tiny):
    server = start_server("--inject_hang=1", "--stall_timeout=1s")
    with refused(UNAVAILABLE):
        attending.attend(server.prefill, *attending.small(tokens=20), request_id="hangs-too")
    ended(server, code=1)
    told, = [line for line in server.log() if line["event"] == "step_stalled"]
    assert (told["request_ids"], told["model"], told["layer"]) == (["hangs-too"], "attend", None)


def test_draining_finishes_what_runs_and_refuses_what_is_new(mortal, tiny):
    tokens = 7000
    call = prefilling.start(mortal, tiny.tokens(tokens))
    pull = prefilling.open_pull(mortal, call.admission.lease)
    harness.eventually(lambda: mortal.metric("prefilld_requests_running") == 1)
    mortal.process.send_signal(signal.SIGTERM)
    harness.eventually(lambda: mortal.metric("prefilld_ready") == 0, timeout=2)
    assert check_health(mortal, "prefilld.v1.PrefillService") == 2
    assert check_health(mortal, "") == 1
    with refused(UNAVAILABLE) as failure:
        prefilling.start(mortal, [1, 2, 3])
    assert failure[0].retry_after > 0
    with refused(UNAVAILABLE):
        attending.attend(mortal.prefill, *attending.small(tokens=10))
    assert mortal.process.poll() is None, "it did not wait for its work"
    call.finish()
    data = prefilling.collect(prefilling.checked(pull))
    assert sum(len(x) for layer in data.values() for x in layer) == tiny.kv_bytes(tokens)
    again = prefilling.pull(mortal, call.ready)  # the lease is kept until it is consumed
    assert again == data
    prefilling.release(mortal, call.ready)
    ended(mortal)


def test_a_lease_that_nobody_consumes_ends_the_drain_when_it_expires(mortal, tiny):
    prefilling.start(mortal, tiny.tokens(100), lease_ttl=1).finish()
    mortal.process.send_signal(signal.SIGTERM)
    ended(mortal)


def test_the_drain_timeout_bounds_the_wait(start_server, tiny):
    server = start_server("--kv_memory=64MiB", "--drain_timeout=1s",
                          models=[("tiny", tiny.directory)])
    prefilling.start(server, tiny.tokens(100), lease_ttl=60).finish()
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    ended(server)
    assert time.monotonic() - started < 4


def test_who_watches_the_health_does_not_hold_the_drain(start_server):
    server = start_server("--drain_timeout=10m")
    with server.new_channel() as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch", response_deserializer=bytes,
                                     request_serializer=bytes)(b"")
        assert next(watch) == b"\x08\x01", "serving"
        server.process.send_signal(signal.SIGTERM)
        ended(server)


@pytest.mark.parametrize("begun", ["no header", "no chunk", "some chunks"])
def test_an_upload_that_goes_nowhere_does_not_hold_the_drain(start_server, begun):
    server = start_server("--drain_timeout=10m", "--upload_timeout=10m")
    arrays = attending.small(tokens=300)
    call = attending.Call(server.prefill, timeout=600)
    if begun == "no header":
        grpc.channel_ready_future(server.channel).result(10)
        harness.eventually(lambda: server.metric("prefilld_ready") == 1)
    else:
        call.send(attending.header(*arrays))
        assert call.receive().WhichOneof("part") == "admission"
    if begun == "some chunks":
        call.send(attending.chunks(arrays)[0])
    server.process.send_signal(signal.SIGTERM)
    with refused(UNAVAILABLE) as failure:
        call.receive()
    if begun != "no header":  # else it may not have been seen before there was no server
        assert (failure[0].reason, failure[0].retry_after) == ("DRAINING", 1)
    ended(server)


def test_an_upload_that_moves_is_waited_for(start_server):
    server = start_server("--drain_timeout=10m")
    arrays = attending.small(tokens=300)
    call = attending.Call(server.prefill)
    call.send(attending.header(*arrays))
    assert call.receive().WhichOneof("part") == "admission"
    server.process.send_signal(signal.SIGTERM)
    harness.eventually(lambda: server.metric("prefilld_ready") == 0)
    for chunk in attending.chunks(arrays):
        call.send(chunk)
    assert call.receive().WhichOneof("part") == "outputs"
    for _ in call.stream:
        pass
    ended(server)


def test_streams_that_were_closed_are_nobody_elses():
    process = subprocess.Popen(["bash", "-c", 'exec "$@" >&- 2>&-', "bash",
                                str(harness.PREFILLD), "--listen=127.0.0.1:0",
                                "--http=127.0.0.1:0", "--backend=cpu"])
    try:
        streams = [f"/proc/{process.pid}/fd/{number}" for number in (1, 2)]
        harness.eventually(
            lambda: [os.path.realpath(stream) for stream in streams] == ["/dev/null"] * 2)
    finally:
        process.kill()
        process.wait()


def test_connections_that_say_nothing_do_not_hold_the_server(own_server):
    host, port = own_server.target.split(":")
    http_host, http_port = own_server.http.split(":")
    quiet = [socket.create_connection((host, int(port))) for _ in range(5)]
    quiet += [socket.create_connection((http_host, int(http_port))) for _ in range(12)]
    quiet[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert own_server.metric("prefilld_ready") == 1
    with prefilling.prefilled(own_server, [1, 2, 3]) as done:
        assert done.summary
    for connection in quiet:
        connection.close()


KILLED_CLIENT = """
import sys
sys.path[:0] = sys.argv[1:3]
from e2e import harness, prefilling
import grpc
class Server: pass
server = Server()
channel = grpc.insecure_channel(sys.argv[3])
server.prefill = harness.prefill_service_pb2_grpc.PrefillServiceStub(channel)
server.handoff = harness.kv_handoff_service_pb2_grpc.KvHandoffServiceStub(channel)
call = prefilling.start(server, [i % 300 for i in range(5000)], lease_ttl=1)
stream = prefilling.open_pull(server, call.admission.lease)
next(iter(stream))
print("pulling", flush=True)
sys.stdin.read()
"""


def test_a_client_killed_in_the_middle_of_its_pull_leaves_nothing(own_server):
    free = own_server.footprint()
    client = subprocess.Popen(
        [sys.executable, "-c", KILLED_CLIENT, str(harness.ROOT / "tests"),
         str(harness.ROOT / "client/python"), own_server.target],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdout.readline() == b"pulling\n"
    client.kill()
    client.wait()
    harness.eventually(lambda: own_server.footprint() == free, timeout=15)
