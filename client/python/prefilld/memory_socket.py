"""Where a server hands out descriptors of its memory: a Unix socket of whole messages. The
connection stays the caller's: as long as it is open, the server has the memory in use.

Nothing that comes is believed: not who answers, nor how much, nor what.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time

from .errors import PrefilldError, refused

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_TIMEOUT_S = 2.0        # of all of it
_DESCRIPTORS_MAX = 16   # taken, so that they can be closed
_TEXT_MAX = 1024        # bytes of a refusal


def host() -> str:
    """Tells two processes whether they are on one host: the kernel's boot id. Empty where the
    system does not tell."""
    with contextlib.suppress(OSError), open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()
    return ""


def receive(path: str, name: str) -> tuple[socket.socket, int, int]:
    """(connection, descriptor, bytes) of the memory of this name; the caller closes both.

    path: of the socket, or "@" and an abstract name. Blocks for two seconds at most.
    FAILED_PRECONDITION: with the reason why not, REASON_SOCKET, REASON_PEER or REASON_DESCRIPTOR.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(True)  # with the kernel's own limits: connect waits for them too
        _limit(connection, deadline)
        connection.connect("\0" + path[1:] if path.startswith("@") else path)
        stranger = _peer(connection, path) != os.geteuid()
        _limit(connection, deadline)
        with contextlib.suppress(BrokenPipeError):  # who is refused is told so at once
            connection.send(name.encode(), socket.MSG_NOSIGNAL)
        _limit(connection, deadline)
        return connection, *_answer(connection, path, name, stranger)
    except BaseException as error:
        connection.close()
        if isinstance(error, BlockingIOError):
            raise refused("REASON_SOCKET",
                          f"socket {path} says nothing for {_TIMEOUT_S:g} s") from error
        if isinstance(error, (OSError, ValueError)):  # ValueError: no path at all
            raise refused("REASON_SOCKET", f"socket {path} cannot be used: {error}") from error
        raise


def _limit(connection: socket.socket, deadline: float) -> None:
    left = max(1000, int(1e6 * (deadline - time.monotonic())))  # of 0 there would be no limit
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(left, 10**6)))


def _peer(connection: socket.socket, path: str) -> int:
    """The user who answers, if that is this process's own or root."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user not in (os.geteuid(), 0):
        raise refused("REASON_PEER", f"socket {path} is answered by user {user}, not by "
                      f"{os.geteuid()} or root")
    return user


def _answer(connection: socket.socket, path: str, name: str, stranger: bool) -> tuple[int, int]:
    """(descriptor, bytes). stranger: who answers is root and may have refused this user."""
    data, ancillary, flags, _ = connection.recvmsg(
        8 + _TEXT_MAX, socket.CMSG_SPACE(4 * _DESCRIPTORS_MAX), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(raw[:len(raw) // 4 * 4])
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise _unfit(path, name, "is longer than any answer")
        if not data:
            raise refused("REASON_PEER" if stranger else "REASON_SOCKET",
                          f"socket {path} was closed without an answer to {name!r}")
        size = int.from_bytes(data[:8], "little")
        if len(data) >= 8 and size == 0 and not descriptors:
            raise refused("REASON_PEER" if stranger else "REASON_DESCRIPTOR",
                          f"socket {path} gives no {name!r}: {data[8:].decode(errors='replace')}")
        if len(data) != 8 or size == 0 or len(descriptors) != 1:
            raise _unfit(path, name, f"has {len(data)} bytes, says {size}, and carries "
                         f"{len(descriptors)} descriptors")
        return descriptors.pop(), size
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _unfit(path: str, name: str, what: str) -> PrefilldError:
    return refused("REASON_DESCRIPTOR", f"the answer of socket {path} to {name!r} {what}")
