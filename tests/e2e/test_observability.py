"""Metrics that move, the report of every head, the log and health."""

import fcntl
import json
import os
import struct
import termios

import grpc
import numpy as np
import pytest

from e2e import attending, harness, prefilling
from e2e.harness import moved, refused, total
from prefilld.v1 import prefill_service_pb2 as pb

# 1 ms to 160 s, 1-2.5-5 between.
DURATION_BUCKETS = [a * b for b in (.001, .01, .1, 1, 10) for a in (1, 2.5, 5)] + [100, 160]
RATIO_BUCKETS = [.01, .02, .05, .1, .15, .2, .3, .4, .5, .7, .9, 1]


@pytest.fixture
def change(server):
    """change(action) -> (samples before, samples after)."""
    def run(action):
        before = server.metrics()
        action()
        harness.eventually(lambda: server.metric("prefilld_requests_running") == 0)
        return before, server.metrics()
    return run


def one_prefill(server, tiny, method="joint", tokens=1500, **fields):
    with prefilling.prefilled(server, tiny.tokens(tokens), method=method, **fields) as done:
        prefilling.pull(server, done.ready)
    return done


def test_a_prefill_and_its_pull_move_the_metrics(server, tiny, change):
    samples = change(lambda: one_prefill(server, tiny))
    assert moved(*samples, "prefilld_requests_total", method="Prefill", code="OK") == 1
    assert moved(*samples, "prefilld_requests_total", method="PullKv", code="OK") == 1
    assert moved(*samples, "prefilld_request_duration_seconds_count", method="Prefill") == 1
    assert moved(*samples, "prefilld_time_to_first_layer_seconds_count") == 1
    assert moved(*samples, "prefilld_tokens_total") == 1500
    assert moved(*samples, "prefilld_prompt_tokens_count") == 1
    assert moved(*samples, "prefilld_prompt_tokens_sum") == 1500
    heads = 4 * 4
    assert moved(*samples, "prefilld_head_density_ratio_count", model="tiny",
                 pattern="joint") == heads
    assert moved(*samples, "prefilld_captured_mass_ratio_count", model="tiny") == heads
    assert moved(*samples, "prefilld_captured_mass_ratio_sum", model="tiny") > .8 * heads
    assert total(samples[1], "prefilld_layer_density_ratio", model="tiny", layer="0") > 0
    assert moved(*samples, "prefilld_handoff_bytes_total", transport="grpc") == tiny.kv_bytes(1500)
    assert moved(*samples, "prefilld_handoff_duration_seconds_count", transport="grpc") == 1
    for phase in ("queue", "estimate", "select", "attention", "linear", "handoff"):
        assert moved(*samples, "prefilld_phase_duration_seconds_count", phase=phase) > 0, phase
    for phase in ("estimate", "attention", "linear"):
        assert moved(*samples, "prefilld_phase_duration_seconds_sum", phase=phase) > 0, phase


def test_an_attend_moves_the_metrics(server, change):
    samples = change(lambda: attending.attend(server.prefill, *attending.small(tokens=1500),
                                              sparsity=attending.policy("flexprefill")))
    assert moved(*samples, "prefilld_requests_total", method="Attend", code="OK") == 1
    assert moved(*samples, "prefilld_request_duration_seconds_count", method="Attend") == 1
    assert moved(*samples, "prefilld_phase_duration_seconds_count", phase="upload") == 1
    patterns = [moved(*samples, "prefilld_head_density_ratio_count", pattern=p)
                for p in ("vertical_slash", "query_aware")]
    assert sum(patterns) == 4


def test_refusals_and_failures_are_counted(server, tiny, change):
    def refuse():
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            prefilling.start(server, [])
        with refused(grpc.StatusCode.NOT_FOUND):
            prefilling.start(server, [1], model="none")
        with prefilling.prefilled(server, [1]) as done:
            with refused(grpc.StatusCode.FAILED_PRECONDITION):
                list(prefilling.open_pull(server, done.ready, boot_id="x"))
    samples = change(refuse)
    for code in ("INVALID_ARGUMENT", "NOT_FOUND"):
        assert moved(*samples, "prefilld_requests_total", method="Prefill", code=code) == 1
    assert moved(*samples, "prefilld_requests_rejected_total") == 2
    assert moved(*samples, "prefilld_handoff_failures_total", transport="grpc") == 1


def test_gauges_show_work_while_it_lasts(server, tiny):
    call = prefilling.start(server, tiny.tokens(6000))
    harness.eventually(lambda: server.metric("prefilld_requests_running") == 1)
    blocks = {state: server.metric("prefilld_kv_blocks", state=state)
              for state in ("free", "computing", "leased")}
    assert blocks["computing"] + blocks["leased"] >= 47
    assert server.metric("prefilld_leases_active") == 1
    waiting = attending.Call(server.prefill)
    waiting.admit(attending.header(*attending.small(tokens=77)))
    assert server.metric("prefilld_requests_uploading") == 1
    assert server.metric("prefilld_queue_tokens") == 0
    waiting.cancel()
    prefilling.release(server, call.admission.lease, prefilling.kv.RELEASE_REASON_ABANDONED)
    with refused({grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}):
        call.finish()


