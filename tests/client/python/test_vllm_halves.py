"""The connector's halves where there is no vLLM: its modules are stand-ins, prefilld is a fake."""

import dataclasses
import importlib
import sys
import threading
import time
import types
from unittest import mock

import grpc
import pytest

from fake_server import MODEL, Abort, Silence, retry_info
from prefilld import Lease
from prefilld.vllm.settings import Plan, Settings

ABSENT = ("torch", "vllm", "vllm.config", "vllm.logger", "vllm._custom_ops", "vllm.distributed",
          "vllm.distributed.kv_transfer", "vllm.distributed.kv_transfer.kv_connector",
          "vllm.distributed.kv_transfer.kv_connector.v1",
          "vllm.distributed.kv_transfer.kv_connector.v1.base",
          "vllm.distributed.kv_transfer.kv_connector.v1.metrics", "vllm.model_executor",
          "vllm.model_executor.models", "vllm.model_executor.models.utils", "vllm.v1",
          "vllm.v1.metrics", "vllm.v1.metrics.loggers")
BLOCK = 16


@pytest.fixture
def halves(monkeypatch):
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    base = sys.modules["vllm.distributed.kv_transfer.kv_connector.v1.base"]
    base.KVConnectorMetadata = type("KVConnectorMetadata", (), {})
    metrics = sys.modules["vllm.distributed.kv_transfer.kv_connector.v1.metrics"]
    metrics.KVConnectorStats = dataclasses.make_dataclass(
        "KVConnectorStats", [("data", dict, dataclasses.field(default_factory=dict))])
    metrics.KVConnectorPromMetrics = type("Metrics", (), {})
    ours = [name for name in sys.modules if name.startswith("prefilld.vllm.")
            and name != "prefilld.vllm.settings"]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    yield types.SimpleNamespace(
        scheduler=importlib.import_module("prefilld.vllm.scheduler"),
        worker=importlib.import_module("prefilld.vllm.worker"))
    for name in [name for name in sys.modules if name.startswith("prefilld.vllm.")
                 and name != "prefilld.vllm.settings"]:
        del sys.modules[name]


# --- the prefix cache


@pytest.fixture
def salted(halves):
    """(params, prompt, **settings) -> the salt that its blocks are hashed under."""
    def salt(params, prompt=tuple(range(40)), own=None, **settings):
        half = halves.scheduler.SchedulerHalf(
            Settings(allowed_targets=("h",), min_tokens=16, **settings), None, BLOCK)
        request = types.SimpleNamespace(
            request_id="r", prompt_token_ids=list(prompt), num_prompt_tokens=len(prompt),
            num_tokens=len(prompt), num_preemptions=0, lora_request=None, sampling_params=object(),
            kv_transfer_params={"target": "h:1", **params}, cache_salt=own, block_hashes=["old"])
        request.update_block_hashes = lambda: request.block_hashes.append("new")
        half.on_new_request(request)
        assert request.block_hashes == (["old"] if request.cache_salt == own else ["new"])
        return request.cache_salt
    return salt


def test_dense_blocks_are_vllms_own(salted):
    assert salted({"method": "dense"}) is None
    assert salted({"method": "dense"}, own="mine") == "mine"


def test_sparse_blocks_serve_no_other_policy_and_no_other_prompt(salted):
    joint = {"method": "joint", "gamma": 0.9}
    salts = [salted(joint), salted({"method": "joint", "gamma": 0.95}), salted({}),
             salted(joint, prompt=range(41)), salted(joint, prompt=range(39)),
             salted(joint, own="mine")]
    assert len(set(salts)) == len(salts) and None not in salts
    assert salted(joint) == salts[0], "the same prompt again"
    assert salts[-1].startswith("mine/")
    assert salted(joint, prompt=[1, 23] * 9) != salted(joint, prompt=[12, 3] * 9)


def test_sparse_prefixes_are_shared_where_that_was_asked_for(salted):
    joint = {"method": "joint", "gamma": 0.9}
    assert salted(joint, share_sparse_prefixes=True) == \
        salted(joint, prompt=range(99), share_sparse_prefixes=True)
    assert salted(joint, share_sparse_prefixes=True) != salted({}, share_sparse_prefixes=True)


# --- aborts


@pytest.fixture
def worker(halves, server):
    made = []

    def make(**settings):
        config = types.SimpleNamespace(
            cache_config=types.SimpleNamespace(block_size=BLOCK),
            compilation_config=types.SimpleNamespace(static_forward_context={}))
        check = mock.MagicMock(dtype="f32")
        made.append(halves.worker.WorkerHalf(Settings(**settings), check, config))
        return made[-1]

    yield make
    for each in made:
        each.close()


def order(halves, server, request_id="r", lease=None):
    return halves.scheduler.LoadOrder(
        request_id=request_id, plan=Plan(target=server.target, model=MODEL, lease=lease),
        prompt=list(range(9)), begin=0, end=8, block_ids=[7])


def take(half, halves, **orders):
    half.take(halves.scheduler.Orders(**orders))


def ended(half, request_id, seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if request_id in half.finished(idle=False):
            return True
        time.sleep(0.005)
    return False


def eventually(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


class Busy:
    """Holds up every load that has begun."""

    def __init__(self, monkeypatch, half):
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()
        original = half._client

        def wait(target):
            self.begun.release()
            assert self.go_on.wait(10)
            return original(target)

        monkeypatch.setattr(half, "_client", wait)


@pytest.mark.parametrize("handed_over", [False, True])
def test_an_abort_before_its_turn_ends_at_once_and_prefills_nothing(
        halves, server, worker, monkeypatch, handed_over):
    half = worker(max_loads=1)
    lease = Lease("x/9", 7, "boot", 3, 9, 60.0) if handed_over else None
    busy = Busy(monkeypatch, half)
    take(half, halves, loads=[order(halves, server, "first"),
                              order(halves, server, "second", lease)])
    assert busy.begun.acquire(timeout=5)
    take(half, halves, cancel=["second"])
    assert ended(half, "second", 1), "though the first one still runs"
    assert half.failed_blocks() == {7}
    busy.go_on.set()
    assert ended(half, "first")
    assert len(server.calls["Prefill"]) == 1 and not server.calls["PullKv"][1:]
    if handed_over:
        eventually(lambda: "x/9" in [call.lease for call in server.calls["ReleaseLease"]])


def test_an_abort_as_it_begins_prefills_nothing(halves, server, worker, monkeypatch):
    half = worker()
    busy = Busy(monkeypatch, half)
    take(half, halves, loads=[order(halves, server)])
    assert busy.begun.acquire(timeout=5)
    take(half, halves, cancel=["r"])
    busy.go_on.set()
    assert ended(half, "r")
    assert not server.calls["Prefill"]


def test_an_abort_interrupts_the_retries(halves, server, worker):
    half = worker()
    server.faults["Prefill"] = [Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_info(3600))] * 9
    half._settings = Settings(timeout_s=86400)
    take(half, halves, loads=[order(halves, server)])
    eventually(lambda: server.calls["Prefill"])
    take(half, halves, cancel=["r"])
    assert ended(half, "r", 2)
    assert len(server.calls["Prefill"]) == 1


def test_an_abort_interrupts_the_wait_for_the_admission(halves, server, worker):
    silence = Silence()
    server.faults["Prefill"] = [silence]
    half = worker()
    take(half, halves, loads=[order(halves, server)])
    eventually(lambda: server.calls["Prefill"])
    take(half, halves, cancel=["r"])
    assert ended(half, "r", 2)
    assert silence.over.wait(5), "the server has heard of it"
