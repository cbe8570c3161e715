"""TLS between prefilld and its clients: what they reach with which files, and what they say where
they do not."""

import os

import numpy as np
import pytest

import prefilld
from certificates import Authority
from e2e import attending, harness
from prefilld import Credentials, PrefillClient, PrefilldError


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("other"), "other")


@pytest.fixture
def serve(request, start_server, tiny):
    """serve(certificate and key, client_ca): a prefilld with TLS; its address."""
    def start(pair, client_ca=None):
        flags = [f"--tls_cert={pair[0]}", f"--tls_key={pair[1]}"]
        flags += [] if client_ca is None else [f"--tls_client_ca={client_ca.pem}"]
        server = start_server("--kv_memory=64MiB", *flags, models=[("tiny", tiny.directory)])
        request.addfinalizer(lambda: server.__exit__(None, None, None))
        return server
    return start


def ctl(server, *arguments, **fields):
    flags = [f"--{name}={value}" for name, value in fields.items()]
    return harness.prefillctl(server, *flags, *arguments, check=False, timeout=60)


def works(server, **fields):
    """By prefillctl and by Python, which maps what it gets."""
    done = ctl(server, "models", **fields)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout
    credentials = Credentials(**{name: str(value) for name, value in fields.items()})
    with PrefillClient(server.target, credentials=credentials) as client:
        with client.prefill("tiny", range(200)) as prompt:
            assert len(list(prompt)) == 4 and prompt.transport == "posix_shm"
        result = client.attend(*attending.small(tokens=10))
        assert np.isfinite(result.o).all()


def fails(server, *words, **fields):
    """Both say the same, in words."""
    done = ctl(server, "models", **fields)
    assert done.returncode == 1
    assert "Socket closed" not in done.stderr
    credentials = Credentials(**{name: str(value) for name, value in fields.items()})
    with pytest.raises(PrefilldError) as caught:
        with PrefillClient(server.target, credentials=credentials) as client:
            client.models()
    for text in (done.stderr, str(caught.value)):
        assert text.startswith(("prefillctl: UNAUTHENTICATED: ", "UNAUTHENTICATED: ")), text
        for word in words:
            assert word in text, text


def test_a_server_with_a_certificate(ca, other_ca, serve):
    server = serve(ca.sign("server"))
    works(server, tls_ca=ca.pem)
    fails(server, server.target, "speaks TLS", "tls_ca")
    fails(server, "no certificate that can be trusted", "unable to get local issuer certificate",
          f"tls_ca {other_ca.pem}", tls_ca=other_ca.pem)
    fails(server, "ostname mismatch", "server name wrong", tls_ca=ca.pem, server_name="wrong")


def test_a_certificate_that_has_expired(ca, serve):
    fails(serve(ca.sign("old", days=-1)), "certificate has expired", f"tls_ca {ca.pem}",
          tls_ca=ca.pem)


def test_a_certificate_of_another_name(ca, serve):
    server = serve(ca.sign("named", "DNS:prefilld.internal"))
    works(server, tls_ca=ca.pem, server_name="prefilld.internal")
    fails(server, "IP address mismatch", "server name 127.0.0.1", tls_ca=ca.pem)


def test_a_server_that_wants_a_certificate(ca, other_ca, serve):
    server = serve(ca.sign("server"), client_ca=ca)
    cert, key = ca.sign("client")
    works(server, tls_ca=ca.pem, tls_cert=cert, tls_key=key)
    fails(server, "refuses this client", "no tls_cert was given", tls_ca=ca.pem)
    cert, key = other_ca.sign("stranger")
    fails(server, "refuses this client", f"tls_cert {cert}", tls_ca=ca.pem, tls_cert=cert,
          tls_key=key)
    fails(server, "speaks TLS")


def test_a_server_in_the_clear(ca, start_server):
    with start_server() as server:
        fails(server, "does not speak TLS", f"tls_ca {ca.pem}", tls_ca=ca.pem)


def test_credentials_of_the_environment(ca, serve, monkeypatch):
    server = serve(ca.sign("server"))
    monkeypatch.setenv("PREFILLD_TLS_CA", str(ca.pem))
    assert ctl(server, "health").returncode == 0
    with PrefillClient(server.target) as client:
        assert client.health().ready
    assert ctl(server, "health", tls_ca="/no/such").returncode == 1, "a flag counts more"


@pytest.mark.parametrize("fields, words", [
    ({"tls_cert": "c"}, "tls_cert and tls_key are needed together"),
    ({"server_name": "n"}, "server_name needs tls_ca"),
    ({"tls_ca": "/no/such"}, "tls_ca /no/such: No such file or directory"),
    ({"token_file": "/no/such"}, "token_file /no/such: No such file or directory"),
    ({"tls_ca": os.devnull}, f"tls_ca {os.devnull}: no certificate in PEM"),
    ({"token_file": os.devnull}, "0 bytes that are no token"),
])
def test_what_cannot_be_used_is_named_with_its_file(server, fields, words):
    done = ctl(server, "models", **fields)
    assert done.returncode == 1 and words in done.stderr
    assert done.stderr.startswith("prefillctl: INVALID_ARGUMENT: ")


def test_a_token_goes_nowhere_in_the_clear(tmp_path):
    token = tmp_path / "token"
    token.write_text("s3cret")
    done = harness.subprocess.run(
        [str(harness.PREFILLCTL), "--target=192.0.2.1:50051", f"--token_file={token}", "models"],
        capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "192.0.2.1:50051 is reached in the clear" in done.stderr
    assert "s3cret" not in done.stderr


def test_waiting_for_a_server_does_not_wait_for_another_certificate(ca, other_ca, serve):
    server = serve(ca.sign("server"))
    done = ctl(server, "health", "--wait", "--timeout=30", tls_ca=other_ca.pem)
    assert done.returncode == 1 and "unable to get local issuer" in done.stderr


def test_the_package_says_what_it_takes():
    assert prefilld.Credentials.from_env({"PREFILLD_TLS_CA": "a", "PREFILLD_SERVER_NAME": "b"}) == \
        Credentials(tls_ca="a", server_name="b")
