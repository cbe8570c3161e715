"""What a request may say to the vLLM connector (kv_transfer_params) and what the operator sets,
mutated from what is right: every plan can be carried out or has failed with a reason, nothing is
raised but what is documented.

    build/venv/bin/python tests/fuzz/connector_fuzzer.py [--seconds=60] [--runs=N] [--seed=1]

A finding is printed with the input, and ends it with status 1. Needs no vLLM.
"""

import argparse
import copy
import json
import math
import pickle
import random
import sys
import time

from prefilld.sparsity import policy_message
from prefilld.v1 import kv_handoff_service_pb2, model_service_pb2
from prefilld.vllm.settings import Settings, plan_request

LEASE = {"name": "l" * 32, "generation": 3, "boot_id": "b", "layers": 2, "tokens": 40, "ttl": 60.0}
HANDED_OVER = {"target": "127.0.0.1:1", "lease": LEASE, "tokens": 40, "fingerprint": "f" * 64}
POLICY = {"method": "joint", "gamma": 0.9, "tau": 0.1, "min_budget_tokens": 0,
          "max_budget_tokens": 4096, "block_size": 128, "min_captured_mass": 0.5,
          "report_level": "density"}
PARAMS = [None, {}, {"model": "m", "min_tokens": 16, **POLICY}, {"target": "127.0.0.1:1"},
          HANDED_OVER]
SETTINGS = [{}, {"target": "127.0.0.1:1", "model": "m", "timeout_s": 5, "max_loads": 2,
                 "min_tokens": 16, "transport": "grpc", **POLICY},
            {"target": ["127.0.0.1:1", "[::1]:2"]}]
ODD = [None, True, False, 0, -1, 1, 40, 2**31, 2**32, 2**63, 2**64, 2**200, 0.5, -0.0, 1e308,
       math.nan, math.inf, "", "x", "x" * 200, "é" * 100, "\ud800", "\0", "a:1", "a:0", ":1",
       "[::1]:7", "dense", "flexprefill", "grpc", "density", [], ["a:1"], [[]], {}, {"name": "l"},
       LEASE]


def mutated(value, rng):
    """One place of it is another."""
    roll = rng.random()
    if isinstance(value, dict) and value and roll < 0.9:
        key = rng.choice(sorted(value))
        if roll < 0.15:
            del value[key]
        elif roll < 0.25:
            value[rng.choice(["target", "lease", "tokens", "x", "gamma", "min_tokens"])] = odd(rng)
        else:
            value[key] = mutated(value[key], rng)
        return value
    if isinstance(value, list) and value and roll < 0.8:
        at = rng.randrange(len(value))
        value[at] = mutated(value[at], rng)
        return value
    if isinstance(value, str) and roll < 0.4:
        at = rng.randrange(len(value) + 1)
        return value[:at] + chr(rng.choice([0, 58, 47, 0x661, 0xd800, rng.randrange(0x110000)])) \
            + value[at + rng.randrange(2):]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and roll < 0.4:
        return value + rng.choice([-1, 1, 0.5, 2**32])
    return odd(rng)


def odd(rng):
    return copy.deepcopy(rng.choice(ODD))


def several(value, rng):
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        value = mutated(value, rng)
    return value


def check_plan(plan, settings):
    """What the connector's halves do with a plan."""
    if plan.error:
        assert plan.error.startswith("kv_transfer_params: ") and len(plan.error) < 1024, plan.error
        assert plan.lease is None and not plan.target
        return
    host, colon, port = plan.target.rpartition(":")
    assert host and colon and port.isascii() and 0 < int(port) < 65536
    plan.target.encode()
    assert not settings.targets or plan.target in settings.targets, "where the operator allows"
    assert isinstance(plan.min_tokens, int) and plan.min_tokens >= 1
    assert isinstance(plan.sparse, str)
    policy_message(plan.policy)
    model_service_pb2.GetModelRequest(name=plan.model or "")
    if plan.lease is not None:
        kv_handoff_service_pb2.PullKvRequest(
            lease=plan.lease.name, generation=plan.lease.generation, boot_id=plan.lease.boot_id)
        assert 0 <= plan.lease.ttl < math.inf and plan.lease.layers >= 0
    sent = pickle.loads(pickle.dumps(plan))  # the scheduler's half sends it to the worker's
    assert repr(sent) == repr(plan)


def one(rng):
    """(what was tried, the exception or None)."""
    extra = several(rng.choice(SETTINGS), rng) if rng.random() < 0.3 else rng.choice(SETTINGS)
    params = several(rng.choice(PARAMS), rng)
    tried = f"settings {extra!r}, params {params!r}"
    try:
        try:
            settings = Settings.from_config(extra if isinstance(extra, dict) else {})
        except ValueError:
            return tried, None  # as documented
        policy_message(settings.policy)
        plan = plan_request(params, settings)
        if plan is not None:
            check_plan(plan, settings)
        json.dumps(params)  # as it comes
    except Exception as error:
        return tried, error
    return tried, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="0: no limit")
    parser.add_argument("--runs", type=int, default=0, help="at most; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    start, runs = time.monotonic(), 0
    while (not args.runs or runs < args.runs) and \
            (not args.seconds or time.monotonic() - start < args.seconds):
        tried, error = one(rng)
        if error is not None:
            print(f"run {runs} of seed {args.seed}: {tried}\n{error!r}")
            return 1
        runs += 1
    print(f"Done {runs} runs in {time.monotonic() - start:.0f} second(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