LEASE_ENDS = {"consumed", "abandoned", "expired"}


def test_every_lease_is_counted_once_when_granted_and_once_when_it_ends(server, tiny):
    def leases():
        samples = server.metrics()
        ended = {reason: total(samples, "prefilld_leases_ended_total", reason=reason)
                 for reason in LEASE_ENDS}
        assert sum(ended.values()) == total(samples, "prefilld_leases_ended_total"), "no other"
        return (total(samples, "prefilld_leases_granted_total"), ended,
                total(samples, "prefilld_leases_active"))

    granted, ended, active = leases()
    assert (granted, active) == (sum(ended.values()), 0), "after whatever ran before"
    kept = prefilling.start(server, tiny.tokens(50)).finish()
    one_prefill(server, tiny, tokens=50)  # consumed
    prefilling.release(server, prefilling.start(server, tiny.tokens(50)).finish().ready,
                       prefilling.kv.RELEASE_REASON_ABANDONED)
    prefilling.start(server, tiny.tokens(50), lease_ttl=.2).finish()  # expires
    prefilling.start(server, tiny.tokens(6000)).stream.cancel()  # its caller leaves
    with refused(grpc.StatusCode.NOT_FOUND):  # no lease at all
        prefilling.start(server, [1], model="none")
    expected = {"consumed": ended["consumed"] + 1, "abandoned": ended["abandoned"] + 2,
                "expired": ended["expired"] + 1}
    harness.eventually(lambda: leases() == (granted + 5, expected, 1), message="four ended")
    prefilling.release(server, kept.ready)
    expected["consumed"] += 1
    harness.eventually(lambda: leases() == (granted + 5, expected, 0))


def test_transferring_blocks_are_seen(server, tiny):
    call = prefilling.start(server, tiny.tokens(4000)).finish()
    stream = prefilling.open_pull(server, call.ready)
    next(iter(stream))
    assert server.metric("prefilld_kv_blocks", state="transferring") > 0
    for _ in stream:
        pass
    harness.eventually(lambda: server.metric("prefilld_kv_blocks", state="transferring") == 0)
    prefilling.release(server, call.ready)


def test_heads_run_dense_are_counted_with_their_reason(server, change):
    def run():
        attending.attend(server.prefill, *attending.small(tokens=1500),
                         sparsity=attending.policy("joint", gamma=.5, min_captured_mass=.99))
        attending.attend(server.prefill, *attending.small(tokens=500),
                         sparsity=attending.policy("flexprefill"))
    samples = change(run)
    assert moved(*samples, "prefilld_dense_fallback_heads_total", reason="min_captured_mass") == 4
    assert moved(*samples, "prefilld_dense_fallback_heads_total", reason="short_prompt") == 4


def test_static_facts(server):
    assert server.metric("prefilld_ready") == 1
    assert server.metric("prefilld_build_info") == 1
    assert server.metric("prefilld_handoff_transport_info", transport="grpc") == 1


def test_buckets_are_those_of_the_contract(server):
    text = server.get("/metrics")[1]
    for name, buckets in (("prefilld_request_duration_seconds", DURATION_BUCKETS),
                          ("prefilld_phase_duration_seconds", DURATION_BUCKETS),
                          ("prefilld_head_density_ratio", RATIO_BUCKETS)):
        bounds = sorted({float(dict(pairs)["le"]) for (n, pairs) in server.metrics()
                         if n == name + "_bucket"} - {float("inf")})
        assert bounds == pytest.approx(buckets)
        assert f"# TYPE {name} histogram" in text and f"# HELP {name} " in text


def test_every_metric_has_the_prefix_and_a_help_text(server):
    text = server.get("/metrics")[1]
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert names and all(name.startswith("prefilld_") for name in names)
    helped = {line.split()[2] for line in text.splitlines()
              if line.startswith("# HELP") and len(line.split()) > 3}
    assert names == helped


@pytest.mark.parametrize("method", ["dense", "flexprefill", "joint"])
def test_the_report_is_the_one_of_the_summary(server, tiny, method):
    done = one_prefill(server, tiny, method, request_id=f"report-{method}")
    report = server.prefill.GetSparsityReport(
        pb.GetSparsityReportRequest(request_id=f"report-{method}"))
    assert report == done.summary.sparsity
    assert (report.layers, report.heads) == (4, 4)
    density = np.frombuffer(report.density_u16, "<u2").reshape(4, 4) / 65535
    assert density.mean() == pytest.approx(report.mean_density, abs=1e-4)
    for layer, event in enumerate(done.layers):
        assert density[layer].mean() == pytest.approx(event.density, abs=1e-4)
    codes = set(report.pattern_u8)
    assert codes <= {"dense": {0}, "flexprefill": {1, 2}, "joint": {3}}[method]
    assert report.captured_mass_measured == (method == "joint")
    assert (method == "dense") == (report.mean_density == 1)


