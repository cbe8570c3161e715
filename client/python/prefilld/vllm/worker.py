"""The worker's half: loads KV into vLLM's blocks on threads of its own, layer by layer as prefilld
has them, while the engine decodes other requests."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from ..client import PrefillClient
from ..errors import Cancellation, PrefilldError, RetryPolicy
from ..prefill import Prefill
from ..pull import KvPull, Lease
from ..tensors import data_loss
from .kv_writer import Slots, Write, as_tensor, cpu_writer, strided_writer
from .metrics import LoadStats
from .model_check import ModelCheck
from .scheduler import LoadOrder, Orders, only_model
from .settings import Plan, Settings, refused

logger = init_logger("vllm.prefilld")

# A server that is down is given up quickly: vLLM can compute the prompt itself.
_RETRY = RetryPolicy(attempts=3, initial_backoff=0.1, max_backoff=1.0)
# Between looks of an engine that only waits; a new request waits as long at most.
_IDLE_WAIT_S = 0.02
_ERRANDS = 4  # calls about leases at a time: a server that hangs does not hold up the others
_CLIENTS_MAX = 64    # connections; idle ones are closed beyond that
_RENEWAL_S = 5.0  # of leases that wait for blocks; short beside any sensible ttl


@dataclasses.dataclass
class _Load:
    order: LoadOrder
    cancellation: Cancellation = dataclasses.field(default_factory=Cancellation)
    future: Future[None] | None = None  # of its turn

    def check(self) -> None:
        if self.cancellation.cancelled:
            raise PrefilldError(grpc.StatusCode.CANCELLED, "the request was aborted")


class WorkerHalf:
    """vLLM's worker thread calls it; nothing here waits for the network on that thread."""

    def __init__(self, settings: Settings, check: ModelCheck, config: VllmConfig):
        self._settings = settings
        self._check = check
        self._block_size = config.cache_config.block_size
        self._layers = config.compilation_config.static_forward_context
        self._writers: list[Write] = []
        self._device: torch.device | None = None  # of the KV cache
        self._threads = ThreadPoolExecutor(settings.max_loads, thread_name_prefix="prefilld-load")
        self._errands = ThreadPoolExecutor(_ERRANDS, thread_name_prefix="prefilld-lease")
        self._lock = threading.Lock()  # guards what follows
        self._load_ended = threading.Condition(self._lock)
        self._clients: dict[str, PrefillClient] = {}
        self._loads: dict[str, _Load] = {}
        self._ended: set[str] = set()         # since the last finished()
        self._ended_blocks: set[int] = set()  # of failed loads among them
        self._failed_blocks: set[int] = set()  # to be told with what finished() told last
        self._stats = LoadStats()
        self._held: dict[str, Plan] = {}      # by lease name
        self._closed = threading.Event()
        self._renewer: threading.Thread | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """kv_caches: by layer name. ValueError for a form of cache that cannot be written."""
        names = sorted(kv_caches, key=extract_layer_index)
        self._device = kv_caches[names[0]].device
        self._writers = [self._writer(name, kv_caches[name]) for name in names]

    def _writer(self, name: str, cache: torch.Tensor) -> Write:
        layer = self._layers[name]
        if cache.device.type == "cpu":
            return cpu_writer(cache, layer)
        return strided_writer(cache, layer.num_kv_heads, layer.head_size)

    def take(self, orders: Orders) -> None:
        for plan in orders.hold:
            self._hold(plan)
        for order in orders.loads:
            load = _Load(order)
            with self._lock:
                self._loads[order.request_id] = load
                self._stats.running(len(self._loads))
            load.future = self._threads.submit(self._run, load)
        for request_id in orders.cancel:
            with self._lock:
                load = self._loads.get(request_id)
            if load is not None:
                self._cancel(load)
        for plan in orders.abandon:
            self._errands.submit(self._abandon, plan)

    def finished(self, idle: bool) -> set[str]:
        """Requests whose loads have ended since the last call, for better or worse. idle: the
        engine has nothing to compute, and would ask again at once: waits a moment for a load to
        end."""
        with self._lock:
            if idle and self._loads and not self._ended:
                self._load_ended.wait(_IDLE_WAIT_S)
            ended, self._ended = self._ended, set()
            self._failed_blocks |= self._ended_blocks
            self._ended_blocks = set()
        return ended

    def failed_blocks(self) -> set[int]:
        """Those of the loads that finished() told of and that have failed."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def stats(self) -> LoadStats | None:
        with self._lock:
            if self._stats.is_empty():
                return None
            stats, self._stats = self._stats, LoadStats()
        return stats

    def close(self) -> None:
        """Ends running loads; their leases are abandoned."""
        self._closed.set()
        with self._lock:
            loads, held = list(self._loads.values()), list(self._held.values())
        for load in loads:
            self._cancel(load)
        for plan in held:
            self._errands.submit(self._abandon, plan)
        self._errands.shutdown()
        self._threads.shutdown(cancel_futures=True)
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()

    def _cancel(self, load: _Load) -> None:
        """Waits for nothing. One that waits for its turn has ended at once, and its blocks are
        free; of one that runs its own thread gives the lease back."""
        load.cancellation.cancel()
        if load.future is not None and load.future.cancel():
            if load.order.plan.lease is not None:
                self._errands.submit(self._abandon, load.order.plan)
            self._end(load, PrefilldError(grpc.StatusCode.CANCELLED, "the request was aborted"), 0)

    # --- one load, on a thread of its own ---

    def _run(self, load: _Load) -> None:
        order, begin = load.order, time.monotonic()
        error: PrefilldError | None = None
        transport = ""
        try:
            transport = self._load(load, begin + self._settings.timeout_s)
        except PrefilldError as failure:
            error = failure
        except Exception as failure:  # a bug must fail this request, not hang it
            logger.exception("prefilld: request %s", order.request_id)
            error = PrefilldError(grpc.StatusCode.INTERNAL, repr(failure))
        seconds = time.monotonic() - begin
        tokens = order.end - order.begin
        if error is None:
            logger.info("prefilld: request %s: %d tokens from %s over %s in %.3f s",
                        order.request_id, tokens, order.plan.target, transport, seconds)
        elif not load.cancellation.cancelled:
            logger.error("prefilld: request %s: loading %d tokens from %s failed: %s",
                         order.request_id, tokens, order.plan.target or "prefilld", error)
        self._end(load, error, seconds)

    def _end(self, load: _Load, error: PrefilldError | None, seconds: float) -> None:
        order, tokens = load.order, load.order.end - load.order.begin
        with self._lock:
            del self._loads[order.request_id]
            self._ended.add(order.request_id)
            if error is None:
                self._stats.loaded(seconds, tokens, tokens * self._bytes_per_token())
            elif load.cancellation.cancelled:
                self._stats.aborted()
            else:
                self._stats.failed(order.request_id, error)
            if error is not None:
                self._ended_blocks.update(order.block_ids[order.begin // self._block_size:])
            self._stats.running(len(self._loads))
            self._load_ended.notify()

    def _bytes_per_token(self) -> int:
        layer = next(iter(self._layers.values()))
        width = {"f32": 4, "f16": 2, "bf16": 2}[self._check.dtype]
        return 2 * len(self._writers) * layer.num_kv_heads * layer.head_size * width

    def _load(self, load: _Load, deadline: float) -> str:
        """Fills the blocks; returns the transport."""
        plan = load.order.plan
        if plan.error:
            if plan.lease is not None:
                self._errands.submit(self._abandon, plan)
            raise PrefilldError(grpc.StatusCode.INVALID_ARGUMENT, plan.error)
        if plan.lease is None:
            load.check()  # nothing is there yet that would have to be given back
        client = self._client(plan.target)
        try:
            with self._source(client, load, deadline) as source:
                order = load.order
                slots = Slots(order.block_ids, self._block_size, order.begin,
                              order.end - order.begin)
                layers = self._write(source, load, slots)
                if layers != len(self._writers):
                    raise data_loss(f"{layers} layers came, this engine has {len(self._writers)}")
                if self._device is not None and self._device.type == "cuda":
                    # The blocks are filled, and nothing reads what is released as consumed.
                    torch.cuda.current_stream(self._device).synchronize()
                return source.transport
        except PrefilldError:
            load.check()  # the abort is the reason, not what it made of the calls
            raise

    def _write(self, source: Prefill | KvPull, load: _Load, slots: Slots) -> int:
        """Returns the number of layers. No view of them is left here when they are released."""
        order, layers = load.order, 0
        for layer in source:
            load.check()
            k, v = (as_tensor(array)[:, order.begin:order.end] for array in (layer.k, layer.v))
            self._writers[layer.index](k, v, slots)
            layers += 1
        return layers

    @contextlib.contextmanager
    def _source(self, client: PrefillClient, load: _Load,
                deadline: float) -> Iterator[Prefill | KvPull]:
        """The layers: of a lease that was handed over, or of a Prefill of our own. At the end the
        lease is released, consumed or abandoned."""
        plan, order = load.order.plan, load.order
        if plan.lease is None:
            model = self._model(client, plan)
            with client.prefill(model.name, order.prompt, kv_dtype=self._check.dtype, widen=False,
                                timeout=_left(deadline), device=self._device,
                                cancellation=load.cancellation, **plan.policy) as prompt:
                load.check()
                yield prompt
                with contextlib.suppress(PrefilldError):  # everything is here: then the ttl ends it
                    prompt.release(consumed=True)
            return
        consumed = False
        try:
            load.check()
            model = self._model(client, plan)
            if plan.lease.layers != model.layers:
                raise refused(f"the lease has {plan.lease.layers} layers, the model {model.layers}")
            pull = client.pull(plan.lease, model.name, kv_dtype=self._check.dtype, widen=False,
                               timeout=_left(deadline), device=self._device)
            load.cancellation.add(pull.cancel)
            self._let_go(plan.lease)  # the pull renews it from here on
            yield pull
            consumed = True
        finally:
            self._let_go(plan.lease)
            with contextlib.suppress(PrefilldError):
                client.release(plan.lease, consumed=consumed)

    def _model(self, client: PrefillClient, plan: Plan) -> Any:
        """The model there, which must be the one here."""
        if plan.fingerprint:
            found = [m for m in client.models() if m.fingerprint == plan.fingerprint]
            if not found:
                raise refused(f"the lease's fingerprint {plan.fingerprint} is of no model at "
                              f"{plan.target}")
            model = found[0]
        elif plan.model:
            model = client.model(plan.model)
        else:
            try:
                model = only_model(client.models(), plan.target)
            except ValueError as error:
                raise refused(str(error)) from None
        self._check.check(model)
        return model

    def _client(self, target: str) -> PrefillClient:
        with self._lock:
            if target not in self._clients:
                if len(self._clients) >= _CLIENTS_MAX:
                    self._close_idle_clients()
                self._clients[target] = PrefillClient(
                    target, credentials=self._settings.credentials, retry=_RETRY,
                    transport=self._settings.transport)
            return self._clients[target]

    def _close_idle_clients(self) -> None:
        busy = {load.order.plan.target for load in self._loads.values()}
        busy |= {plan.target for plan in self._held.values()}
        for target in set(self._clients) - busy:
            self._clients.pop(target).close()

    # --- leases that wait ---

    def _hold(self, plan: Plan) -> None:
        if plan.error or plan.lease is None:
            return
        with self._lock:
            self._held[plan.lease.name] = plan
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew, name="prefilld-renew",
                                                 daemon=True)
                self._renewer.start()

    def _let_go(self, lease: Lease) -> None:
        with self._lock:
            self._held.pop(lease.name, None)

    def _renew(self) -> None:
        while not self._closed.wait(_RENEWAL_S):
            with self._lock:
                held = list(self._held.values())
            for plan in held:
                if not self._closed.is_set():
                    self._errands.submit(self._renew_one, plan)

    def _renew_one(self, plan: Plan) -> None:
        with contextlib.suppress(PrefilldError):  # the load has the better error
            self._client(plan.target).renew(plan.lease)

    def _abandon(self, plan: Plan) -> None:
        assert plan.lease is not None
        self._let_go(plan.lease)
        if plan.target:
            with contextlib.suppress(PrefilldError):  # then the ttl ends it
                self._client(plan.target).release(plan.lease, consumed=False)


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
