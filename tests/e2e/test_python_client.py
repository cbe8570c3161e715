"""The Python package against a real server: the promises of its public interface."""

import asyncio
import dataclasses
import gc
import importlib
import multiprocessing
import os
import random
import signal
import threading
import time

import grpc
import numpy as np
import pytest

import prefilld
from e2e import harness, mapping, prefilling
from e2e.harness import eventually
from spec import inputs, llama
from spec import sparse_attention as spec


FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def client(server):
    with prefilld.PrefillClient(server.target) as client:
        yield client


@pytest.fixture
def by_transport(server):
    """The server's clients with a pinned transport."""
    with prefilld.PrefillClient(server.target, transport="grpc") as grpc_client, \
            prefilld.PrefillClient(server.target, transport="posix_shm") as shm_client:
        yield {"grpc": grpc_client, "posix_shm": shm_client}


def test_attend(client):
    q, k, v = inputs.make("sink", 700)
    phases = []
    result = client.attend(q, k, v, method="joint", gamma=.8, return_lse=True,
                           return_block_index=True,
                           progress=lambda fraction, phase: phases.append((phase, fraction)))
    expected = spec.run(q, k, v, spec.Policy("joint", .8))
    assert prefilling.relative_error(result.o, expected.o) <= 1e-5
    np.testing.assert_allclose(result.lse, expected.lse, atol=1e-3)
    assert result.block_count.tolist() == [[len(row) for row in head] for head in expected.rows]
    assert result.pattern.tolist() == [spec.JOINT] * 4
    assert result.report.mean_density == pytest.approx(expected.density.mean(), abs=1e-4)
    assert client.sparsity_report(result.request_id).mean_density == result.report.mean_density
    for phase in {name for name, _ in phases}:
        fractions = [f for name, f in phases if name == phase]
        assert fractions == sorted(fractions) and 0 <= fractions[0] and fractions[-1] <= 1


def test_prefill_yields_layers_as_they_come(client, tiny):
    ids = tiny.tokens(900)
    with client.prefill("tiny", ids, method="joint", gamma=.8, return_logits=True) as prompt:
        layers = list(prompt)
        logits = prompt.logits
        assert prompt.report.mean_density < 1
    keys, values, expected = llama.prefill(tiny.config, tiny.weights, ids,
                                           spec.Policy("joint", .8))
    assert [layer.index for layer in layers] == list(range(len(keys)))
    for layer, k, v in zip(layers, keys, values):
        assert prefilling.relative_error(layer.k, k) <= 1e-4
        assert prefilling.relative_error(layer.v, v) <= 1e-4
    assert prefilling.relative_error(logits, expected) <= 1e-4


def test_another_process_may_pull_a_detached_lease(client, server, tiny):
    ids = tiny.tokens(300)
    prompt = client.prefill("tiny", ids, method="dense")
    lease = prefilld.Lease(**dataclasses.asdict(prompt.detach()))
    with prefilld.PrefillClient(server.target) as other:
        layers = list(other.pull(lease, "tiny"))
        other.release(lease)
    assert len(layers) == 4 and layers[0].k.shape == (2, 300, 64)


def test_leaving_early_abandons_the_work(client, server, tiny):
    with client.prefill("tiny", tiny.tokens(5000), method="dense") as prompt:
        next(iter(prompt))
    # `server` checks that no lease, block or running job is left.


def test_leaving_what_has_ended_already_is_no_error(client, tiny):
    with client.prefill("tiny", tiny.tokens(100)) as call:
        call.summary
        client.release(call.lease, consumed=False)  # as a cancelled call does it, a moment earlier


def test_refusals_carry_their_facts(client):
    with pytest.raises(prefilld.PrefilldError) as invalid:
        client.prefill("tiny", [1, 2], gamma=2.0)
    assert invalid.value.code == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(prefilld.PrefilldError) as unknown:
        client.prefill("none", [1, 2])
    assert unknown.value.code == grpc.StatusCode.NOT_FOUND
    with pytest.raises(prefilld.PrefilldError):
        client.attend(*inputs.make("random", 10), softmax_scale=-1.0)


