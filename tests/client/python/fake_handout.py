"""Memory of a fake prefilld: files without a name, handed out by descriptor over a real Unix
socket. Those of a GPU are mapped by a fake driver (fake_torch)."""

import fcntl
import itertools
import mmap
import os
import socket
import threading

import numpy as np
from prefilld.v1 import tensor_pb2

PAGE = 4096
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2


class Memory:
    """Places for tensors, one after the other."""

    numbers = itertools.count()

    def __init__(self, sizes, gpu=""):
        """gpu: whose it is, by UUID; default: the host's."""
        self.gpu = gpu
        self.name = f"{'cuda' if gpu else 'shm'}-{os.getpid()}-{next(self.numbers)}"
        self.offsets = [256 * sum(-(-size // 256) for size in sizes[:i]) for i in range(len(sizes))]
        self.sizes = list(sizes)
        self.size = -(-(self.offsets[-1] + sizes[-1]) // PAGE) * PAGE
        self.file = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, self.size)
        if not gpu:
            fcntl.fcntl(self.file, F_ADD_SEALS, F_SEAL_SHRINK)
        self.array = np.frombuffer(mmap.mmap(self.file, self.size), np.uint8)

    def __del__(self):
        os.close(self.file)

    def place(self, index):
        return self.array[self.offsets[index]:self.offsets[index] + self.sizes[index]]

    def put(self, index, array):
        self.place(index)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def reference(self, index):
        return tensor_pb2.BufferRef(name=self.name, device_uuid=self.gpu,
                                    byte_offset=self.offsets[index], byte_length=self.sizes[index])


def send(connection, size, *descriptors, text=""):
    """An answer of the contract's form, or one that is not quite of it."""
    socket.send_fds(connection, [size.to_bytes(8, "little") + text.encode()], list(descriptors))


class Handout:
    """The socket and its thread. `answer` may replace what comes to a name: a function of
    (connection, name)."""

    numbers = itertools.count()

    def __init__(self, path=None):
        self.path = path or f"@prefilld-fake-{os.getpid()}-{next(self.numbers)}"
        self.asked = []      # names
        self.answer = self.hand_out
        self._open = []      # (name, connection)
        self._changed = threading.Condition()
        self.memories = {"probe": Memory([PAGE], "GPU"), "probe_shm": Memory([PAGE])}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + self.path[1:] if self.path[0] == "@" else self.path)
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def share(self, memory):
        self.memories[memory.name] = memory
        return memory

    def end(self, memory):
        """Its name: whoever has it keeps it."""
        del self.memories[memory.name]

    def hand_out(self, connection, name):
        memory = self.memories.get(name)
        if memory is None:
            send(connection, 0, text=f"no memory {name}")
        else:
            send(connection, memory.size, memory.file)

    def in_use(self):
        with self._changed:
            return [name for name, _ in self._open]

    def idle(self, timeout=5):
        """Waits until nobody has anything in use; whether that came true."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(None)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            name = connection.recv(4096).decode()
        except OSError:
            name = ""
        entry = (name, connection)
        with self._changed:
            self.asked.append(name)
            self._open.append(entry)
        try:
            self.answer(connection, name)
            connection.recv(1)  # until it is closed there
        except OSError:
            pass
        finally:
            connection.close()
            with self._changed:
                self._open.remove(entry)
                self._changed.notify_all()
