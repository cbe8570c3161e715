"""Who may do what: leases that cannot be guessed, the access policy, and tokens that change. What
is refused has the right status, serves nothing, is counted, and has one line in the log."""

import contextlib
import json
import os
import re
import socket

import grpc
import pytest

from e2e import attending, harness, prefilling
from e2e.harness import refused
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import (kv_handoff_service_pb2_grpc, model_service_pb2_grpc,
                         prefill_service_pb2_grpc)
from prefilld.v1 import model_service_pb2 as models
from prefilld.v1 import prefill_service_pb2 as pb

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED
NOT_FOUND = grpc.StatusCode.NOT_FOUND
TOKENS = {name: f"{name}-token-0123456789" for name in
          ("router", "decoder", "other", "monitor", "proxy")}
IDENTITIES = {
    "router": {"tenant": "chat", "models": ["tiny"],
               "methods": ["discover", "prefill", "pull", "report", "attend"]},
    "decoder": {"tenant": "decoders", "models": ["*"], "methods": ["discover", "pull"],
                "pulls_of": ["router"]},
    "other": {"tenant": "other", "models": ["*"], "methods": ["*"], "share": 2},
    "monitor": {"tenant": "monitor", "models": [], "methods": ["GetSparsityReport"],
                "reports": "all"},
    "proxy": {"proxy": True, "models": ["*"], "methods": ["*"]},
}


def write_policy(directory, identities=None, **fields):
    """A policy of IDENTITIES, each with the token of its name; its path."""
    whole = {}
    for name, identity in (identities or IDENTITIES).items():
        token = directory / f"{name}.token"
        if name in TOKENS and not token.exists():
            token.write_text(TOKENS[name] + "\n")
        whole[name] = {"token_files": [str(token)]} | identity
    path = directory / "policy.json"
    path.write_text(json.dumps({"identities": whole} | fields))
    return path


def shows(name, tenant=None, token=None):
    """The metadata of a call by this identity."""
    named = [("prefilld-tenant", tenant)] if tenant else []
    return [("authorization", f"Bearer {token or TOKENS[name]}"), *named]


class As:
    """A server as one of its callers sees it."""

    def __init__(self, server, name, tenant=None, token=None):
        channel = grpc.intercept_channel(server.channel, Metadata(shows(name, tenant, token)))
        self.prefill = prefill_service_pb2_grpc.PrefillServiceStub(channel)
        self.handoff = kv_handoff_service_pb2_grpc.KvHandoffServiceStub(channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)


