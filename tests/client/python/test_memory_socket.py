"""The socket that hands out memory: whoever answers, and whatever, no descriptor is left and
nothing waits for longer than it may."""

import gc
import os
import socket
import struct
import threading
import time

import grpc
import pytest

from fake_handout import PAGE, Memory, Handout, send
from prefilld import PrefilldError, memory_socket


@pytest.fixture
def handout():
    made = Handout()
    made.memory = made.share(Memory([3 * PAGE], "GPU-1"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_descriptor_is_left(handout):
    """After the test's own."""
    gc.collect()  # other tests'
    before = descriptors()
    yield
    deadline = time.monotonic() + 5  # the other end may be closing its own
    while descriptors() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert descriptors() <= before and handout.idle()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def refused(handout, reason, *words):
    with pytest.raises(PrefilldError) as caught:
        memory_socket.receive(handout.path, handout.memory.name)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.reason == reason, caught.value
    assert [word for word in words if word not in caught.value.message] == [], caught.value


def take(handout):
    connection, descriptor, size = memory_socket.receive(handout.path, handout.memory.name)
    try:
        assert size == os.fstat(descriptor).st_size == 3 * PAGE
        assert not os.get_inheritable(descriptor)
        assert os.fstat(descriptor).st_ino == os.fstat(handout.memory.file).st_ino
        assert handout.in_use() == [handout.memory.name]
    finally:
        os.close(descriptor)
        connection.close()


def test_an_abstract_name(handout):
    take(handout)


def test_a_path(tmp_path):
    other = Handout(str(tmp_path / "socket"))
    other.memory = other.share(Memory([3 * PAGE], "GPU-1"))
    take(other)
    assert other.idle()
    other.close()


@pytest.mark.parametrize("path", ["", "@", "@nobody-is-here", "/nowhere/at/all", "/dev/null",
                                  "/" + 200 * "x", "@" + 200 * "x", "with\0zero"])
def test_nobody_answers(handout, path):
    handout.path = path
    refused(handout, "REASON_SOCKET", path)


def test_a_socket_of_another_kind(handout, tmp_path):
    handout.path = str(tmp_path / "stream")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(handout.path)
        other.listen()
        refused(handout, "REASON_SOCKET")


def test_says_nothing(handout, monkeypatch):
    monkeypatch.setattr(memory_socket, "_TIMEOUT_S", 0.3)
    handout.answer = lambda connection, name: None
    begin = time.monotonic()
    refused(handout, "REASON_SOCKET", "says nothing for 0.3 s")
    assert 0.2 < time.monotonic() - begin < 2


def test_does_not_even_accept(handout, monkeypatch, tmp_path):
    monkeypatch.setattr(memory_socket, "_TIMEOUT_S", 0.3)
    handout.path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf, \
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
        deaf.bind(handout.path)
        deaf.listen(0)
        first.connect(handout.path)
        begin = time.monotonic()
        refused(handout, "REASON_SOCKET", "says nothing for 0.3 s")
        assert 0.2 < time.monotonic() - begin < 2


def test_waits_while_the_queue_is_full(handout, tmp_path):
    """Callers that come together are not turned away."""
    handout.path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as busy, \
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
        busy.bind(handout.path)
        busy.listen(0)
        first.connect(handout.path)

        def serve():
            time.sleep(0.2)
            accepted = [busy.accept()[0] for _ in range(2)]
            accepted[1].recv(100)
            send(accepted[1], 3 * PAGE, handout.memory.file)
            for connection in accepted:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        connection, descriptor, _ = memory_socket.receive(handout.path, handout.memory.name)
        thread.join()
        os.close(descriptor)
        connection.close()


def test_a_default_timeout_of_the_process_does_not_matter(handout):
    socket.setdefaulttimeout(0.001)
    try:
        handout.answer = lambda connection, name: (time.sleep(0.1),
                                                   handout.hand_out(connection, name))
        take(handout)
    finally:
        socket.setdefaulttimeout(None)


@pytest.mark.parametrize(("answer", "words"), [
    (lambda c, fd: send(c, 0, text="it has gone"), ["it has gone"]),
    (lambda c, fd: send(c, 0), []),
    (lambda c, fd: send(c, 0, fd), ["says 0"]),
    (lambda c, fd: send(c, PAGE), ["0 descriptors"]),
    (lambda c, fd: send(c, PAGE, fd, fd), ["2 descriptors"]),
    (lambda c, fd: send(c, PAGE, *[fd] * 17), ["longer than any answer"]),
    (lambda c, fd: send(c, PAGE, *[fd] * 100), ["longer than any answer"]),
    (lambda c, fd: send(c, PAGE, fd, text="and more"), ["has 16 bytes"]),
    (lambda c, fd: send(c, PAGE, fd, text=5000 * "x"), ["longer than any answer"]),
    (lambda c, fd: socket.send_fds(c, [b"short"], [fd]), ["has 5 bytes"]),
    (lambda c, fd: c.send(bytes(8) + b"\xff\xfe"), []),
])
def test_what_is_no_answer(handout, answer, words):
    handout.answer = lambda connection, name: answer(connection, handout.memory.file)
    refused(handout, "REASON_DESCRIPTOR", *words)


def test_closed_without_a_word(handout):
    handout.answer = lambda connection, name: connection.shutdown(socket.SHUT_RDWR)
    refused(handout, "REASON_SOCKET", "without an answer")


@pytest.mark.parametrize("user", [os.geteuid() + 1, 65534])
def test_somebody_else_answers(handout, monkeypatch, user):
    asked = handout.asked.copy()
    credentials(monkeypatch, user)
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    refused(handout, "REASON_PEER", f"user {user}", "by 7 or root")
    assert handout.idle() and set(handout.asked) <= {*asked, ""}  # the name was not told


@pytest.mark.parametrize("answer", [
    lambda connection, name: send(connection, 0, text="who are you"),
    lambda connection, name: connection.shutdown(socket.SHUT_RDWR)])
def test_root_may_answer_and_may_refuse_this_user(handout, monkeypatch, answer):
    credentials(monkeypatch, 0)
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    take(handout)
    handout.answer = answer
    refused(handout, "REASON_PEER")


def test_a_refusal_that_comes_before_the_name(handout, monkeypatch, tmp_path):
    """And is read, though the other end has hung up."""
    handout.path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(handout.path)
        listener.listen()

        def serve():
            peer, _ = listener.accept()
            send(peer, 0, text="not you")
            peer.shutdown(socket.SHUT_RD)
            peer.close()

        class Late(socket.socket):
            def connect(self, address):
                super().connect(address)
                serve()

        monkeypatch.setattr(memory_socket.socket, "socket", Late)
        refused(handout, "REASON_DESCRIPTOR", "not you")


def credentials(monkeypatch, user):
    class Connection(socket.socket):
        def getsockopt(self, level, option, *size):
            assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
            return struct.pack("3i", 1, user, 1)

    monkeypatch.setattr(memory_socket.socket, "socket", Connection)
