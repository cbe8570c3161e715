"""Who a client is, and whom it takes for its server: TLS, a certificate of its own, a token."""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Mapping

import grpc

from .errors import PrefilldError
from .tensors import invalid

_TOKEN = re.compile(r"[\x21-\x7e]{1,8192}")
_HANDSHAKE_S = 2.0  # of a connection that only asks why another failed


@dataclasses.dataclass(frozen=True)
class Credentials:
    """Files are read when a connection is made, the token's at a call where it has changed: they
    may be replaced while a client lives.

    tls_ca: PEM file of the authorities that may have signed the server's certificate; empty: the
        connection is in the clear, and nothing else but token_file may be given.
    tls_cert, tls_key: PEM files of the client's own certificate chain and its key, for a server
        that asks for one.
    token_file: file of a bearer token, which every call carries. Only over TLS, or to this host.
    server_name: that the server's certificate must be of; default: the target's host.
    """

    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    token_file: str = ""
    server_name: str = ""

    @classmethod
    def from_env(cls, environment: Mapping[str, str] = os.environ) -> Credentials:
        """Of PREFILLD_TLS_CA, PREFILLD_TLS_CERT, PREFILLD_TLS_KEY, PREFILLD_TOKEN_FILE and
        PREFILLD_SERVER_NAME, those that are set."""
        return cls(**{field.name: environment.get(f"PREFILLD_{field.name.upper()}", "")
                      for field in dataclasses.fields(cls)})

    def check(self, target: str) -> None:
        """INVALID_ARGUMENT names what cannot be used for this target, and its file."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise invalid("tls_cert and tls_key are needed together")
        if not self.tls_ca and (self.tls_cert or self.server_name):
            raise invalid(f"{'tls_cert' if self.tls_cert else 'server_name'} needs tls_ca")
        if self.token_file and not self.tls_ca and not _on_this_host(target):
            raise invalid(f"token_file: {target} is reached in the clear, where others can read a "
                          "token; give tls_ca")
        if self.tls_ca:
            self._context()
        self.metadata()

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """With what is in the files now; None: in the clear."""
        if not self.tls_ca:
            return None
        key, cert = (_read(path, name) if path else None for name, path in
                     (("tls_key", self.tls_key), ("tls_cert", self.tls_cert)))
        return grpc.ssl_channel_credentials(_read(self.tls_ca, "tls_ca"), key, cert)

    def channel_options(self) -> list[tuple[str, str]]:
        return ([("grpc.ssl_target_name_override", self.server_name)] if self.server_name else [])

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries."""
        if not self.token_file:
            return ()
        return (("authorization",
                 f"Bearer {_token(self.token_file, _stamp(self.token_file))}"),)

    def stamp(self) -> tuple[object, ...]:
        """Another one once a file of TLS is another, or has other contents."""
        return tuple(_stamp(path) for path in (self.tls_ca, self.tls_cert, self.tls_key) if path)

    def why_not(self, target: str) -> PrefilldError | None:
        """UNAUTHENTICATED with what a handshake with `target` fails of, in words; None: not of
        that. Connects, for two seconds at most."""
        host, _, port = target.removeprefix("dns:///").rpartition(":")
        host = host.strip("[]")
        if "/" in target.removeprefix("dns:///") or not host or not port.isdecimal():
            return None
        try:
            with socket.create_connection((host, int(port)), _HANDSHAKE_S) as connection:
                why = (self._why_not_tls(connection, self.server_name or host) if self.tls_ca
                       else _speaks_tls(connection))
        except (OSError, ValueError, PrefilldError):
            return None
        return PrefilldError(grpc.StatusCode.UNAUTHENTICATED, f"{target} {why}") if why else None

    def _why_not_tls(self, connection: socket.socket, name: str) -> str:
        try:
            with self._context().wrap_socket(connection, server_hostname=name) as tls:
                # What a server has against our certificate comes behind TLS 1.3's handshake, if
                # it says so at all. One that takes it speaks first in HTTP/2.
                reason = "" if tls.recv(1) else "closed"
        except ssl.SSLCertVerificationError as error:
            return (f"has no certificate that can be trusted: {error.verify_message} "
                    f"(tls_ca {self.tls_ca}, server name {name})")
        except ssl.SSLError as error:
            if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
                return f"does not speak TLS, for which tls_ca {self.tls_ca} was given"
            reason = error.reason or str(error)
        except ConnectionError:
            reason = "closed"
        given = f"tls_cert {self.tls_cert}" if self.tls_cert else "no tls_cert was given"
        return reason and f"refuses this client in the handshake: {reason} ({given})"

    def _context(self) -> ssl.SSLContext:
        """INVALID_ARGUMENT names the file that is none of its kind."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        try:
            _read(self.tls_ca, "tls_ca")
            context.load_verify_locations(self.tls_ca)
        except (ssl.SSLError, ValueError) as error:
            raise invalid(f"tls_ca {self.tls_ca}: no certificate in PEM: {error}") from None
        if self.tls_cert:
            for name in ("tls_cert", "tls_key"):
                _read(getattr(self, name), name)
            try:
                context.load_cert_chain(self.tls_cert, self.tls_key, password=lambda: b"")
            except (ssl.SSLError, ValueError) as error:
                raise invalid(f"tls_cert {self.tls_cert} and tls_key {self.tls_key}: no "
                              f"certificate in PEM with its key, without a passphrase: {error}"
                              ) from None
        return context


def _speaks_tls(connection: socket.socket) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        context.wrap_socket(connection).close()
    except ssl.SSLError:
        return ""
    return "speaks TLS: give tls_ca, the file of who signed its certificate (PREFILLD_TLS_CA)"


def _on_this_host(target: str) -> bool:
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stamp(path: str) -> tuple[int, ...]:
    """Also where links lead elsewhere than before, as those of Kubernetes' secrets do."""
    try:
        found = os.stat(path)
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
    except OSError:
        return ()


@functools.lru_cache(maxsize=64)
def _token(path: str, stamp: tuple[int, ...]) -> str:
    token = _read(path, "token_file").decode("latin-1").strip()
    if not _TOKEN.fullmatch(token):
        raise invalid(f"token_file {path}: {len(token)} bytes that are no token, which is 1 to "
                      "8192 printable characters")
    return token


def _read(path: str, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise invalid(f"{name} {path}: {error.strerror}") from None