class Metadata(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor,
               grpc.StreamStreamClientInterceptor):
    """Adds metadata to every call."""

    def __init__(self, metadata):
        self._metadata = metadata

    def _intercept(self, go_on, details, request):
        class Details(grpc.ClientCallDetails):
            pass
        changed = Details()
        for field in ("method", "timeout", "credentials", "wait_for_ready", "compression"):
            setattr(changed, field, getattr(details, field))
        changed.metadata = [*(details.metadata or ()), *self._metadata]
        return go_on(changed, request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _intercept


@pytest.fixture(scope="module")
def shared_guarded(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("access")
    with harness.Server(f"--access_policy={write_policy(directory)}", "--kv_memory=16MiB",
                        log_path=directory / "log.jsonl",
                        models=[("tiny", tiny.directory), ("second", tiny.directory)]) as server:
        yield server


@pytest.fixture
def guarded(shared_guarded):
    server = shared_guarded
    yield server
    harness.eventually(lambda: server.metric("prefilld_leases_active") == 0)


def audit(server):
    """The lines of refusals so far."""
    return [line for line in server.log() if line["event"] == "access_refused"]


@contextlib.contextmanager
def one_line(server, reason, what=None):
    """One more refusal for this reason, in the metric and in the log, and no other."""
    lines, metrics = len(audit(server)), server.metrics()
    yield
    harness.eventually(lambda: len(audit(server)) > lines, message="a line of the refusal")
    after = server.metrics()
    assert harness.moved(metrics, after, "prefilld_access_refused_total") == 1
    assert harness.moved(metrics, after, "prefilld_access_refused_total", reason=reason) == 1
    more = audit(server)[lines:]
    assert [line["reason"] for line in more] == [reason], more
    assert what is None or more[0]["what"] == what
    text = server.log_path.read_text()
    assert not [name for name, token in TOKENS.items() if token in text], "a token in the log"


# --- leases, without a policy ---------------------------------------------------------------------


def test_a_request_id_is_no_lease_and_nothing_tells_one(server, tiny):
    with prefilling.prefilled(server, tiny.tokens(100), request_id="victim") as victim:
        lease = victim.admission.lease
        whole = prefilling.pull(server, lease)
        listed = json.loads(server.get("/debug/sparsity")[1])["requests"][0]["request_id"]
        assert listed == "victim"
        for generation in (0, lease.generation):
            with refused(NOT_FOUND) as failure:
                list(server.handoff.PullKv(kv.PullKvRequest(lease=listed, generation=generation)))
            assert "victim" not in failure[0].message
            assert str(lease.generation) not in failure[0].message
        with refused(NOT_FOUND):
            server.handoff.ReleaseLease(kv.ReleaseLeaseRequest(
                lease=listed, generation=lease.generation, reason=2))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "request_id"):  # it hands out no lease
            prefilling.start(server, tiny.tokens(99), request_id="victim")
        with refused(grpc.StatusCode.FAILED_PRECONDITION) as failure:
            list(prefilling.open_pull(server, lease, generation=lease.generation + 1))
        assert lease.name not in failure[0].message
        assert not re.search(rf"\b{lease.generation}\b", failure[0].message)
        assert prefilling.pull(server, lease) == whole
    for told in (server.log_path.read_text(), server.get("/metrics")[1],
                 server.get("/debug/sparsity")[1]):
        assert lease.name not in told
    assert len(lease.name) == 32 and set(lease.name) <= set("0123456789abcdef")


def test_the_same_request_attaches_and_has_the_same_lease(server, tiny):
    with prefilling.prefilled(server, tiny.tokens(60), request_id="twice") as first:
        again = prefilling.start(server, tiny.tokens(60), request_id="twice").finish()
        assert again.admission.lease == first.admission.lease
    with prefilling.prefilled(server, tiny.tokens(60), request_id="twice") as anew:
        assert anew.admission.lease.name != first.admission.lease.name


# --- who calls ------------------------------------------------------------------------------------


def every_method():
    for module in (pb, kv, models):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield service.full_name, method.name


@pytest.mark.parametrize("service,method", every_method())
@pytest.mark.parametrize("metadata,reason", [
    ((), "no_credentials"),
    ((("authorization", "Bearer no-such-token-0123"),), "token"),
    ((("authorization", f"Basic {TOKENS['other']}"),), "token"),
    (tuple(shows("other") * 2), "token"),
    ((("authorization", "Bearer " + "x" * 5000),), "token"),
])
def test_no_call_goes_without_credentials(guarded, service, method, metadata, reason):
    call = guarded.channel.stream_stream(f"/{service}/{method}", request_serializer=bytes,
                                         response_deserializer=bytes)
    with one_line(guarded, reason, method), refused(UNAUTHENTICATED):
        list(call(iter([b""]), metadata=metadata, timeout=10))


def test_health_needs_no_credentials(guarded):
    check = guarded.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"") == b"\x08\x01"
    assert guarded.get("/healthz")[0] == guarded.get("/readyz")[0] == 200
    assert guarded.get("/metrics")[0] == 200


def test_who_may_not_call_a_method_is_told_so(guarded):
    with one_line(guarded, "method", "Prefill"), refused(DENIED) as failure:
        prefilling.start(As(guarded, "decoder"), [1, 2, 3])
    assert "decoder" in failure[0].message and "Prefill" in failure[0].message
    with one_line(guarded, "method", "ListModels"), refused(DENIED):
        As(guarded, "monitor").models.ListModels(models.ListModelsRequest())
    with one_line(guarded, "method", "Attend"), refused(DENIED):
        attending.attend(As(guarded, "decoder").prefill, *attending.small(tokens=20))
    attending.attend(As(guarded, "router").prefill, *attending.small(tokens=20))


def test_models_that_are_not_its_are_neither_served_nor_listed(guarded):
    router = As(guarded, "router")
    for name in ("second", "third"):  # whether there is one is nobody's business
        with one_line(guarded, "model", "Prefill"), refused(DENIED):
            prefilling.start(router, [1, 2, 3], model=name)
        with one_line(guarded, "model", "GetModel"), refused(DENIED):
            router.models.GetModel(models.GetModelRequest(name=name))
        with one_line(guarded, "model", "Negotiate"), refused(DENIED):
            router.handoff.Negotiate(kv.NegotiateRequest(model=name))
    assert [m.name for m in router.models.ListModels(models.ListModelsRequest()).models] == ["tiny"]
    with refused(NOT_FOUND) as failure:
        As(guarded, "other").models.GetModel(models.GetModelRequest(name="third"))
    assert "second" in failure[0].message


