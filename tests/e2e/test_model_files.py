"""A model's files are changed under the server that computes with them."""

import os
import shutil

import grpc
import numpy as np
import pytest

from e2e import checkpoints, harness, prefilling
from e2e.harness import refused
from e2e.test_observability import check_health

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
READY = "prefilld.v1.PrefillService"


@pytest.fixture
def directory(tmp_path, tiny):
    shutil.copytree(tiny.directory, tmp_path / "model")
    return tmp_path / "model"


def overwritten(weights, other):
    """As cp does."""
    with open(weights, "r+b") as file:
        file.write(other.read_bytes())


def truncated(weights, other):
    os.truncate(weights, 4096)


def replaced(weights, other):
    os.rename(other, weights)


def logits(server, tokens):
    done = prefilling.start(server, tokens, model="m", return_logits=True).finish()
    prefilling.release(server, done.ready)
    return done.logits


@pytest.mark.parametrize("change", [overwritten, truncated])
def test_changed_weights_compute_nothing_more(start_server, tiny, directory, tmp_path, change):
    checkpoints.write(tmp_path / "other", seed=1)
    with start_server(models=[("m", directory), ("other", tiny.directory)]) as server:
        assert len(logits(server, [1, 2, 3])) == tiny.config["vocab_size"]
        change(directory / "model.safetensors", tmp_path / "other/model.safetensors")
        for _ in range(2):
            with refused(UNAVAILABLE) as failure:
                logits(server, [1, 2, 3])
            assert failure[0].reason == "MODEL_CHANGED" and failure[0].retry_after > 0
            assert "'m'" in failure[0].message and str(directory) not in failure[0].message
        harness.eventually(lambda: check_health(server, READY) == 2)
        assert check_health(server, "") == 2
        assert server.metric("prefilld_ready") == 0
        for page in ("/healthz", "/readyz"):
            status, why = server.get(page)
            assert status == 503 and "'m'" in why and str(directory) not in why
        with prefilling.prefilled(server, [1, 2, 3], model="other") as done:
            assert done.summary, "the other model is what it was"
        told, = [line for line in server.log() if line["event"] == "model_changed"]
        assert told["model"] == "m" and "model.safetensors" in told["message"]


def test_health_goes_down_before_anybody_asks(start_server, directory):
    with start_server(models=[("m", directory)]) as server:
        os.truncate(directory / "model.safetensors", 4096)
        harness.eventually(lambda: check_health(server, READY) == 2)


def test_replaced_weights_are_those_of_before(start_server, directory, tmp_path):
    checkpoints.write(tmp_path / "other", seed=1)
    with start_server(models=[("m", directory)]) as server:
        before = logits(server, [1, 2, 3])
        replaced(directory / "model.safetensors", tmp_path / "other/model.safetensors")
        np.testing.assert_array_equal(logits(server, [1, 2, 3]), before)
        assert check_health(server, READY) == 1