def test_captured_mass_is_measured_on_request(server, tiny):
    policy = attending.policy("flexprefill", report_level=2)
    with prefilling.prefilled(server, tiny.tokens(1500), sparsity=policy) as done:
        report = done.summary.sparsity
    mean = np.frombuffer(report.captured_mass_u16, "<u2") / 65535
    least = np.frombuffer(report.captured_mass_min_u16, "<u2") / 65535
    assert len(mean) == len(least) == 16 and (least <= mean + 1e-4).all()
    assert mean.mean() == pytest.approx(report.mean_captured_mass, abs=1e-4)


def test_an_unknown_report_is_not_found(server):
    with refused(grpc.StatusCode.NOT_FOUND) as failure:
        server.prefill.GetSparsityReport(pb.GetSparsityReportRequest(request_id="none"))
    assert failure[0].resource[1] == "none"


def test_debug_sparsity_lists_the_last_requests(server, tiny):
    done = one_prefill(server, tiny, request_id="debug-1")
    status, body = server.get("/debug/sparsity?format=json")
    assert status == 200
    text = json.dumps(json.loads(body))
    assert "debug-1" in text
    density = np.frombuffer(done.summary.sparsity.density_u16, "<u2") / 65535
    entry = find(json.loads(body), "debug-1")
    assert np.ravel(entry["density"]) == pytest.approx(density, abs=1e-3)


def find(tree, request_id):
    """The object of this request anywhere in the tree."""
    if isinstance(tree, dict):
        if tree.get("request_id") == request_id:
            return tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            found = find(branch, request_id)
            if found:
                return found
    return None


@pytest.mark.parametrize("path", ["/", "/nothing", "/metrics/../../etc/passwd", "/debug/sparsity/x",
                                  "/debug/sparsity?format=xml", "/" + "a" * 5000])
def test_other_paths_are_refused_quietly(server, path):
    assert 400 <= server.get(path)[0] < 500
    assert server.get("/metrics")[0] == 200


def test_the_log_is_json_with_request_ids(server, tiny):
    one_prefill(server, tiny, tokens=50, request_id="logged-1")
    attending.attend(server.prefill, *attending.small(tokens=20), request_id="logged-2")
    with refused(grpc.StatusCode.NOT_FOUND):
        prefilling.start(server, [1], model="none", request_id="logged-3")
    for name in ("logged-1", "logged-2", "logged-3"):
        lines = harness.eventually(
            lambda: [line for line in server.log() if line.get("request_id") == name],
            message=f"a log line of {name}")
        assert all({"ts", "level", "event"} <= set(line) for line in lines)


@pytest.mark.parametrize("method", [
    "PrefillService/Prefill", "PrefillService/GetSparsityReport", "KvHandoffService/Negotiate",
    "KvHandoffService/PullKv", "KvHandoffService/RenewLease", "KvHandoffService/ReleaseLease",
    "ModelService/GetModel", "ModelService/ListModels"])
def test_bytes_that_are_no_message_are_refused_and_counted(server, change, method):
    call = server.channel.unary_stream(f"/prefilld.v1.{method}", request_serializer=bytes,
                                       response_deserializer=bytes)

    def send():
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "request"):
            list(call(b"\xff\xff\xff", timeout=5))

    assert moved(*change(send), "prefilld_requests_total", method=method.split("/")[1],
                 code="INVALID_ARGUMENT") == 1


def check_health(server, service):
    """The status number of grpc.health.v1: 1 serving, 2 not serving."""
    call = server.channel.unary_unary("/grpc.health.v1.Health/Check",
                                      request_serializer=bytes, response_deserializer=bytes)
    name = service.encode()
    answer = call(b"\x0a" + bytes([len(name)]) + name if name else b"", timeout=5)
    assert answer[:1] == b"\x08"
    return answer[1]


def test_health(server):
    assert check_health(server, "") == 1
    assert check_health(server, "prefilld.v1.PrefillService") == 1
    with refused(grpc.StatusCode.NOT_FOUND):
        check_health(server, "other")


def test_nobody_waits_for_who_reads_the_log(tiny, tmp_path):
    """stderr is a pipe whose reader has stopped: it fills, and the server serves and ends."""
    pipe = tmp_path / "stderr"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with harness.Server(log_path=pipe, models=[("tiny", tiny.directory)]) as server:
            def unread():
                return struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"\0" * 4))[0]

            before = -1
            while unread() > before:  # as long as lines still go in
                before = unread()
                for _ in range(20):
                    with prefilling.prefilled(server, [1, 2, 3]):
                        pass
            for _ in range(20):
                with prefilling.prefilled(server, [1, 2, 3]) as done:
                    assert done.summary
            assert before > 30_000, "it is full"
            assert server.metric("prefilld_log_lines_dropped_total") == 0, "they wait in memory"
    finally:
        os.close(reader)
