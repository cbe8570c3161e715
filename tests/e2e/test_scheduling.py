"""Bounds, deadlines and order: who runs when, and who is told to come back."""

import contextlib
import socket
import threading

import grpc
import pytest

from e2e import attending, harness, prefilling
from e2e.harness import refused
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import prefill_service_pb2_grpc

RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED


class Busy:
    """A long dense Attend that occupies the engine; its upload is already over. In between its
    steps pass what is shorter, unless its priority is lower."""

    def __init__(self, server, tokens=28000):
        arrays = attending.small(tokens=tokens, q_heads=1, kv_heads=1)
        self.call = attending.Call(server.prefill)
        self.call.admit(attending.header(*arrays))
        for chunk in attending.chunks(arrays):
            self.call.send(chunk)
        self.call.half_close()
        harness.eventually(lambda: server.metric("prefilld_requests_running") >= 1)

    def wait(self):
        for _ in self.call.stream:
            pass


@contextlib.contextmanager
def waiting_uploads(server, count):
    """Admitted Attends whose tensors do not come; cancelled afterwards."""
    calls = []
    try:
        for _ in range(count):
            call = attending.Call(server.prefill)
            calls.append(call)
            call.admit(attending.header(*attending.small(tokens=1)))
        yield calls
    finally:
        for call in calls:
            call.cancel()


def test_a_full_queue_is_refused_at_once_with_a_hint(start_server, tiny):
    with start_server("--max_waiting_jobs=2", models=[("tiny", tiny.directory)]) as server:
        rejected = server.metric("prefilld_requests_rejected_total")
        busy = Busy(server)
        arrays = attending.small(tokens=1)
        waiting = [attending.Call(server.prefill) for _ in range(2)]
        for call in waiting:
            call.admit(attending.header(*arrays, priority=-1))
            for chunk in attending.chunks(arrays):
                call.send(chunk)
        harness.eventually(lambda: server.metric("prefilld_requests_waiting") == 2)
        with refused(RESOURCE_EXHAUSTED) as failure:
            attending.Call(server.prefill).admit(attending.header(*arrays))
        assert failure[0].retry_after > 0
        with refused(RESOURCE_EXHAUSTED):
            prefilling.start(server, [1, 2, 3])
        assert server.metric("prefilld_requests_rejected_total") == rejected + 2
        busy.call.cancel()
        harness.eventually(lambda: server.metric("prefilld_requests_waiting") == 0)
        with prefilling.prefilled(server, [1, 2, 3]) as done:
            assert done.summary
        for call in waiting:
            call.half_close()


def test_an_upload_that_does_not_come_keeps_nobody_waiting(server):
    with waiting_uploads(server, 3):
        attending.attend(server.prefill, *attending.small(tokens=100), timeout=5)


def test_the_queue_position_and_wait_are_told(server):
    busy = Busy(server)
    call = attending.Call(server.prefill)
    admission = call.admit(attending.header(*attending.small(tokens=64)))
    assert admission.queue_position >= 1
    assert admission.estimated_wait.ToNanoseconds() > 0
    call.cancel()
    busy.wait()


def test_a_deadline_that_cannot_be_met_is_refused_at_admission(server):
    head = attending.header(*attending.small(tokens=1))
    for tensor, heads in zip(head.tensors, (8, 1, 1)):
        tensor.shape[:] = [200_000, heads, 128]
    call = attending.Call(server.prefill, timeout=8)
    call.send(head)
    with refused(RESOURCE_EXHAUSTED) as failure:
        call.receive()
    assert failure[0].reason == "DEADLINE_INFEASIBLE" and failure[0].retry_after is None
    call.half_close()


def test_a_deadline_that_only_the_backlog_makes_late_is_told_when_to_come_again(server, tiny):
    """Of some that each could be done in time, one is too many; it has that from the server at
    once, and a retry helps."""
    calls, failure = [], None
    arrays = attending.small(tokens=6000)
    with contextlib.ExitStack() as cleanup:
        while failure is None and len(calls) < 200:
            call = attending.Call(server.prefill, timeout=3)
            cleanup.callback(call.cancel)
            calls.append(call)
            try:
                call.admit(attending.header(*arrays))
            except grpc.RpcError as error:
                failure = harness.Failure(error)
            else:
                for chunk in attending.chunks(arrays):
                    call.send(chunk)
        assert failure is not None and failure.code is RESOURCE_EXHAUSTED, failure
        assert failure.reason == "BACKLOG" and failure.retry_after > 0, failure
    harness.eventually(lambda: server.metric("prefilld_requests_running") == 0)
    attending.attend(server.prefill, *arrays, timeout=30)


