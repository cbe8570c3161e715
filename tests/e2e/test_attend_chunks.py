"""The upload of an Attend: chunks that are wrong, messages that are no messages at all."""

import random
import struct

import google_crc32c
import grpc
import numpy as np
import pytest

from e2e import attending, harness
from e2e.harness import refused
from prefilld.v1 import prefill_service_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DATA_LOSS = grpc.StatusCode.DATA_LOSS


def skip_one(parts):
    del parts[3]


def repeat_one(parts):
    parts.insert(2, parts[1])


def swap_two(parts):
    parts[1], parts[2] = parts[2], parts[1]


def start_with_k(parts):
    parts[:] = [c for c in parts if c.tensor_index == 1] + [c for c in parts if c.tensor_index != 1]


def shift(parts):
    parts[1].byte_offset += 4


def huge_offset(parts):
    parts[1].byte_offset = 2**64 - 1


def unknown_tensor(parts):
    parts[1].tensor_index = 3


def huge_tensor(parts):
    parts[0].tensor_index = 2**32 - 1


def flip_a_bit(parts):
    data = bytearray(parts[1].data)
    data[17] ^= 4
    parts[1].data = bytes(data)


def wrong_checksum(parts):
    parts[0].crc32c ^= 1


def one_byte_more(parts):
    lengthen(parts[-1], 1)


def tensor_too_long(parts):
    last_of_q = [c for c in parts if c.tensor_index == 0][-1]
    lengthen(last_of_q, 64)


def one_byte_less(parts):
    parts[-1].data = parts[-1].data[:-1]
    parts[-1].crc32c = google_crc32c.value(parts[-1].data)


def early_last(parts):
    parts[0].last = True


def missing_last(parts):
    parts[-1].last = False


def lengthen(chunk, count):
    chunk.data += bytes(count)
    chunk.crc32c = google_crc32c.value(chunk.data)


CHUNK_ERRORS = [skip_one, repeat_one, swap_two, start_with_k, shift, huge_offset, unknown_tensor,
                huge_tensor, flip_a_bit, wrong_checksum, one_byte_more, tensor_too_long,
                one_byte_less, early_last, missing_last]


@pytest.mark.parametrize("spoil", CHUNK_ERRORS, ids=lambda f: f.__name__)
def test_wrong_chunks_are_data_loss(server, qkv, spoil):
    parts = attending.chunks(qkv, size=1 << 14)
    spoil(parts)
    call = attending.Call(server.prefill)
    call.admit(attending.header(*qkv))
    for chunk in parts:
        call.send(chunk)
    with refused(DATA_LOSS):
        call.finish()
    attending.serves_a_good_request(server)


def test_a_chunk_after_the_last_one_is_data_loss_or_comes_too_late(server, qkv):
    """The work may be done before the chunk arrives; then the answer is that of the good part."""
    expected, _ = attending.attend(server.prefill, *qkv)
    parts = attending.chunks(qkv, size=1 << 14)
    call = attending.Call(server.prefill)
    call.admit(attending.header(*qkv))
    for chunk in parts + parts[-1:]:
        call.send(chunk)
    try:
        outputs, _ = call.finish()
    except grpc.RpcError as error:
        assert harness.Failure(error).code == DATA_LOSS
    else:
        np.testing.assert_array_equal(outputs["o"], expected["o"])


def test_an_upload_that_ends_early_is_data_loss(server, qkv):
    call = attending.Call(server.prefill)
    call.admit(attending.header(*qkv))
    for chunk in attending.chunks(qkv, size=1 << 14)[:5]:
        call.send(chunk)
    with refused(DATA_LOSS):
        call.finish()


def test_a_header_without_an_upload_is_data_loss(server, qkv):
    call = attending.Call(server.prefill)
    call.admit(attending.header(*qkv))
    with refused(DATA_LOSS):
        call.finish()


def test_a_chunk_over_the_limit_is_refused(server):
    arrays = attending.small(tokens=9000)
    call = attending.Call(server.prefill)
    call.admit(attending.header(*arrays))
    for chunk in attending.chunks(arrays, size=8 << 20):
        call.send(chunk)
    with refused({DATA_LOSS, INVALID, grpc.StatusCode.RESOURCE_EXHAUSTED}):
        call.finish()
    attending.serves_a_good_request(server)


def test_an_empty_stream_is_invalid(server):
    call = attending.Call(server.prefill)
    call.half_close()
    with refused(INVALID):
        call.receive()


@pytest.mark.parametrize("part", ["chunk", "nothing"])
def test_the_first_message_must_be_a_header(server, qkv, part):
    call = attending.Call(server.prefill)
    call.send(attending.chunks(qkv)[0] if part == "chunk" else pb.AttendRequest())
    with refused({INVALID, DATA_LOSS}):
        call.receive()
    call.half_close()


def test_a_second_header_is_refused(server, qkv):
    call = attending.Call(server.prefill)
    call.admit(attending.header(*qkv))
    call.send(attending.header(*qkv))
    with refused({INVALID, DATA_LOSS}):
        call.receive()
    call.half_close()


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


# Messages that are no AttendRequest, in the place of the first chunk.
GARBAGE = {
    "random": random.Random(7).randbytes(1000),
    "truncated varint": b"\x12\xff",
    "endless varint": b"\x12" + b"\xff" * 20,
    "chunk longer than the message": b"\x12" + varint(1000) + b"\x08\x00",
    "length 2^64-1": b"\x12" + b"\xff" * 9 + b"\x01",
    "data longer than the chunk": b"\x12\x04\x7a" + varint(500) + b"x",
    "group": b"\x13\x08\x01\x14",
    "wire type 7": b"\x17\x00",
    "field 0": b"\x02\x01x",
    "truncated fixed32": b"\x12\x03\x25\x00\x00",
}


def raw_attend(server, messages):
    method = server.channel.stream_stream("/prefilld.v1.PrefillService/Attend",
                                          request_serializer=bytes, response_deserializer=bytes)
    return method(iter(messages), timeout=30)


@pytest.mark.parametrize("case", GARBAGE)
@pytest.mark.parametrize("place", ["header", "chunk"])
def test_garbage_ends_the_call_and_nothing_else(server, qkv, case, place):
    head = pb.AttendRequest(header=attending.header(*qkv)).SerializeToString()
    with refused({INVALID, DATA_LOSS, grpc.StatusCode.INTERNAL}):
        for _ in raw_attend(server, [head, GARBAGE[case]] if place == "chunk" else [GARBAGE[case]]):
            pass
    attending.serves_a_good_request(server)


def test_a_chunk_is_read_in_any_field_order_with_unknown_fields(server, qkv):
    """What another protobuf library may legally write: payload first, then the rest."""
    def message(chunk):
        body = b"\x7a" + varint(len(chunk.data)) + chunk.data
        body += b"\xa2\x06\x03abc"  # field 100, unknown
        body += b"\x25" + struct.pack("<I", chunk.crc32c)
        body += b"\x18" + varint(chunk.byte_offset) + b"\x08" + varint(chunk.tensor_index)
        body += b"\x28" + varint(chunk.last)
        return b"\x12" + varint(len(body)) + body

    expected, _ = attending.attend(server.prefill, *qkv)
    head = pb.AttendRequest(header=attending.header(*qkv)).SerializeToString()
    chunks = attending.chunks(qkv, size=1 << 16)
    replies = [pb.AttendResponse.FromString(r)
               for r in raw_attend(server, [head, *map(message, chunks)])]
    data = b"".join(r.chunk.data for r in replies if r.WhichOneof("part") == "chunk")
    assert data == expected["o"].tobytes()
