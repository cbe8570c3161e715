"""The Python package against a real server: the promises of its public interface."""

import dataclasses
import threading

import grpc
import numpy as np
import pytest

import prefilld
from e2e import prefilling
from spec import inputs, llama
from spec import sparse_attention as spec


@pytest.fixture
def client(server):
    with prefilld.PrefillClient(server.target) as client:
        yield client


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


def test_health_models_and_negotiation(client, server, tiny):
    assert client.health() == prefilld.Health(live=True, ready=True)
    assert client.model("tiny").layers == 4
    assert client.negotiate("tiny").fingerprint == client.model("tiny").fingerprint
