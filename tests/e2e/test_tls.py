"""TLS of both ports: who does not get in, who is who by certificate, and files that change."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl

import grpc
import pytest

from certificates import Authority
from e2e import harness, prefilling
from e2e.harness import refused
from e2e.test_access import TOKENS, audit, one_line, shows, template
from prefilld.v1 import (kv_handoff_service_pb2_grpc, model_service_pb2_grpc,
                         prefill_service_pb2_grpc)
from prefilld.v1.model_service_pb2 import ListModelsRequest

SPIFFE = "spiffe://example.org/ns/llm/sa/router"
IDENTITIES = {
    "router": {"certificates": [f"URI:{SPIFFE}"], "tenant": "chat",
               "methods": ["*"], "models": ["*"]},
    "decoder": {"certificates": ["DNS:decoder.llm.svc"], "tenant": "decoders",
                "methods": ["pull", "discover"], "models": ["*"], "pulls_of": ["router"]},
    "monitor": {"certificates": ["CN:monitor"], "tenant": "monitor", "methods": ["report"],
                "models": [], "reports": "all"},
}


def channel_to(target, authority, client=None):
    """Of a client that trusts `authority`, and has a (certificate, key) or none."""
    cert, key = (path.read_bytes() for path in client) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.pem.read_bytes(), key, cert)
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(target, credentials, options)


class Client:
    """A caller with a certificate, or with none."""

    def __init__(self, server, authority, client=None):
        self.channel = channel_to(server.target, authority, client)
        self.prefill = prefill_service_pb2_grpc.PrefillServiceStub(self.channel)
        self.handoff = kv_handoff_service_pb2_grpc.KvHandoffServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def list_models(self, **how):
        return self.models.ListModels(ListModelsRequest(), timeout=10, **how)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def clients(authority):
    return {"router": authority.sign("router", names=f"URI:{SPIFFE}"),
            "decoder": authority.sign("decoder", names="DNS:decoder.llm.svc"),
            "monitor": authority.sign("monitor", common_name="monitor", names="DNS:m"),
            "nobody": authority.sign("nobody", common_name="nobody", names="DNS:router.llm.svc"),
            "expired": authority.sign("expired", names=f"URI:{SPIFFE}", days=-1)}


def tls_flags(authority, client_ca=True):
    cert, key = authority.sign("server")
    flags = [f"--tls_cert={cert}", f"--tls_key={key}"]
    return flags + ([f"--tls_client_ca={authority.pem}"] if client_ca else [])


def address(target):
    host, port = target.rsplit(":", 1)
    return host, int(port)


@pytest.fixture(scope="module")
def shared_mutual(authority, tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("mutual")
    token = directory / "token"
    token.write_text(TOKENS["other"])
    policy = directory / "policy.json"
    policy.write_text(json.dumps({"identities": IDENTITIES | {
        "other": {"token_files": [str(token)], "tenant": "other", "methods": ["*"],
                  "models": ["*"]}}}))
    with harness.Server(*tls_flags(authority), f"--access_policy={policy}", "--kv_memory=16MiB",
                        log_path=directory / "log.jsonl",
                        models=[("tiny", tiny.directory)]) as server:
        yield server


@pytest.fixture
def mutual(shared_mutual):
    yield shared_mutual
    harness.eventually(lambda: shared_mutual.metric("prefilld_leases_active") == 0)


# --- who is who -----------------------------------------------------------------------------------


def test_certificates_are_identities(mutual, authority, clients, tiny):
    router, decoder = (Client(mutual, authority, clients[name]) for name in ("router", "decoder"))
    with prefilling.prefilled(router, tiny.tokens(100)) as done:
        assert prefilling.pull(decoder, done.ready) == prefilling.pull(router, done.ready)
    with one_line(mutual, "method", "Prefill"), refused(grpc.StatusCode.PERMISSION_DENIED):
        prefilling.start(decoder, tiny.tokens(10))


def test_a_certificate_of_the_authority_that_is_nobodys_may_nothing(mutual, authority, clients):
    with one_line(mutual, "certificate"), refused(grpc.StatusCode.UNAUTHENTICATED):
        Client(mutual, authority, clients["nobody"]).list_models()
    assert audit(mutual)[-1]["certificate"] == "DNS:router.llm.svc"


def test_who_has_no_certificate_needs_a_token(mutual, authority):
    nobody = Client(mutual, authority)
    with one_line(mutual, "no_credentials"), refused(grpc.StatusCode.UNAUTHENTICATED):
        nobody.list_models()
    nobody.list_models(metadata=shows("other"))
    check = nobody.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"") == b"\x08\x01"


def test_pages_have_the_same_policy(mutual, clients):
    assert mutual.get("/metrics")[0] == mutual.get("/healthz")[0] == mutual.get("/readyz")[0] == 200
    with one_line(mutual, "no_credentials"):
        assert mutual.get("/debug/sparsity")[0] == 401
    with one_line(mutual, "certificate"):
        assert mutual.get("/debug/sparsity", client=clients["nobody"])[0] == 401
    with one_line(mutual, "method"):
        assert mutual.get("/debug/sparsity", client=clients["decoder"])[0] == 403
    assert mutual.get("/debug/sparsity", client=clients["monitor"])[0] == 200
    assert mutual.get("/debug/sparsity", dict(shows("other")))[0] == 200


def test_the_documents_policy_is_one(start_server, authority, clients, tmp_path):
    policy = template(tmp_path)
    with start_server(*tls_flags(authority), f"--access_policy={policy}") as server:
        Client(server, authority, clients["router"]).list_models()
        Client(server, authority).list_models(metadata=shows("", token="decoder-0123456789abcdef"))


# --- who does not get in --------------------------------------------------------------------------


def lets_in(target, client=None):
    """Whether who connects hears more than that it is hung up on, or why."""
    context = harness.unverified(client)
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(ConnectionError, ssl.SSLError), \
            socket.create_connection(address(target), 10) as tcp:
        with context.wrap_socket(tcp) as connection:
            return connection.recv(9) != b""
    return False


def in_the_clear(target, said=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9):
    with contextlib.suppress(ConnectionError), socket.create_connection(address(target), 10) as tcp:
        tcp.sendall(said)
        return tcp.recv(100)
    return b""


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """A certificate that another authority of the same name has signed."""
    other = Authority(tmp_path_factory.mktemp("stranger"))
    return other.sign("router", names=f"URI:{SPIFFE}")


@pytest.mark.parametrize("port", ["grpc", "http"])
@pytest.mark.parametrize("who", ["stranger", "expired"])
def test_a_certificate_that_is_not_good_does_not_get_in(mutual, clients, strangers, port, who):
    client = strangers if who == "stranger" else clients["expired"]
    with one_line(mutual, "handshake", port):
        if port == "grpc":
            assert not lets_in(mutual.target, client)
        else:
            context = harness.unverified(client)
            connection = http.client.HTTPSConnection(mutual.http, timeout=10, context=context)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                connection.request("GET", "/metrics")
                connection.getresponse()


@pytest.mark.parametrize("port", ["grpc", "http"])
def test_plaintext_is_refused_where_there_is_tls(mutual, port):
    with one_line(mutual, "handshake", port):
        if port == "grpc":
            said = in_the_clear(mutual.target)
            assert b"HTTP" not in said and said[3:4] != b"\4", "no SETTINGS"
        else:
            assert b"200" not in in_the_clear(mutual.http, b"GET /metrics HTTP/1.1\r\n\r\n")


def test_without_a_policy_a_certificate_is_needed(start_server, authority, clients):
    with start_server(*tls_flags(authority)) as server:
        Client(server, authority, clients["nobody"]).list_models()
        with one_line(server, "handshake", "grpc"):
            assert not lets_in(server.target)
        assert server.get("/metrics")[0] == server.get("/healthz")[0] == 200
        with one_line(server, "no_credentials", "GetSparsityReport"):
            assert server.get("/debug/sparsity")[0] == 401
        with one_line(server, "no_credentials"):
            assert server.get("/debug/sparsity", dict(shows("other")))[0] == 401
        assert server.get("/debug/sparsity", client=clients["nobody"])[0] == 200


def test_without_a_policy_a_certificate_needs_no_name(start_server, authority):
    nameless = authority.sign("nameless", names="IP:192.0.2.1", common_name="")
    with start_server(*tls_flags(authority)) as server:
        Client(server, authority, nameless).list_models()
        assert server.get("/debug/sparsity", client=nameless)[0] == 200


def test_where_clients_have_no_certificates_pages_need_none(start_server, authority):
    with start_server(*tls_flags(authority, client_ca=False)) as server:
        assert server.get("/debug/sparsity")[0] == 200


def test_half_handshakes_keep_no_scraper_waiting(mutual):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            half = stack.enter_context(socket.create_connection(address(mutual.http), 10))
            half.sendall(b"\x16\x03\x01\x02\x00\x01")  # the begin of a ClientHello
        assert mutual.get("/metrics")[0] == 200


def test_a_long_page_arrives_whole(mutual):
    text = mutual.get("/metrics")[1]
    assert len(text) > 1 << 14 and text.endswith("\n")  # more than one record of TLS


# --- what changes while the server runs -----------------------------------------------------------


def served(target):
    return ssl.get_server_certificate(address(target))


def test_certificates_change_without_a_restart(start_server, authority, tmp_path):
    first, second = authority.sign("server"), authority.sign("second")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(text, path):
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", path)

    def stale():
        return server.metric("prefilld_credentials_stale", kind="tls")

    for source, target in zip(first, (cert, key), strict=True):
        shutil.copy(source, target)
    with start_server(f"--tls_cert={cert}", f"--tls_key={key}") as server:
        client = Client(server, authority)
        client.list_models()
        assert served(server.target) == served(server.http) == first[0].read_text()
        put("-----BEGIN CERTIFICATE-----\nbroken\n-----END CERTIFICATE-----\n", cert)
        harness.eventually(lambda: stale() == 1)
        assert served(server.target) == served(server.http) == first[0].read_text()
        put(second[1].read_text(), key)
        put(second[0].read_text(), cert)
        harness.eventually(lambda: stale() == 0)
        assert served(server.target) == served(server.http) == second[0].read_text()
        client.list_models()  # on the connection that it has
        Client(server, authority).list_models()
        assert {"tls_not_read", "tls_read"} <= {line["event"] for line in server.log()}


def test_another_authority_of_clients_is_taken_without_a_restart(start_server, authority, clients,
                                                                 strangers, tmp_path):
    ca = tmp_path / "ca.pem"
    shutil.copy(authority.pem, ca)
    other = strangers[0].parent / "ca.pem"
    with start_server(*tls_flags(authority, client_ca=False), f"--tls_client_ca={ca}") as server:
        assert lets_in(server.target, clients["router"])
        assert not lets_in(server.target, strangers)
        ca.write_text(other.read_text())
        harness.eventually(lambda: "tls_read" in {line["event"] for line in server.log()})
        assert lets_in(server.target, strangers)
        assert not lets_in(server.target, clients["router"])
