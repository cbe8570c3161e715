"""Who a client is and whom it trusts: what is sent, to whom, and what it says where that fails."""

import os
import shutil
import socket
import threading

import grpc
import numpy as np
import pytest

from certificates import Authority
from fake_server import LAYERS, MODEL, FakeServer
from prefilld import Credentials, PrefillClient, PrefilldError, RetryPolicy, connection

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
INVALID = grpc.StatusCode.INVALID_ARGUMENT
QUICK = RetryPolicy(attempts=2, initial_backoff=0.01)


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("other"), "other")


@pytest.fixture
def serve(request):
    """A fake server with this certificate; client_ca: it wants one of its callers."""
    def start(pair, client_ca=None):
        cert, key = (path.read_bytes() for path in pair)
        fake = FakeServer(grpc.ssl_server_credentials(
            [(key, cert)], client_ca and client_ca.pem.read_bytes(), client_ca is not None))
        request.addfinalizer(fake.handout.close)
        request.addfinalizer(fake.stop)
        return fake
    return start


@pytest.fixture
def connect(request):
    def make(server, **fields):
        client = PrefillClient(getattr(server, "target", server), retry=QUICK,
                               credentials=Credentials(**{k: str(v) for k, v in fields.items()}))
        request.addfinalizer(client.close)
        return client
    return make


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    return path


def works(client):
    with client.prefill(MODEL, range(9)) as prompt:
        assert len(list(prompt)) == LAYERS
    client.attend(*(np.ones((3, 2, 64), np.float32) for _ in range(3)))
    assert [model.name for model in client.models()] == [MODEL]


# --- over TLS


def test_every_call_over_tls_carries_the_token(ca, serve, connect, token):
    server = serve(ca.sign("server"))
    works(connect(server, tls_ca=ca.pem, token_file=token))
    assert set(server.authorization) == {"Bearer s3cret"} and len(server.authorization) >= 5


def test_a_server_that_wants_a_certificate_gets_it(ca, serve, connect):
    server = serve(ca.sign("server"), client_ca=ca)
    cert, key = ca.sign("client")
    works(connect(server, tls_ca=ca.pem, tls_cert=cert, tls_key=key))


def test_another_name_may_be_given(ca, serve, connect):
    server = serve(ca.sign("elsewhere", "DNS:prefilld.internal"))
    works(connect(server, tls_ca=ca.pem, server_name="prefilld.internal"))


def test_the_environment_says_so_for_who_says_nothing(ca, serve, token, monkeypatch):
    server = serve(ca.sign("server"))
    monkeypatch.setenv("PREFILLD_TLS_CA", str(ca.pem))
    monkeypatch.setenv("PREFILLD_TOKEN_FILE", str(token))
    with PrefillClient(server.target) as client:
        works(client)
    assert set(server.authorization) == {"Bearer s3cret"}
    plain = FakeServer()
    with PrefillClient(plain.target, credentials=Credentials()) as client:
        works(client)
    plain.stop()
    assert set(plain.authorization) == {None}


# --- what fails says why


def fails(client, *words):
    for call in (client.models, lambda: client.prefill(MODEL, [1, 2]),
                 lambda: client.attend(*(np.ones((3, 2, 64), np.float32) for _ in range(3)))):
        with pytest.raises(PrefilldError) as caught:
            call()
        assert caught.value.code is UNAUTHENTICATED and not caught.value.retryable
        missing = [word for word in words if word not in caught.value.message]
        assert not missing, caught.value.message


def test_tls_reached_in_the_clear(ca, serve, connect):
    server = serve(ca.sign("server"))
    fails(connect(server), server.target, "speaks TLS", "tls_ca", "PREFILLD_TLS_CA")
    fails(connect(serve(ca.sign("server"), client_ca=ca)), "speaks TLS")


def test_a_server_in_the_clear_reached_by_tls(ca, connect):
    plain = FakeServer()
    fails(connect(plain, tls_ca=ca.pem), plain.target, "does not speak TLS", str(ca.pem))
    plain.stop()


def test_another_authority(ca, other_ca, serve, connect):
    fails(connect(serve(ca.sign("server")), tls_ca=other_ca.pem), "no certificate that can be "
          "trusted", "unable to get local issuer certificate", f"tls_ca {other_ca.pem}")


def test_an_expired_certificate(ca, serve, connect):
    fails(connect(serve(ca.sign("old", days=-1)), tls_ca=ca.pem),
          "certificate has expired", f"tls_ca {ca.pem}")


def test_another_name(ca, serve, connect):
    fails(connect(serve(ca.sign("elsewhere", "DNS:prefilld.internal")), tls_ca=ca.pem),
          "IP address mismatch", "server name 127.0.0.1")
    fails(connect(serve(ca.sign("server")), tls_ca=ca.pem, server_name="wrong"),
          "Hostname mismatch", "server name wrong")


def test_no_certificate_and_one_of_another_authority(ca, other_ca, serve, connect):
    server = serve(ca.sign("server"), client_ca=ca)
    fails(connect(server, tls_ca=ca.pem), "refuses this client", "no tls_cert was given")
    cert, key = other_ca.sign("stranger")
    fails(connect(server, tls_ca=ca.pem, tls_cert=cert, tls_key=key),
          "refuses this client", f"tls_cert {cert}")


