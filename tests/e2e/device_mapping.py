"""The cuda_ipc transport by hand, for caches: without torch, by the client's socket and driver."""

import contextlib
import os

from e2e import mapping, prefilling
from prefilld import cuda_driver, cuda_ipc, memory_socket
from prefilld.v1 import kv_handoff_service_pb2 as kv

IPC = kv.TRANSPORT_CUDA_IPC


class Opened:
    """Device memory of the server's, open until `close`."""

    def __init__(self, socket, name):
        self.driver = cuda_driver.driver()
        self.connection, descriptor, size = memory_socket.receive(socket, name)
        try:
            self.memory = self.driver.map(descriptor, size, 0)
        except BaseException:
            self.connection.close()
            raise
        finally:
            os.close(descriptor)

    def read(self, buffer):
        assert buffer.byte_offset % 64 == 0
        assert buffer.byte_offset + buffer.byte_length <= self.memory.size
        return self.driver.read(self.memory, buffer.byte_offset, buffer.byte_length)

    def close(self):
        self.driver.unmap(self.memory)
        self.connection.close()


def negotiate(server, uuids=(), model="tiny", **fields):
    return server.handoff.Negotiate(kv.NegotiateRequest(
        model=model, cuda_ipc_domain=cuda_ipc.domain(), device_uuids=uuids, **fields), timeout=10)


def start(server, token_ids, **fields):
    """A Prefill that has been admitted, whose cache lies on the GPU."""
    call = mapping.start(server, token_ids, transport=IPC, **fields)
    assert call.admission.transport == IPC
    return call


def buffers(server, lease):
    """{layer: [k, v]}, all in one piece of memory; and its name."""
    found = {}
    for chunk in prefilling.open_pull(server, lease, transport=IPC):
        assert chunk.last and chunk.byte_offset == 0 and not chunk.data and not chunk.crc32c
        found.setdefault(chunk.layer, []).append(chunk.buffer)
        assert len(found[chunk.layer]) == chunk.tensor_index + 1
    (name,) = {buffer.name for parts in found.values() for buffer in parts}
    return found, name


@contextlib.contextmanager
def opened(server, name):
    memory = Opened(negotiate(server).memory_socket, name)
    try:
        yield memory
    finally:
        memory.close()


def pull(server, lease):
    """As prefilling.pull: {layer: [k, v]} of bytes."""
    found, name = buffers(server, lease)
    with opened(server, name) as memory:
        return {layer: [bytearray(memory.read(buffer)) for buffer in parts]
                for layer, parts in found.items()}
