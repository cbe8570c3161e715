"""The posix_shm transport by hand: memory is asked for, mapped and written as any client may."""

import mmap
import os
import pathlib
import socket
import weakref

import numpy as np

from e2e import attending, prefilling
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import prefill_service_pb2 as pb

SHM = kv.TRANSPORT_POSIX_SHM


def domain():
    """Of this process, as a client makes it."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"memfd:{boot}"


def segments(server):
    """How many are in use, beside the one that is there to be tried."""
    return int(server.metric("prefilld_descriptors", kind="segments", state="used")) - 1


def receive(server, name):
    """(connection, descriptor or None, bytes, text) of what the server's socket says to a name."""
    path = server.handoff.Negotiate(kv.NegotiateRequest(), timeout=10).memory_socket
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect("\0" + path[1:] if path[0] == "@" else path)
    connection.send(name.encode())
    data, descriptors, _, _ = socket.recv_fds(connection, 1024, 4)
    assert len(descriptors) <= 1
    return (connection, descriptors[0] if descriptors else None,
            int.from_bytes(data[:8], "little"), data[8:].decode())


def open_segment(server, name, writable=False):
    """The connection is closed when the mapping goes."""
    connection, descriptor, size, text = receive(server, name)
    if descriptor is None:
        raise FileNotFoundError(text)
    mapped = mmap.mmap(descriptor, size,
                       access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    os.close(descriptor)
    weakref.finalize(mapped, connection.close)
    return mapped


def view(mapped, buffer):
    """A uint8 array over the whole buffer; the mapping lives as long as it."""
    assert buffer.byte_offset % 64 == 0
    assert buffer.byte_offset + buffer.byte_length <= len(mapped)
    return np.frombuffer(mapped, np.uint8, buffer.byte_length, buffer.byte_offset)


def open_buffer(server, buffer):
    return view(open_segment(server, buffer.name), buffer)


def pull(server, lease, /, first_layer=0, tensor=0, **fields):
    """{layer: [k, v]} of a whole pull, as uint8 arrays over the mappings."""
    data, layer = {}, first_layer
    for chunk in prefilling.open_pull(server, lease, transport=SHM, first_layer=first_layer,
                                      resume_tensor_index=tensor, **fields):
        assert (chunk.layer, chunk.tensor_index) == (layer, tensor)
        assert chunk.last and chunk.byte_offset == 0 and not chunk.data and not chunk.crc32c
        data.setdefault(layer, [None, None])[tensor] = open_buffer(server, chunk.buffer)
        layer, tensor = (layer, 1) if tensor == 0 else (layer + 1, 0)
    return data


def plain(data):
    """What prefilling.pull gives, of what `pull` gives."""
    return {layer: [bytearray() if x is None else bytearray(x) for x in parts]
            for layer, parts in data.items()}


def destination(message, transport):
    message.destination.transport = transport
    return message


def start(server, token_ids, transport=SHM, timeout=60, **fields):
    """A Prefill that has been admitted, with this destination.transport."""
    message = destination(prefilling.request(token_ids, **fields), transport)
    call = prefilling.Prefill(server.prefill, message, timeout)
    call.admit()
    return call


class Attend(attending.Call):
    """One Attend stream over posix_shm. Its memory is mapped once: its name goes with the call."""

    def __init__(self, server):
        super().__init__(server.prefill)
        self.server = server

    def admit(self, head):
        head.transport = SHM
        self.admission = super().admit(head)
        assert self.admission.transport == SHM
        assert len(self.admission.buffers) == 3
        self.name = self.admission.buffers[0].name
        self.mapped = open_segment(self.server, self.name, writable=True)
        return self.admission

    def view(self, buffer):
        assert buffer.name == self.name
        return view(self.mapped, buffer)

    def write(self, arrays, dtype="F32"):
        for buffer, x in zip(self.admission.buffers, arrays, strict=True):
            data = attending.encode(x, dtype)
            assert buffer.byte_length == len(data)
            self.view(buffer)[:] = np.frombuffer(data, np.uint8)

    def written(self):
        self.send(pb.AttendRequest(written=pb.TensorsWritten()))

    def finish(self):
        """(outputs by name, summary). Checks the order; outputs are copies."""
        outputs, summary = {}, None
        for reply in self.stream:
            part = reply.WhichOneof("part")
            if part == "outputs":
                for spec, buffer in zip(reply.outputs.tensors, reply.outputs.buffers, strict=True):
                    outputs[spec.name] = attending.decode(spec, self.view(buffer).tobytes())
            else:
                assert part == "summary" and outputs
                summary = reply.summary
        self.half_close()
        return outputs, summary


def attend(server, q, k, v, dtype="F32", **fields):
    """A whole well-behaved call."""
    call = Attend(server)
    call.admit(attending.header(q, k, v, dtype, **fields))
    call.write((q, k, v), dtype)
    call.written()
    return call.finish()