def test_a_server_that_is_not_there_is_unavailable(ca, connect):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        for fields in ({}, {"tls_ca": ca.pem}):
            with pytest.raises(PrefilldError) as caught:
                connect(target, **fields).models()
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_server_that_says_nothing_is_unavailable(ca, connect, monkeypatch):
    monkeypatch.setattr("prefilld.credentials._HANDSHAKE_S", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        for fields in ({}, {"tls_ca": ca.pem}):
            credentials = Credentials(**{k: str(v) for k, v in fields.items()})
            assert credentials.why_not(f"127.0.0.1:{deaf.getsockname()[1]}") is None


# --- what is refused before a call


@pytest.mark.parametrize("fields, words", [
    ({"tls_cert": "c"}, "tls_cert and tls_key are needed together"),
    ({"tls_cert": "c", "tls_key": "k"}, "tls_cert needs tls_ca"),
    ({"server_name": "n"}, "server_name needs tls_ca"),
    ({"tls_ca": "/no/such"}, "tls_ca /no/such: No such file"),
    ({"token_file": "/no/such"}, "token_file /no/such: No such file"),
    ({"tls_ca": "CA", "tls_cert": "CA", "tls_key": "/no/such"}, "tls_key /no/such: No such file"),
    ({"tls_ca": "JUNK"}, "junk: no certificate in PEM"),
    ({"tls_ca": "CA", "tls_cert": "CA", "tls_key": "JUNK"}, "no certificate in PEM with its key"),
    ({"token_file": "EMPTY"}, "0 bytes that are no token"),
    ({"token_file": "LINES"}, "are no token"),
])
def test_what_cannot_be_used_is_named_with_its_file(ca, tmp_path, fields, words):
    files = {"CA": ca.pem, "JUNK": tmp_path / "junk", "EMPTY": tmp_path / "empty",
             "LINES": tmp_path / "lines"}
    files["JUNK"].write_text("nothing of the kind")
    files["EMPTY"].write_text("\n")
    files["LINES"].write_text("a\nx-other: b\n")
    fields = {name: str(files.get(value, value)) for name, value in fields.items()}
    with pytest.raises(PrefilldError, match=words) as caught:
        PrefillClient("127.0.0.1:1", credentials=Credentials(**fields))
    assert caught.value.code is INVALID and "s3cret" not in str(caught.value)


@pytest.mark.parametrize("target, allowed", [
    ("127.0.0.1:1", True), ("127.8.9.1:1", True), ("localhost:1", True), ("[::1]:1", True),
    ("unix:/run/p", True), ("unix-abstract:p", True), ("10.0.0.1:1", False),
    ("prefilld.internal:1", False), ("localhost.evil:1", False), ("0.0.0.0:1", False),
    ("127.0.0.1.evil:1", False)])
def test_a_token_goes_nowhere_in_the_clear(token, ca, target, allowed):
    plain = Credentials(token_file=str(token))
    if allowed:
        plain.check(target)
    else:
        with pytest.raises(PrefilldError, match="reached in the clear"):
            plain.check(target)
    Credentials(token_file=str(token), tls_ca=str(ca.pem)).check(target)


# --- files that are replaced


def test_a_token_is_read_again_when_it_has_changed(connect, token):
    server = FakeServer()
    client = connect(server, token_file=token)
    client.models()
    client.models()
    following = token.with_name("next")
    following.write_text("another")
    os.replace(following, token)
    client.models()
    server.stop()
    assert server.authorization == ["Bearer s3cret"] * 2 + ["Bearer another"]


def test_certificates_are_read_again_for_a_new_connection(ca, other_ca, serve, connect, tmp_path):
    """The authority changes, and with it who the client is."""
    files = {name: tmp_path / name for name in ("tls_ca", "tls_cert", "tls_key")}

    def write(authority):
        cert, key = authority.sign("client")
        for source, name in ((authority.pem, "tls_ca"), (cert, "tls_cert"), (key, "tls_key")):
            shutil.copy(source, tmp_path / "next")
            os.replace(tmp_path / "next", files[name])

    write(ca)
    server = serve(ca.sign("server"), client_ca=ca)
    client = connect(server, **files)
    works(client)
    server.layer_gate = threading.Semaphore(1)
    running = client.prefill(MODEL, range(9))
    layers = iter(running)
    next(layers)
    write(other_ca)
    with pytest.raises(PrefilldError, match="unable to get local issuer certificate"):
        client.models()
    for _ in range(LAYERS):
        server.layer_gate.release()
    assert len(list(layers)) == LAYERS - 1, "what runs ends on the connection that it has"
    server.layer_gate = None
    write(ca)
    works(client)


def test_connections_are_made_once_as_long_as_nothing_changes(ca, serve, connect, monkeypatch):
    made = []
    secure = grpc.secure_channel
    monkeypatch.setattr(connection.grpc, "secure_channel",
                        lambda *args, **options: (made.append(1), secure(*args, **options))[1])
    client = connect(serve(ca.sign("server")), tls_ca=ca.pem)
    works(client)
    works(client)
    assert len(made) == 1
