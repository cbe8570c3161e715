import grpc
import numpy as np
import pytest

from fake_server import Abort, Hang, Tamper
from prefilld import PrefilldError


def qkv(tokens=5, dtype=np.float32):
    rng = np.random.default_rng(7)
    return [rng.standard_normal((tokens, heads, 64)).astype(dtype) for heads in (4, 2, 2)]


def test_outputs_come_back_and_nothing_is_sent_before_admission(server, client):
    q, k, v = qkv(tokens=5000)  # q is 5 MB: several chunks
    seen = []
    result = client.attend(q, k, v, method="joint", gamma=0.8, return_lse=True,
                           progress=lambda fraction, phase: seen.append((phase, fraction)))
    np.testing.assert_array_equal(result.o, q)
    assert server.bytes_before_admission == 0
    assert [np.frombuffer(b, np.float32).size for b in server.uploaded] == [q.size, k.size, v.size]
    header = server.calls["Attend"][0]
    assert header.sparsity.gamma == 0.8 and header.return_lse
    assert not header.sparsity.HasField("tau")  # absent means the server's default
    assert result.summary.seconds["attention"] == 1.5
    assert result.report.pattern.tolist() == [[3, 3]]
    assert ("upload", 1.0) in seen and ("download", 1.0) in seen
    assert result.request_id == header.request_id != ""


def test_strided_arrays_travel_in_row_major_order(server, client):
    q, k, v = qkv()
    np.testing.assert_array_equal(client.attend(q[::-1], k, v).o, q[::-1])


def test_types(server, client):
    q, k, v = (np.ones((2, 1, 64), np.uint16) for _ in range(3))
    with pytest.raises(PrefilldError, match="dtype='bf16'"):
        client.attend(q, k, v)
    with pytest.raises(PrefilldError, match="float64"):
        client.attend(*qkv(dtype=np.float64))
    with pytest.raises(PrefilldError, match="does not hold dtype 'f16'"):
        client.attend(*qkv(), dtype="f16")
    with pytest.raises(PrefilldError, match="three dimensions"):
        client.attend(q[0], k, v, dtype="bf16")
    assert not server.calls["Attend"]


def test_unavailable_before_and_in_the_middle_of_the_answer(server, client):
    q, k, v = qkv()
    server.faults["Attend"] = [Abort(grpc.StatusCode.UNAVAILABLE),
                               Abort(grpc.StatusCode.UNAVAILABLE, after=2)]
    np.testing.assert_array_equal(client.attend(q, k, v).o, q)
    assert len(server.calls["Attend"]) == 3
    assert len({h.request_id for h in server.calls["Attend"]}) == 1


def corrupt(number, chunk):
    if number == 1:
        chunk.data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
    return chunk


@pytest.mark.parametrize("change, message", [
    (corrupt, "checksum"),
    (lambda number, chunk: None if number == 1 else chunk, "out of order"),
    (lambda number, chunk: None if chunk.last else chunk, "ended before its last output"),
])
def test_damaged_outputs_are_never_returned(server, client, change, message):
    server.faults["Attend"] = [Tamper(change)]
    with pytest.raises(PrefilldError, match=message) as caught:
        client.attend(*qkv())
    assert caught.value.code is grpc.StatusCode.DATA_LOSS


def test_deadline(server, client):
    server.faults["Attend"] = [Hang()]
    with pytest.raises(PrefilldError) as caught:
        client.attend(*qkv(), timeout=0.4)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
