import concurrent.futures
import copy
import multiprocessing
import pickle

import grpc
import pytest
from google.rpc import error_details_pb2

from fake_server import MODEL, Abort, Hang, retry_info
from prefilld import PrefillClient, PrefilldError, RetryPolicy

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def test_unavailable_is_tried_again_with_the_same_request_id(server, client):
    server.faults["Prefill"] = [Abort(UNAVAILABLE), Abort(UNAVAILABLE)]
    with client.prefill(MODEL, [1, 2, 3]) as prompt:
        assert len(list(prompt)) == 3
    assert len({r.request_id for r in server.calls["Prefill"]}) == 1
    assert len(server.calls["Prefill"]) == 3


def test_attempts_are_bounded(server, client):
    server.faults["ListModels"] = [Abort(UNAVAILABLE)] * 10
    with pytest.raises(PrefilldError) as caught:
        client.models()
    assert caught.value.code is UNAVAILABLE
    assert len(server.faults["ListModels"]) == 6  # four attempts


def test_a_server_that_is_not_there_is_unavailable():
    with PrefillClient("127.0.0.1:1", retry=RetryPolicy(attempts=2, initial_backoff=0.01)) as c:
        assert c.health().live is False
        with pytest.raises(PrefilldError) as caught:
            c.models()
    assert caught.value.code is UNAVAILABLE


@pytest.mark.parametrize("target", ["http://127.0.0.1:50051", "127.0.0.1", "[::1]"])
def test_what_is_no_target_is_said_at_once(target):
    with pytest.raises(PrefilldError, match="HOST:PORT|no port") as caught:
        PrefillClient(target)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_exhausted_with_retry_info_waits_that_long(server, client, monkeypatch):
    waits = []
    monkeypatch.setattr("threading.Event.wait", lambda self, t=None: waits.append(t) or False)
    server.faults["ListModels"] = [Abort(EXHAUSTED, retry_info(0.75))]
    assert len(client.models()) == 1
    assert any(t is not None and 0.75 <= t <= 0.75 * 1.5 for t in waits), waits


def test_exhausted_without_retry_info_is_final(server, client):
    server.faults["Prefill"] = [Abort(EXHAUSTED, error_details_pb2.ErrorInfo(
        reason="DEADLINE_INFEASIBLE"))]
    with pytest.raises(PrefilldError) as caught:
        client.prefill(MODEL, [1, 2, 3])
    assert caught.value.code is EXHAUSTED
    assert caught.value.reason == "DEADLINE_INFEASIBLE"
    assert caught.value.retry_delay is None
    assert len(server.calls["Prefill"]) == 1


def test_a_retry_that_would_outlast_the_deadline_is_not_waited_for(server, client):
    server.faults["Prefill"] = [Abort(EXHAUSTED, retry_info(60))]
    with pytest.raises(PrefilldError) as caught:
        client.prefill(MODEL, [1, 2, 3], timeout=5)
    assert caught.value.code is EXHAUSTED
    assert caught.value.retry_delay == 60


def test_violations_are_listed(server, client):
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sparsity.gamma", description="2 is not below 1")
    server.faults["Prefill"] = [Abort(grpc.StatusCode.INVALID_ARGUMENT, bad)]
    with pytest.raises(PrefilldError) as caught:
        client.prefill(MODEL, [1], gamma=2)
    assert caught.value.violations == (("sparsity.gamma", "2 is not below 1"),)
    assert len(server.calls["Prefill"]) == 1


def test_deadline_ends_a_computation_that_hangs(server, client):
    server.faults["Prefill"] = [Hang()]
    server.faults["PullKv"] = [Hang()]
    with pytest.raises(PrefilldError) as caught:
        with client.prefill(MODEL, [1, 2], timeout=0.5) as prompt:
            prompt.summary
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert server.calls["ReleaseLease"][0].reason == 2  # ABANDONED


def test_unknown_names_are_refused_before_they_are_sent(server, client):
    with pytest.raises(PrefilldError, match="method 'magic' is not one of"):
        client.prefill(MODEL, [1], method="magic")
    with pytest.raises(TypeError, match="gama"):
        client.prefill(MODEL, [1], gama=0.9)
    with pytest.raises(PrefilldError, match="NOT_FOUND"):
        client.prefill("other", [1])
    assert not server.calls["Prefill"]


def facts(error):
    return (str(error), error.code, error.message, error.violations, error.retry_delay,
            error.reason)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy,
                                    lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_can_be_copied(copied):
    error = PrefilldError(grpc.StatusCode.NOT_FOUND, "no such model", violations=(("a", "b"),),
                          retry_delay=1.5, reason="X")
    assert facts(copied(error)) == facts(error)


def refuse():
    raise PrefilldError(UNAVAILABLE, "down", reason="X")


def test_errors_cross_processes():
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as pool:
        with pytest.raises(PrefilldError) as caught:
            pool.submit(refuse).result(60)
    assert (caught.value.code, caught.value.reason) == (UNAVAILABLE, "X")