def test_a_full_memory_is_waited_for(start_server, tiny):
    with start_server("--kv_memory=8MiB", models=[("tiny", tiny.directory)]) as server:
        holder = prefilling.start(server, tiny.tokens(1200)).finish()
        timer = threading.Timer(1, lambda: prefilling.release(server, holder.ready))
        timer.start()
        with prefilld.PrefillClient(server.target) as client:
            with client.prefill("tiny", tiny.tokens(1200), timeout=30) as prompt:
                assert len(list(prompt)) == 4
        timer.join()


@pytest.mark.slow
def test_a_server_that_hangs_is_noticed(start_server, tiny):
    """Long before the deadline: by pings, which a busy server answers, a stopped one does not."""
    with start_server(models=[("tiny", tiny.directory)]) as server, \
            prefilld.PrefillClient(server.target, transport="grpc",
                                   retry=prefilld.RetryPolicy(attempts=1)) as client:
        with pytest.raises(prefilld.PrefilldError) as failed:
            with client.prefill("tiny", tiny.tokens(3000), retain=False) as prompt:
                next(iter(prompt))
                os.kill(server.process.pid, signal.SIGSTOP)
                try:
                    assert prompt.summary
                finally:
                    os.kill(server.process.pid, signal.SIGCONT)
        assert failed.value.code is grpc.StatusCode.UNAVAILABLE


def test_health_models_and_negotiation(client, server, tiny):
    assert client.health() == prefilld.Health(live=True, ready=True)
    assert client.model("tiny").layers == 4
    assert client.negotiate("tiny").fingerprint == client.model("tiny").fingerprint


def test_the_example_router_learns_which_methods_are_served(server, monkeypatch):
    monkeypatch.syspath_prepend(harness.ROOT / "client/python/examples")
    router = importlib.import_module("router")

    async def methods():
        prefilld = router.Prefilld(server.target, "tiny")
        watching = asyncio.create_task(prefilld.watch())
        while not prefilld.ready:
            await asyncio.sleep(.01)
        watching.cancel()
        await prefilld.channel.close()
        return prefilld.methods

    async def bounded():
        return await asyncio.wait_for(methods(), 20)

    assert asyncio.run(bounded()) == {"dense", "flexprefill", "joint"}


# --- transports


def same_layers(some, others):
    assert [layer.index for layer in some] == [layer.index for layer in others]
    for a, b in zip(some, others):
        assert a.k.dtype == b.k.dtype
        np.testing.assert_array_equal(a.k.view(np.uint8), b.k.view(np.uint8))
        np.testing.assert_array_equal(a.v.view(np.uint8), b.v.view(np.uint8))


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
def test_the_same_layers_by_both_transports(client, by_transport, tiny, tokens):
    with client.prefill("tiny", tiny.tokens(tokens)) as prompt:
        followed = list(prompt)  # while it is computed
        assert prompt.transport == "posix_shm"
        pulls = [by_transport[name].pull(prompt.lease, "tiny") for name in ("grpc", "posix_shm")]
        sent, mapped = map(list, pulls)
        assert [pull.transport for pull in pulls] == ["grpc", "posix_shm"]
    same_layers(sent, mapped)
    same_layers(sent, followed)


def test_bfloat16_by_both_transports(by_transport):
    sent, shm = by_transport.values()
    with shm.prefill("bf16", list(range(90)), widen=False) as prompt:
        mapped = list(prompt)
        assert mapped[0].k.dtype == np.uint16
        same_layers(mapped, list(sent.pull(prompt.lease, "bf16", widen=False)))
        same_layers(list(shm.pull(prompt.lease, "bf16")), list(sent.pull(prompt.lease, "bf16")))


