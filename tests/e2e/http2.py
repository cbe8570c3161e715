"""HTTP/2 by hand: says what no library would."""

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS = 1, 4


def address(target):
    host, port = target.rsplit(":", 1)
    return host.strip("[]"), int(port)


def connect(target):
    """A connection that has said the first words, and never acknowledges the server's."""
    connection = socket.create_connection(address(target), timeout=10)
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return connection


def frame(kind, flags, stream, payload=b""):
    return (len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
            + payload)


def headers(path):
    """The block of a gRPC call's, every field a literal (RFC 7541, 6.2.2)."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"),
              ("content-type", "application/grpc"), ("te", "trailers")]
    return b"".join(b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)])
                    + value.encode() for name, value in fields)


def message(data):
    return b"\0" + struct.pack(">I", len(data)) + data


def ended(connection, timeout=20):
    """Whether the peer hangs up within this time."""
    connection.settimeout(timeout)
    try:
        while connection.recv(1 << 16):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True
