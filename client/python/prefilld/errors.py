"""The one exception of this package, and when to try again."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable

import grpc
from google.rpc import error_details_pb2, status_pb2


class PrefilldError(Exception):
    """A call that did not succeed.

    code: the gRPC status code, grpc.StatusCode.DATA_LOSS etc. Errors found on this side of the
        wire (a chunk with a bad checksum, an argument that cannot be sent) use the same codes.
    violations: (field, description) pairs of an INVALID_ARGUMENT.
    retry_delay: seconds after which the server expects a retry to help, or None.
    reason: the server's machine-readable reason, e.g. "DEADLINE_INFEASIBLE"; of a transport that
        was tried and cannot be used, the name of a TransportRefusal.Reason; or None.
    """

    def __init__(self, code: grpc.StatusCode, message: str, *,
                 violations: tuple[tuple[str, str], ...] = (),
                 retry_delay: float | None = None, reason: str | None = None):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_delay = retry_delay
        self.reason = reason

    def __reduce__(self) -> tuple:
        """Errors cross processes (multiprocessing, concurrent.futures) and are copied."""
        return _rebuilt, (type(self), self.__dict__, *self.args)

    @property
    def retryable(self) -> bool:
        """UNAVAILABLE, or RESOURCE_EXHAUSTED with a retry_delay: nothing else."""
        return self.code is grpc.StatusCode.UNAVAILABLE or (
            self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_delay is not None)

    @classmethod
    def from_rpc(cls, error: grpc.RpcError) -> PrefilldError:
        """From what grpc raised, with the details of google.rpc.Status where they came along."""
        violations: tuple[tuple[str, str], ...] = ()
        retry_delay = reason = None
        for detail in _details(error):
            if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest()
                detail.Unpack(bad)
                violations = tuple((v.field, v.description) for v in bad.field_violations)
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                retry_delay = max(0.0, retry.retry_delay.ToTimedelta().total_seconds())
            elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                detail.Unpack(info)
                reason = info.reason
        return cls(error.code(), error.details() or "", violations=violations,
                   retry_delay=retry_delay, reason=reason)


def _rebuilt(kind: type[PrefilldError], state: dict, *args: str) -> PrefilldError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def _details(error: grpc.RpcError):
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return status_pb2.Status.FromString(value).details
    return ()


def refused(reason: str, message: str) -> PrefilldError:
    """A transport cannot be used from here. reason: the name of a TransportRefusal.Reason."""
    return PrefilldError(grpc.StatusCode.FAILED_PRECONDITION, message, reason=reason)


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter. A server's retry_delay is honoured instead, where given.

    attempts: how often a call is tried at most without any progress in between, >= 1.
    initial_backoff, max_backoff: seconds.
    """

    attempts: int = 6
    initial_backoff: float = 0.1
    max_backoff: float = 5.0


class Cancellation:
    """Ends calls that were given it, from any thread. Once cancelled it stays so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Does not block."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def add(self, callback: Callable[[], None]) -> None:
        """Called once, when it is cancelled; now if it is."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        callback()


class Retry:
    """The attempts of one call: its deadline and how long to wait between them. One thread uses
    `after`; `cancel` may come from any."""

    def __init__(self, policy: RetryPolicy, timeout: float,
                 explain: Callable[[], PrefilldError | None] = lambda: None):
        """explain: why there is no connection, where that will stay so; asked once."""
        self._policy = policy
        self._explain = explain
        self._deadline = time.monotonic() + timeout
        self._failures = 0
        self._cancelled = threading.Event()

    def remaining(self) -> float:
        """Seconds left, >= 0: the `timeout` of the next attempt."""
        return max(0.0, self._deadline - time.monotonic())

    def progressed(self) -> None:
        """Something new arrived: the count of attempts starts anew."""
        self._failures = 0

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ends a wait in `after`, and every later one, with the error that caused it."""
        self._cancelled.set()

    def after(self, error: PrefilldError, *, resumable: bool = False) -> None:
        """Waits until the next attempt may start, or raises `error` when there is none: it is not
        retryable, attempts are used up, or the wait would outlast the deadline. `resumable` errors
        (a broken stream that can continue) count as retryable."""
        self._failures += 1
        if error.code is grpc.StatusCode.UNAVAILABLE:
            explain, self._explain = self._explain, lambda: None
            explanation = explain()
            if explanation is not None:
                raise explanation from error
        if not (error.retryable or resumable) or self._failures >= self._policy.attempts:
            raise error
        if error.retry_delay is not None:
            delay = error.retry_delay * random.uniform(1.0, 1.5)
        else:
            backoff = self._policy.initial_backoff * 2.0 ** (self._failures - 1)
            delay = min(backoff, self._policy.max_backoff) * random.uniform(0.5, 1.0)
        if delay >= self.remaining() or self._cancelled.wait(delay):
            raise error
