"""A TCP proxy before the server that breaks connections."""

import contextlib
import socket
import threading


class Proxy:
    """Passes bytes on, both ways. `target`: what to connect to instead of the server."""

    def __init__(self, target):
        self._server = target.rsplit(":", 1)[0], int(target.rsplit(":", 1)[1])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._sockets = []
        self._closed = False
        self._deaf = threading.Event()
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closed = True
        self._listener.close()
        self.cut()

    def cut(self):
        """Breaks every connection, at both ends."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def half_open(self):
        """The clients' ends of the connections there are break; the server hears nothing of it."""
        with self._lock:
            clients, self._sockets = self._sockets[::2], self._sockets[1::2]
        self._deaf.set()
        for end in clients:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            self._deaf = threading.Event()
            with self._lock:
                self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink, self._deaf),
                                 daemon=True).start()

    @staticmethod
    def _pass(source, sink, deaf):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        if deaf.is_set():
            return
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