def test_views_stay_as_they_are(client, by_transport, tiny):
    """After the release, and whatever the memory of the cache is used for next."""
    with client.prefill("tiny", tiny.tokens(1000)) as prompt:
        mapped = list(prompt)
        sent = list(by_transport["grpc"].pull(prompt.lease, "tiny"))
    for seed in range(5):
        with client.prefill("tiny", tiny.tokens(1000, seed=seed + 100)) as prompt:
            list(prompt)
    same_layers(mapped, sent)


def test_who_has_a_view_has_the_memory_in_use(by_transport, server, tiny):
    shm = by_transport["posix_shm"]
    lease = shm.prefill("tiny", tiny.tokens(1000)).detach()
    layers = list(shm.pull(lease, "tiny"))
    shm.release(lease)
    kept = layers[3].v[1, 2:]
    copy = kept.copy()
    del layers
    gc.collect()
    assert mapping.segments(server) == 1
    np.testing.assert_array_equal(kept, copy)
    del kept
    eventually(lambda: mapping.segments(server) == 0)


def test_attend_by_both_transports(by_transport):
    q, k, v = inputs.make("sink", 700)
    sent, mapped = [
        client.attend(q, k, v, method="joint", gamma=.8, return_lse=True, return_block_index=True)
        for client in by_transport.values()]
    assert (sent.transport, mapped.transport) == ("grpc", "posix_shm")
    for name in ("o", "lse", "block_count", "block_index", "pattern", "captured_mass"):
        a, b = getattr(sent, name), getattr(mapped, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert mapped.report.mean_density == sent.report.mean_density


def test_attend_over_posix_shm_in_half_precision_and_in_sequences(by_transport):
    q, k, v = (inputs.to_bf16_bits(x) for x in inputs.make("random", 300))
    sent, mapped = [client.attend(q, k, v, dtype="bf16", method="dense", cu_seqlens_q=[0, 100, 300],
                                  cu_seqlens_k=[0, 100, 300]).o
                    for client in by_transport.values()]
    np.testing.assert_array_equal(sent, mapped)


def test_a_pinned_transport_never_falls_back(by_transport, tiny):
    shm = by_transport["posix_shm"]
    with pytest.raises(prefilld.PrefilldError) as refused:
        with shm.prefill("tiny", [1, 2, 3], kv_dtype="f16") as prompt:
            list(prompt)
    assert refused.value.code == FAILED_PRECONDITION
    with pytest.raises(prefilld.PrefilldError) as refused:
        shm.prefill("tiny", [1, 2, 3], retain=False)
    assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.violations[0][0] == "destination.retain"
    with by_transport["grpc"].prefill("tiny", tiny.tokens(200)) as prompt:
        assert prompt.transport == "grpc"
        with pytest.raises(prefilld.PrefilldError) as refused:
            list(shm.pull(prompt.lease, "tiny"))
    assert refused.value.code == FAILED_PRECONDITION


def test_what_cannot_be_mapped_comes_by_grpc(client, by_transport, tiny):
    with client.prefill("tiny", tiny.tokens(200), retain=False) as prompt:
        assert prompt.transport == "grpc" and len(list(prompt)) == 4
    with client.prefill("tiny", tiny.tokens(200), kv_dtype="f16") as prompt:
        assert prompt.transport == "grpc" and len(list(prompt)) == 4
    with by_transport["grpc"].prefill("tiny", tiny.tokens(200)) as prompt:
        pull = client.pull(prompt.lease, "tiny")
        same_layers(list(pull), list(prompt))
        assert pull.transport == "grpc"


def test_segments_that_cannot_be_opened_cost_a_fall_back(client, by_transport, tiny, monkeypatch):
    """As with a user who may not, which root cannot play."""
    def refuse(path, name, writable):
        raise prefilld.PrefilldError(FAILED_PRECONDITION, f"{name} cannot be mapped here",
                                     reason="REASON_SEGMENT")

    monkeypatch.setattr(prefilld.shm, "_map", refuse)
    q, k, v = inputs.make("random", 200)
    expected = by_transport["grpc"].attend(q, k, v)
    for number in range(10):
        with client.prefill("tiny", tiny.tokens(200)) as prompt:
            assert len(list(prompt)) == 4 and prompt.transport == "grpc"
        result = client.attend(q, k, v, request_id=f"same-{number}")
        assert (result.transport, result.request_id) == ("grpc", f"same-{number}")
        np.testing.assert_array_equal(result.o, expected.o)
    for call in (lambda: by_transport["posix_shm"].attend(q, k, v),
                 lambda: list(by_transport["posix_shm"].prefill("tiny", [1, 2], lease_ttl=1))):
        with pytest.raises(prefilld.PrefilldError, match="cannot be mapped here"):
            call()


def test_a_server_without_posix_shm(start_server, tiny):
    with start_server("--transports=grpc", models=[("tiny", tiny.directory)]) as server:
        with prefilld.PrefillClient(server.target) as client:
            with client.prefill("tiny", tiny.tokens(200)) as prompt:
                assert prompt.transport == "grpc" and len(list(prompt)) == 4
            assert client.attend(*inputs.make("random", 100)).transport == "grpc"
        with prefilld.PrefillClient(server.target, transport="posix_shm") as client:
            for call in (lambda: client.prefill("tiny", [1, 2]),
                         lambda: client.attend(*inputs.make("random", 10)),
                         lambda: client.pull(prompt.lease, "tiny")):
                with pytest.raises(prefilld.PrefilldError, match="offer") as refused:
                    call()
                assert refused.value.code == FAILED_PRECONDITION


def pull_for_ever(target, token_ids, progress):
    """A decode engine's process. Sends a byte with every layer."""
    with prefilld.PrefillClient(target, transport="posix_shm") as client:
        while True:
            with client.prefill("tiny", token_ids, method="dense", lease_ttl=1) as prompt:
                for layer in prompt:
                    progress.send_bytes(b"x")
                    layer.k.sum()


MANY = [pytest.param(5, 2, id="few"), pytest.param(100, 10, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("client_kills, server_kills", MANY)
def test_nothing_of_shared_memory_is_left(start_server, tiny, client_kills, server_kills):
    """Clients that are killed while they pull cost nothing once their lease is over; what was
    mapped of a server that is killed stays readable."""
    models = [("tiny", tiny.directory)]
    token_ids, rng = tiny.tokens(2000), random.Random(7)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])

    for _ in range(server_kills):
        server = start_server(models=models)  # not in a `with`: it will not end well
        try:
            with prefilld.PrefillClient(server.target, transport="posix_shm") as client:
                prompt = client.prefill("tiny", token_ids)
                layers = list(prompt)
                copies = [dataclasses.replace(x, k=x.k.copy(), v=x.v.copy()) for x in layers]
                client.prefill("tiny", token_ids)  # dies in the middle
                time.sleep(rng.uniform(0, .05))
                server.process.kill()
        finally:
            server.process.kill()
            server.wait()
            server.channel.close()
        same_layers(layers, copies)

    with start_server("--kv_memory=256MiB", models=models) as server:
        for _ in range(client_kills):
            ours, theirs = processes.Pipe(duplex=False)
            process = processes.Process(
                target=pull_for_ever, args=(server.target, token_ids, theirs))
            process.start()
            theirs.close()
            for _ in range(rng.randrange(1, 8)):
                assert ours.poll(60), "no layer came"
                ours.recv_bytes()
            time.sleep(rng.uniform(0, .01))
            process.kill()
            process.join()
            ours.close()
        eventually(lambda: mapping.segments(server) == 0, timeout=30,
                   message="no segment after the leases")
        eventually(lambda: server.metric("prefilld_kv_blocks", state="free")
                   == server.metric("prefilld_kv_blocks"))
        with prefilld.PrefillClient(server.target, transport="posix_shm") as client:
            with client.prefill("tiny", token_ids) as prompt:
                assert len(list(prompt)) == 4