class Relay:
    """Connections to the server that come from another address of this host."""

    def __init__(self, target, source):
        self._target, self._source = target.rsplit(":", 1), source
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._target[0], int(self._target[1])),
                                               source_address=(self._source, 0))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    @staticmethod
    def _copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_who_floods_the_queue_keeps_only_itself_waiting(start_server, tiny):
    """An address has one share, whatever it sends; long prompts of another wait, not short ones
    of this."""
    with start_server("--max_waiting_jobs=16", models=[("tiny", tiny.directory)]) as server:
        flood = []
        with refused(RESOURCE_EXHAUSTED) as failure:
            while True:
                flood.append(prefilling.start(server, tiny.tokens(4000), priority=100))
        assert failure[0].reason == "QUEUE_FULL"
        with Relay(server.target, "127.0.0.2") as relay, \
                grpc.insecure_channel(relay.target, harness.channel_options()) as channel:
            stub = prefill_service_pb2_grpc.PrefillServiceStub(channel)
            other = prefilling.start(server, tiny.tokens(20), stub=stub, priority=-100).finish()
            waiting = server.metric("prefilld_requests_waiting")
            assert other.summary and waiting >= len(flood) - 3, (waiting, len(flood))
            prefilling.release(server, other.ready)
        for call in flood:  # some may be done already
            prefilling.release(server, call.admission.lease, kv.RELEASE_REASON_ABANDONED)
        harness.eventually(lambda: server.metric("prefilld_requests_running") == 0)


def test_a_waiting_prompt_owns_no_blocks(start_server, tiny):
    """More prompts wait than there is memory for, and all of them are served, one after another."""
    with start_server("--kv_memory=8MiB", "--transports=grpc",
                      models=[("tiny", tiny.directory)]) as server:
        total = server.metric("prefilld_kv_blocks", state="free")
        calls = [prefilling.start(server, tiny.tokens(1200), retain=True) for _ in range(5)]
        taken = sum(server.metric("prefilld_kv_blocks", state=state)
                    for state in ("computing", "leased", "transferring"))
        assert taken <= total
        for call in calls:
            prefilling.release(server, call.finish().ready)
        assert server.metric("prefilld_kv_blocks", state="free") == total


def test_a_deadline_in_the_past(server, tiny):
    """gRPC rounds a past deadline up to a moment from now: too late, or not to be met."""
    for timeout in (0, -1):
        with refused({DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED}) as failure:
            prefilling.start(server, tiny.tokens(100), timeout=timeout)
        assert failure[0].reason in (None, "DEADLINE_INFEASIBLE")
        assert failure[0].retry_after is None
        with refused({DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED}):
            attending.Call(server.prefill, timeout=timeout).admit(
                attending.header(*attending.small(tokens=100)))


def test_a_deadline_that_passes_while_waiting(server, tiny):
    busy = Busy(server)
    with refused({DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED}):
        prefilling.start(server, tiny.tokens(50), timeout=.15).finish()
    busy.wait()


def test_a_deadline_that_passes_during_the_upload(server):
    call = attending.Call(server.prefill, timeout=.3)
    call.admit(attending.header(*attending.small(tokens=100)))
    with refused(DEADLINE_EXCEEDED):
        call.receive()
    call.half_close()


def finishing_order(server, requests):
    """Names in the order in which their jobs finish, all submitted while the engine is busy."""
    busy = Busy(server)
    finished, threads = [], []
    for name, fields in requests:
        call = prefilling.start(server, **fields)

        def run(name=name, call=call):
            call.finish()
            finished.append(name)
            prefilling.release(server, call.ready)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
    busy.wait()
    for thread in threads:
        thread.join()
    return finished