def test_the_router_prefills_and_the_decoder_pulls(guarded, tiny):
    router, decoder = As(guarded, "router"), As(guarded, "decoder")
    with prefilling.prefilled(router, tiny.tokens(200)) as done:
        lease = done.admission.lease
        assert prefilling.pull(decoder, lease) == prefilling.pull(router, lease)
        decoder.handoff.RenewLease(kv.RenewLeaseRequest(lease=lease.name,
                                                        generation=lease.generation))
    again = prefilling.start(router, tiny.tokens(50)).finish()
    prefilling.release(decoder, again.ready)


def test_anothers_lease_is_none(guarded, tiny):
    """Though its name is known: the same answer as for a name that is nobody's."""
    other = As(guarded, "other")
    with prefilling.prefilled(As(guarded, "router"), tiny.tokens(200)) as done:
        lease = done.admission.lease
        for generation in (lease.generation, 0):
            fields = {"lease": lease.name, "generation": generation}
            for what, call in (
                    ("PullKv", lambda f=fields: list(other.handoff.PullKv(kv.PullKvRequest(**f)))),
                    ("RenewLease", lambda f=fields: other.handoff.RenewLease(
                        kv.RenewLeaseRequest(**f))),
                    ("ReleaseLease", lambda f=fields: other.handoff.ReleaseLease(
                        kv.ReleaseLeaseRequest(reason=2, **f)))):
                with one_line(guarded, "lease", what), refused(NOT_FOUND) as failure:
                    call()
                assert failure[0].message == "no such lease"
        assert prefilling.pull(As(guarded, "router"), lease)
    with prefilling.prefilled(other, tiny.tokens(100)) as done, \
            one_line(guarded, "lease", "PullKv"), refused(NOT_FOUND):
        list(prefilling.open_pull(As(guarded, "decoder"), done.ready))


def test_a_request_id_is_each_callers_own(guarded, tiny):
    router, other = As(guarded, "router"), As(guarded, "other")
    with prefilling.prefilled(router, tiny.tokens(70), request_id="same") as first, \
            prefilling.prefilled(other, tiny.tokens(70), request_id="same") as second:
        assert first.admission.lease.name != second.admission.lease.name
    with prefilling.prefilled(router, tiny.tokens(70), request_id="same"), \
            prefilling.prefilled(other, tiny.tokens(33), request_id="same"):
        pass  # nor do they see that the other's lives


def test_reports_are_its_own_tenants(guarded, tiny):
    with prefilling.prefilled(As(guarded, "router"), tiny.tokens(80), request_id="mine"):
        pass
    asked = pb.GetSparsityReportRequest(request_id="mine")
    assert As(guarded, "router").prefill.GetSparsityReport(asked).layers == 4
    assert As(guarded, "monitor").prefill.GetSparsityReport(asked).layers == 4
    with one_line(guarded, "report", "GetSparsityReport"), refused(NOT_FOUND):
        As(guarded, "other").prefill.GetSparsityReport(asked)

    def page(*names):
        return guarded.get("/debug/sparsity", dict(sum(map(shows, names), [])))

    assert page()[0] == 401
    assert page("decoder")[0] == 403
    ids = {name: [r["request_id"] for r in json.loads(page(name)[1])["requests"]]
           for name in ("router", "other", "monitor")}
    assert "mine" in ids["router"] and "mine" in ids["monitor"] and "mine" not in ids["other"]


def test_a_proxy_names_its_tenant(guarded, tiny):
    with prefilling.prefilled(As(guarded, "proxy", "acme"), tiny.tokens(40),
                              request_id="of-acme") as done:
        assert prefilling.pull(As(guarded, "proxy", "acme"), done.ready)
        with one_line(guarded, "lease"), refused(NOT_FOUND):
            prefilling.pull(As(guarded, "proxy", "umbrella"), done.ready)
    with one_line(guarded, "report"), refused(NOT_FOUND):
        As(guarded, "proxy", "umbrella").prefill.GetSparsityReport(
            pb.GetSparsityReportRequest(request_id="of-acme"))
    for name, tenant in (("proxy", None), ("proxy", "a b"), ("proxy", "x" * 65),
                         ("router", "other")):
        with one_line(guarded, "tenant"), refused(DENIED):
            As(guarded, name, tenant).models.ListModels(models.ListModelsRequest())
    As(guarded, "router", "chat").models.ListModels(models.ListModelsRequest())  # its own


# --- what changes while the server runs -----------------------------------------------------------


def kubernetes_secret(directory):
    """(link to the token, put): a secret as a kubelet mounts it; put(text) swaps the directory."""
    count = 0

    def put(text):
        nonlocal count
        count += 1
        data = directory / f"..{count}"
        data.mkdir()
        (data / "token").write_text(text)
        os.symlink(data.name, directory / "..next")
        os.replace(directory / "..next", directory / "..data")

    put(TOKENS["other"])
    os.symlink("..data/token", directory / "token")
    return directory / "token", put


