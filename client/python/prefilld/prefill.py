"""One Prefill call: the events of the computation, and the KV cache it leases."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np

from .errors import Cancellation, PrefilldError, Retry
from .pull import KvPull, Layer, Lease
from .sparsity import SparsityReport, Summary
from .tensors import data_loss
from .transport import transport_name
from .v1 import model_service_pb2, prefill_service_pb2, prefill_service_pb2_grpc, tensor_pb2

Progress = Callable[[float, str], None]


class Prefill:
    """A prompt at work. Made by PrefillClient.prefill, once the server has admitted it.

    Iterate it for the Layers, as they are computed, or hand `lease` to another process, after
    `detach`. As a context manager it releases the lease at the end: CONSUMED when every layer was
    pulled, else ABANDONED, which also stops the computation. Methods may be called from any
    thread; one thread iterates.
    """

    def __init__(self, stub: prefill_service_pb2_grpc.PrefillServiceStub,
                 request: prefill_service_pb2.PrefillRequest, model: model_service_pb2.Model,
                 retry: Retry, progress: Progress, pull: Callable[[Lease, str], KvPull],
                 falls_back: Callable[[PrefilldError], bool],
                 renew: Callable[[Lease], Lease], release: Callable[[Lease, bool], None],
                 cancellation: Cancellation | None = None):
        """pull: of a lease, whose cache can be pulled by this transport and by grpc. falls_back:
        after a failure before the admission; True: `request` now asks for something else."""
        self.request_id = request.request_id
        self.model = model
        self._stub = stub
        self._request = request
        self._retry = retry
        self._progress = progress
        self._open_pull = pull
        self._falls_back = falls_back
        self._renew = renew
        self._release = release

        self._changed = threading.Condition()  # guards what follows
        self._lease: Lease | None = None
        self._admitted_transport = "grpc"  # of the cache
        self._buffers: list[tensor_pb2.BufferRef] = []  # of its memory, where that may be told now
        self._ready: dict[int, prefill_service_pb2.LayerReady] = {}
        self._logits: np.ndarray | None = None
        self._summary: Summary | None = None
        self._error: PrefilldError | None = None
        self._call: Any = None  # grpc's own, which has no public type
        self._pull: KvPull | None = None
        self._iterated = False
        self._owned = True  # the lease is ours to release

        if cancellation is not None:
            cancellation.add(self.cancel)
        threading.Thread(target=self._follow, name="prefilld-prefill", daemon=True).start()
        try:
            self._wait_for(lambda: self._lease is not None)
            pull = self._open_pull(self.lease, self._admitted_transport)
            if self._buffers:
                pull.open_ahead(self._buffers[0])
            with self._changed:
                self._pull = pull
        except BaseException:  # KeyboardInterrupt included: nobody else can stop the work
            self.cancel()
            raise

    @property
    def lease(self) -> Lease:
        """The lease as it was granted. It can be pulled from the start."""
        assert self._lease is not None  # the constructor waits for it
        return self._lease

    @property
    def transport(self) -> str:
        """How the layers come here: "grpc", "posix_shm" or "cuda_ipc"; see PrefillClient."""
        assert self._pull is not None  # the constructor made it
        return self._pull.transport

    @property
    def summary(self) -> Summary:
        """Waits for the end of the computation."""
        self._wait_for(lambda: self._summary is not None)
        assert self._summary is not None
        return dataclasses.replace(self._summary, transport=self.transport)

    @property
    def report(self) -> SparsityReport:
        """What was computed, [layers, heads]. Waits for the end of the computation."""
        return self.summary.report

    @property
    def logits(self) -> np.ndarray:
        """[vocab_size] float32 of the last prompt position. Waits for the end of the computation.
        ValueError when return_logits was not asked for."""
        if not self._request.return_logits:
            raise ValueError("logits were not asked for: prefill(..., return_logits=True)")
        self._wait_for(lambda: self._summary is not None)
        if self._logits is None:
            raise data_loss("the server sent no logits")
        return self._logits

    def __iter__(self) -> Iterator[Layer]:
        with self._changed:
            if self._iterated or self._pull is None:
                raise RuntimeError("a Prefill can be iterated once")
            self._iterated = True
        try:
            for layer in self._pull:
                yield self._with_density(layer)
        except PrefilldError as error:
            # The computation's own error says more than what the pull saw of it.
            if self._error is not None and self._error is not error:
                raise self._error from error
            raise

    def renew(self) -> Lease:
        """Starts the lease's TTL anew. Not needed while layers are pulled."""
        return self._renew(self.lease)

    def release(self, consumed: bool = True) -> None:
        """Ends the lease. consumed=False also stops a computation that still runs."""
        with self._changed:
            owned, self._owned = self._owned, False
        if owned:
            self._release(self.lease, consumed)
        if not consumed:
            self.cancel()

    def detach(self) -> Lease:
        """Leaves the lease to somebody else: it is no longer released here, and the computation
        goes on when this process closes its connection, for the lease's TTL or as long as somebody
        pulls."""
        with self._changed:
            self._owned = False
            computing = self._summary is None
        if computing:
            try:
                self._renew(self.lease)
            except PrefilldError as error:
                if error.code is not grpc.StatusCode.NOT_FOUND:  # else somebody has released it
                    raise
        return self.lease

    def __enter__(self) -> Prefill:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self._owned:
            return
        consumed = kind is None and self._pull is not None and self._pull.complete
        try:
            self.release(consumed)
        except PrefilldError as error:
            self.cancel()
            gone = not consumed and error.code == grpc.StatusCode.NOT_FOUND  # as was wanted
            if kind is None and not gone:  # else the first error is the one to see
                raise

    def cancel(self) -> None:
        """Ends the iteration, and every wait, with CANCELLED, without a word to the server: the end
        of the `with` block abandons the lease."""
        self._retry.cancel()
        with self._changed:
            call, pull = self._call, self._pull
        if call is not None:
            call.cancel()
        if pull is not None:
            pull.cancel()

    def _with_density(self, layer: Layer) -> Layer:
        """Bytes and events travel on two streams: the event may be a moment behind."""
        self._wait_for(lambda: layer.index in self._ready)
        ready = self._ready[layer.index]
        return dataclasses.replace(
            layer, density=ready.density, captured_mass=ready.captured_mass or None)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """The stream of events has a deadline, so this ends."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._error is not None)
            if not condition():
                assert self._error is not None
                raise self._error

    def _follow(self) -> None:
        """The thread of the event stream. A stream that breaks is opened again with the same
        request_id, which attaches to the same work."""
        while True:
            try:
                if self._retry.cancelled:
                    raise PrefilldError(grpc.StatusCode.CANCELLED, "the call was cancelled")
                call = self._stub.Prefill(self._request, timeout=self._retry.remaining())
                with self._changed:
                    self._call = call
                if self._retry.cancelled:  # meanwhile
                    call.cancel()
                for event in call:
                    self._on_event(event)
                    self._retry.progressed()
                if self._summary is None:
                    raise data_loss("the stream of Prefill ended without a summary")
                return
            except grpc.RpcError as error:
                failure = PrefilldError.from_rpc(error)
            except PrefilldError as error:
                failure = error
            except Exception as error:  # this thread must not end without a word to those who wait
                failure = PrefilldError(grpc.StatusCode.INTERNAL, repr(error))
            if self._lease is None and self._falls_back(failure):
                continue
            try:
                self._retry.after(failure)
            except PrefilldError as last:
                with self._changed:
                    self._error = last
                    self._changed.notify_all()
                    pull = self._pull
                if pull is not None:
                    pull.cancel()
                return

    def _on_event(self, event: prefill_service_pb2.PrefillEvent) -> None:
        kind = event.WhichOneof("event")
        with self._changed:
            if kind == "admission":
                self._on_admission(Lease.from_message(event.admission.lease))
                self._admitted_transport = transport_name(event.admission.transport)
                self._buffers = list(event.admission.buffers)
            elif kind == "layer_ready":
                self._ready[event.layer_ready.layer] = event.layer_ready
            elif kind == "logits":
                self._logits = np.frombuffer(event.logits.f32, "<f4")
            elif kind == "summary":
                self._summary = Summary.from_message(event.summary, self._admitted_transport)
            self._changed.notify_all()
        if kind == "admission":
            self._progress(0.0, "queue")
        elif kind == "layer_ready":
            self._progress(len(self._ready) / self.lease.layers, "compute")

    def _on_admission(self, lease: Lease) -> None:
        if self._lease is None:
            self._lease = lease
        elif (lease.name, lease.generation, lease.boot_id) != (
                self._lease.name, self._lease.generation, self._lease.boot_id):
            raise PrefilldError(grpc.StatusCode.ABORTED, "the server lost the work of request "
                                f"'{self._request.request_id}' and its cache")