def test_higher_priority_runs_first(server, tiny):
    # Too long to share a batch with one another.
    order = finishing_order(server, [
        ("low", dict(token_ids=tiny.tokens(4000), priority=-10)),
        ("high", dict(token_ids=tiny.tokens(4000), priority=10))])
    assert order == ["high", "low"]


def test_the_least_slack_runs_first(server, tiny):
    order = finishing_order(server, [
        ("no deadline", dict(token_ids=tiny.tokens(4000), timeout=None)),
        ("deadline", dict(token_ids=tiny.tokens(4000), timeout=30))])
    assert order == ["deadline", "no deadline"]


def test_a_short_prompt_does_not_wait_for_a_long_one(server, tiny):
    long = prefilling.start(server, tiny.tokens(9000))
    harness.eventually(lambda: server.metric("prefilld_requests_running") >= 1)
    with prefilling.prefilled(server, tiny.tokens(20), priority=1) as done:
        assert done.summary
        assert server.metric("prefilld_requests_running") == 1, "the long prompt is over already"
    prefilling.release(server, long.admission.lease, kv.RELEASE_REASON_ABANDONED)
    with refused({grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}):
        long.finish()


@pytest.mark.parametrize("stage", ["before the upload", "during the upload", "in the queue",
                                   "running"])
def test_cancelling_an_attend(server, stage):
    busy = Busy(server) if stage == "in the queue" else None
    if stage == "running":
        Busy(server).call.cancel()
    else:
        arrays = attending.small(tokens=2000)
        call = attending.Call(server.prefill)
        call.admit(attending.header(*arrays))
        parts = attending.chunks(arrays, size=1 << 16)
        for chunk in {"before the upload": [], "during the upload": parts[:5]}.get(stage, parts):
            call.send(chunk)
        call.cancel()
    if busy:
        busy.wait()
    harness.eventually(lambda: server.metric("prefilld_requests_running") == 0)
    assert server.metric("prefilld_requests_waiting") == 0


def test_tensors_beyond_the_memory_are_refused_before_they_are_sent(start_server):
    with start_server("--attend_memory=1MiB") as server:
        def admit(tokens):
            call = attending.Call(server.prefill)
            call.admit(attending.header(*attending.small(tokens=tokens)))
            return call
        with refused({RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT}) as never:
            admit(5000)
        assert never[0].retry_after is None  # it can never fit
        first = admit(200)
        with refused(RESOURCE_EXHAUSTED) as later:
            admit(200)
        assert later[0].retry_after > 0
        first.cancel()

        def is_served():  # a moment after the call has ended its memory is back
            with contextlib.suppress(grpc.RpcError):
                return attending.attend(server.prefill, *attending.small(tokens=200))
        harness.eventually(is_served)


def test_an_upload_that_stalls_is_given_up(start_server):
    with start_server("--upload_timeout=1s") as server:
        arrays = attending.small(tokens=400)
        call = attending.Call(server.prefill)
        call.admit(attending.header(*arrays))
        call.send(attending.chunks(arrays, size=1 << 14)[0])
        with refused({DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED}):
            call.receive()
        call.half_close()
        harness.eventually(lambda: server.metric("prefilld_upload_bytes_inflight") == 0)


def test_who_is_refused_takes_nobodys_place(server):
    """A later Attend with the same request_id that is not admitted leaves the first one alone."""
    first = attending.Call(server.prefill)
    arrays = attending.small(tokens=100)
    first.admit(attending.header(*arrays, request_id="mine"))
    long = attending.small(tokens=20_000, q_heads=1, kv_heads=1)
    with refused({RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED}):
        attending.Call(server.prefill, timeout=.02).admit(
            attending.header(*long, request_id="mine"))
    for chunk in attending.chunks(arrays):
        first.send(chunk)
    first.finish()


def test_a_long_attend_sends_short_deadlines_away_for_a_step_only(start_server, tiny):
    """It runs in steps: what comes meanwhile waits for one, and is told so."""
    with start_server(models=[("tiny", tiny.directory)]) as server:
        busy = Busy(server, tokens=28000)
        for _ in range(20):
            with prefilling.prefilled(server, tiny.tokens(20), timeout=1.9):
                pass
        busy.call.cancel()