def test_a_token_changes_without_a_restart(start_server, tmp_path):
    (tmp_path / "secret").mkdir()
    link, put = kubernetes_secret(tmp_path / "secret")
    identity = IDENTITIES["other"] | {"token_files": [str(link)]}
    with start_server(f"--access_policy={write_policy(tmp_path, {'other': identity})}") as server:
        def served(token):
            try:
                As(server, "other", token=token).models.ListModels(models.ListModelsRequest())
                return True
            except grpc.RpcError as error:
                assert error.code() == UNAUTHENTICATED
                return False

        old, new = TOKENS["other"], "another-token-0123456789"
        assert served(old) and not served(new)
        put(new)
        harness.eventually(lambda: served(new))
        assert not served(old)
        assert server.metric("prefilld_credentials_stale", kind="tokens") == 0

        put("short")
        harness.eventually(lambda: server.metric("prefilld_credentials_stale", kind="tokens") == 1)
        assert served(new), "what was there before stays"
        put(old)
        harness.eventually(lambda: served(old))
        harness.eventually(lambda: server.metric("prefilld_credentials_stale", kind="tokens") == 0)
        text = server.log_path.read_text()
        assert "token_not_read" in text and new not in text and old not in text


def test_the_log_is_not_flooded_and_forgets_nobody(start_server, tmp_path):
    with start_server(f"--access_policy={write_policy(tmp_path)}") as server:
        call = server.models.ListModels.future
        calls = [call(models.ListModelsRequest()) for _ in range(1000)]
        assert {c.exception().code() for c in calls} == {UNAUTHENTICATED}
        assert server.metric("prefilld_access_refused_total", reason="no_credentials") == 1000

        def told():
            rest = [line["count"] for line in server.log()
                    if line["event"] == "access_refusals_unlogged"]
            return len(audit(server)), len(audit(server)) + sum(rest)

        harness.eventually(lambda: told()[1] == 1000, message="all are told of")
        assert told()[0] < 1000


def test_a_policy_that_is_wrong_ends_the_start(start_server, tmp_path):
    for change, words in (
            ({"modles": []}, ["identities.other", "unknown key 'modles'"]),
            ({"methods": ["Prefil"]}, ["identities.other.methods", "'Prefil'"]),
            ({"token_files": ["/no/such/file"]}, ["/no/such/file"]),
            ({"certificates": ["CN:other"]}, ["--tls_client_ca"]),
            ({"pulls_of": ["nobody"]}, ["identities.other.pulls_of", "'nobody'"])):
        path = write_policy(tmp_path, {"other": IDENTITIES["other"] | change})
        with pytest.raises(RuntimeError) as failed:
            start_server(f"--access_policy={path}")
        assert all(word in str(failed.value) for word in ["--access_policy: ", *words])


DOCUMENT = (harness.ROOT / "docs/access.md").read_text()


def test_every_key_and_reason_is_in_the_document(start_server, tmp_path, server):
    path = write_policy(tmp_path, {"other": IDENTITIES["other"] | {"x": 1}})
    with pytest.raises(RuntimeError) as failed:
        start_server(f"--access_policy={path}")
    keys = re.search(r"there is ([\w, ]+)", str(failed.value))[1].split(", ")
    assert len(keys) == 9 and [key for key in keys if f"| `{key}` |" not in DOCUMENT] == []
    reasons = {dict(labels)["reason"] for name, labels in server.metrics()
               if name == "prefilld_access_refused_total"}
    assert {reason for reason in reasons if f"`{reason}`" not in DOCUMENT} == set()


def template(directory):
    """The document's policy, with tokens that are there."""
    text = re.search(r"```json\n(.*?)```", DOCUMENT, re.S)[1]
    for name in set(re.findall(r"/run/secrets/prefilld/(\w+)", text)):
        (directory / name).write_text(f"{name}-0123456789abcdef")
    path = directory / "policy.json"
    path.write_text(text.replace("/run/secrets/prefilld", str(directory)))
    return path


def own_address():
    """Of this host, and no loopback one; or None."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        address = probe.getsockname()[0]
        return None if address.startswith("127.") else address
    return None


@pytest.mark.skipif(own_address() is None, reason="there is but loopback")
def test_a_token_in_the_clear_is_none(start_server, tiny, tmp_path):
    """Where others may have read it on its way."""
    flags = [f"--access_policy={write_policy(tmp_path)}", "--insecure_listen",
             f"--listen={own_address()}:0"]
    with start_server(*flags, models=[("tiny", tiny.directory)]) as server:
        with refused(UNAUTHENTICATED):
            As(server, "router").models.ListModels(models.ListModelsRequest(), timeout=10)
        assert server.metric("prefilld_access_refused_total", reason="clear") == 1
