"""The settings of the vLLM connector, and what a request may say. vLLM itself is not needed."""

import pytest

from prefilld import Credentials, Lease
from prefilld.vllm.settings import Settings, plan_request

LEASE = {"name": "l", "generation": 3, "boot_id": "b", "layers": 2, "tokens": 40, "ttl": 60.0}
HERE = Settings(targets=("127.0.0.1:1",), min_tokens=16)


@pytest.mark.parametrize(("extra", "message"), [
    ({"targte": "a:1"}, "unknown targte"), ({"target": "nowhere"}, "not HOST:PORT"),
    ({"target": ["a:1", "b:99999"]}, "b:99999"), ({"min_tokens": 0}, "at least 1"),
    ({"min_tokens": True}, "min_tokens"), ({"timeout_s": -1}, "timeout_s"),
    ({"timeout_s": float("nan")}, "timeout_s"), ({"method": "fast"}, "'fast' is not one of"),
    ({"gamma": "high"}, "gamma"), ({"transport": "carrier"}, "carrier"),
    ({"model": ""}, "model"), ({"max_loads": 1.5}, "max_loads"), ({"target": 7}, "not HOST:PORT"),
    ({"target": "a:\u0661"}, "not HOST:PORT"), ({"transport": {}}, "not one of"),
    ({"block_size": 64.5}, "policy: "), ({"model": "\ud800"}, "model"),
    ({"allowed_targets": 7}, "allowed_targets is '7', not a list"),
    ({"allowed_targets": ["10.0.0.1/8"]}, "has host bits set"),
    ({"allowed_targets": ["a b"]}, "'a b' is neither"), ({"allowed_targets": [""]}, "neither"),
    ({"tls_ca": 1}, "tls_ca is '1', not a string"),
    ({"share_sparse_prefixes": "no"}, "neither true nor false")])
def test_a_wrong_setting_is_refused_by_name(extra, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_config(extra)


def test_every_transport_can_be_named():
    for name in ("grpc", "posix_shm", "cuda_ipc", None):
        assert Settings.from_config({"transport": name}).transport == name


def test_settings_are_the_policy_of_prompts_unless_they_say_otherwise():
    s = Settings.from_config({"target": "h:1", "model": "m", "method": "joint", "gamma": 0.95})
    plan = plan_request(None, s)
    assert (plan.target, plan.model, plan.error) == ("h:1", "m", "")
    assert plan.policy == {"method": "joint", "gamma": 0.95} and plan.sparse
    plan = plan_request({"method": "dense", "min_tokens": 9, "model": "n"}, s)
    assert (plan.policy["method"], plan.min_tokens, plan.model) == ("dense", 9, "n")
    assert not plan.sparse
    assert plan_request(None, Settings()) is None  # no target: vLLM's alone


@pytest.mark.parametrize("params", [
    [1], {"method": "fast"}, {"method": []}, {"method": {}}, {"report_level": []}, {"gamma": []},
    {"target": "elsewhere:1"}, {"target": 7}, {"min_tokens": "x"},
    {"lease": 1}, {"lease": {"name": "l"}}, {"lease": {**LEASE, "layers": -1}},
    {"lease": {**LEASE, "generation": True}}, {"lease": {**LEASE, "name": "x" * 200}},
    {"lease": {**LEASE, "ttl": "long"}}, {"lease": LEASE, "tokens": 41},
    {"lease": LEASE, "fingerprint": 5}, {"lease": LEASE, "target": "elsewhere:1"},
    {"block_size": 2**32}, {"min_budget_tokens": 0.5}, {"model": "\ud800"},
    {"lease": {**LEASE, "generation": 2**64}}, {"lease": {**LEASE, "ttl": float("inf")}},
    {"lease": {**LEASE, "ttl": float("nan")}}, {"lease": {**LEASE, "name": "\ud800"}}])
def test_hostile_parameters_are_a_failed_load_with_a_reason(params):
    plan = plan_request(params, HERE)
    assert plan.error.startswith("kv_transfer_params: ") and len(plan.error) < 600


def test_a_lease_is_handed_over():
    plan = plan_request({"lease": LEASE, "tokens": 40, "fingerprint": "f"}, HERE)
    assert plan.lease == Lease(**LEASE)
    assert (plan.target, plan.fingerprint, plan.error) == ("127.0.0.1:1", "f", "")
    assert "target is missing" in plan_request({"lease": LEASE}, Settings()).error


@pytest.mark.parametrize(("allowed", "yes", "no"), [
    ([], ["own:1"], ["own:2", "any:1", "127.0.0.1:1", "169.254.169.254:80"]),
    (["10.1.0.0/16", "fd00::/8"], ["10.1.2.3:9", "[fd00::5]:9", "own:1"],
     ["10.2.0.1:9", "[fe80::1]:9", "10.1.2.3.evil.example:9", "010.1.2.3:9"]),
    ([".prefill.svc"], ["a.prefill.svc:9", "A.B.Prefill.SVC:9"],
     ["prefill.svc:9", ".prefill.svc:9", "a.prefill.svc.evil:9", "aprefill.svc:9"]),
    ([".svc", "0.0.0.0/0"], ["1.2.3.4:5"],
     ["unix-abstract:a.svc:9", "dns:a.svc:9", "xds:a.svc:9", "ipv4:1.2.3.4:5", "u@a.svc:9",
      "[1.2.3.4]x:9", "fe80::1:9"]),
    (["other:7", "host"], ["other:7", "host:1", "host:2"], ["other:8", "host.evil:1"]),
])
def test_a_request_names_no_target_that_is_not_allowed(allowed, yes, no):
    """Else whoever may send a request could have this host connect anywhere."""
    settings = Settings.from_config({"target": "own:1", "allowed_targets": allowed})
    for params in ({}, {"lease": LEASE}):
        for target in yes:
            plan = plan_request({**params, "target": target}, settings)
            assert (plan.target, plan.error) == (target, "")
        for target in no:
            plan = plan_request({**params, "target": target}, settings)
            assert plan.target == "" and repr(target) in plan.error


def test_without_a_target_none_can_be_named():
    plan = plan_request({"lease": LEASE, "target": "any:2"}, Settings.from_config({}))
    assert "'any:2' is not one of those in target and allowed_targets: there are none" in plan.error


def test_credentials_are_the_environments_unless_given(monkeypatch):
    monkeypatch.setenv("PREFILLD_TLS_CA", "/env/ca.pem")
    monkeypatch.setenv("PREFILLD_TOKEN_FILE", "/env/token")
    settings = Settings.from_config({"token_file": "/my/token", "server_name": "s"})
    assert settings.credentials == Credentials(tls_ca="/env/ca.pem", token_file="/my/token",
                                               server_name="s")
