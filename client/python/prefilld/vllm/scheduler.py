"""The scheduler's half: which requests get their KV from prefilld, and into which blocks. It does
no I/O after its start; the worker's half carries out the orders of each step."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.logger import init_logger

from ..client import PrefillClient
from ..errors import PrefilldError, RetryPolicy
from ..pull import Lease
from .model_check import ModelCheck
from .settings import Plan, Settings, plan_request

logger = init_logger("vllm.prefilld")


@dataclasses.dataclass(frozen=True)
class LoadOrder:
    """Fill the slots of tokens [begin, end) of one request."""

    request_id: str
    plan: Plan
    prompt: list[int]      # every token of the prompt, of which prefilld computes all
    begin: int             # a block's first token
    end: int
    block_ids: list[int]   # of the request, from its token 0


@dataclasses.dataclass
class Orders(KVConnectorMetadata):
    """What the worker's half is to do in this step."""

    loads: list[LoadOrder] = dataclasses.field(default_factory=list)
    cancel: list[str] = dataclasses.field(default_factory=list)    # request ids of running loads
    hold: list[Plan] = dataclasses.field(default_factory=list)     # renew these leases until loaded
    abandon: list[Plan] = dataclasses.field(default_factory=list)  # nobody will load these leases


@dataclasses.dataclass
class _Tracked:
    plan: Plan
    loading: bool = False
    tried: int | None = None  # the request's num_preemptions at its last load

    @property
    def unused_lease(self) -> bool:
        return self.plan.lease is not None and self.tried is None


class SchedulerHalf:
    """One thread, vLLM's scheduler, calls it."""

    def __init__(self, settings: Settings, check: ModelCheck, block_size: int):
        """Compares the models of every configured target that answers: ValueError names what
        differs. One that does not answer is compared at its first load."""
        self._settings = settings
        self._block_size = block_size
        self._requests: dict[str, _Tracked | None] = {}
        self._orders = Orders()
        for target in settings.targets:
            _check_target(target, settings, check)

    def on_new_request(self, request: Any) -> None:
        tracked = self._track(request)
        if tracked is None:
            return
        if tracked.unused_lease:
            self._orders.hold.append(tracked.plan)
        if tracked.plan.sparse and not tracked.plan.error:
            _separate_prefix_cache(request, tracked.plan.sparse,
                                   self._settings.share_sparse_prefixes)

    def matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        """All of the prompt but its last token, whose logits vLLM needs. computed: tokens in vLLM's
        own prefix cache, whole blocks."""
        tracked = self._track(request)
        if tracked is None:
            return 0, False
        # A load that failed is not tried again; what was loaded before a preemption may be, by a
        # Prefill of our own. A lease is good for one load.
        if tracked.tried is not None and (
                tracked.plan.lease is not None or tracked.tried == request.num_preemptions):
            return 0, False
        count = _end(request) - computed
        if count < (1 if tracked.plan.lease is not None else tracked.plan.min_tokens):
            return 0, False
        return count, True

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        tracked = self._track(request)
        if tracked is None:
            return
        if external > 0:
            end = _end(request)
            self._orders.loads.append(LoadOrder(
                request_id=request.request_id, plan=tracked.plan,
                prompt=list(request.prompt_token_ids), begin=end - external, end=end,
                block_ids=list(blocks.get_block_ids()[0])))
            tracked.loading, tracked.tried = True, request.num_preemptions
        elif tracked.unused_lease:  # vLLM had all of it
            self._orders.abandon.append(tracked.plan)
            tracked.tried = request.num_preemptions

    def take_orders(self) -> Orders:
        orders, self._orders = self._orders, Orders()
        return orders

    def loads_ended(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            tracked = self._requests.get(request_id)
            if tracked is not None:
                tracked.loading = False

    def request_finished(self, request_id: str) -> None:
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return
        if tracked.loading:
            self._orders.cancel.append(request_id)
        elif tracked.unused_lease:
            self._orders.abandon.append(tracked.plan)

    def _track(self, request: Any) -> _Tracked | None:
        """None for a request that is vLLM's alone."""
        if request.request_id not in self._requests:
            plan = plan_request(request.kv_transfer_params, self._settings)
            if plan is not None and not _can_load(request):
                plan = None
            if plan is not None and plan.lease is not None:
                plan = self._for_this_prompt(plan, plan.lease, request.num_prompt_tokens)
            self._requests[request.request_id] = _Tracked(plan) if plan is not None else None
        return self._requests[request.request_id]


    def _for_this_prompt(self, plan: Plan, lease: Lease, tokens: int) -> Plan:
        """`plan`, or the reason why its lease cannot serve this request: it is of another prompt,
        or another request of the same call (several prompts, n > 1) has it."""
        if any(other is not None and other.plan.lease is not None
               and (other.plan.target, other.plan.lease.name) == (plan.target, lease.name)
               for other in self._requests.values()):
            return Plan(error="the lease is another request's: it is good for one prompt with one "
                              "answer")  # and stays with that one
        if lease.tokens != tokens:
            return dataclasses.replace(
                plan, error=f"the lease has {lease.tokens} tokens, the prompt {tokens}")
        return plan


def _end(request: Any) -> int:
    """One past the last token that can be loaded: prefilld computes prompts, vLLM needs the logits
    of the last token."""
    return min(request.num_prompt_tokens, request.num_tokens - 1)


def _can_load(request: Any) -> bool:
    """Only token IDs through the base model: no images, embeddings, adapters, poolers."""
    return bool(request.prompt_token_ids) and not (
        getattr(request, "prompt_embeds", None) is not None
        or getattr(request, "mm_features", None) or request.lora_request is not None
        or request.sampling_params is None)


def _separate_prefix_cache(request: Any, policy: str, share: bool) -> None:
    """KV of a sparse method is an approximation, made for one prompt: in vLLM's prefix cache it
    must not serve requests that ask for another policy, nor, unless `share`, other prompts that
    begin alike. Blocks are hashed anew under a salt that names the policy and the prompt."""
    if not request.block_hashes and getattr(request, "_block_hasher", None) is None:
        return  # no prefix cache
    salt = f"prefilld:{policy}"
    if not share:
        prompt = ",".join(map(str, request.prompt_token_ids))
        salt += f":{hashlib.sha256(prompt.encode()).hexdigest()}"
    request.cache_salt = f"{request.cache_salt}/{salt}" if request.cache_salt else salt
    request.block_hashes.clear()
    request.update_block_hashes()


def _check_target(target: str, settings: Settings, check: ModelCheck) -> None:
    with PrefillClient(target, credentials=settings.credentials,
                       retry=RetryPolicy(attempts=2)) as client:
        try:
            check.check(client.model(settings.model) if settings.model
                        else only_model(client.models(), target))
        except PrefilldError as error:
            if error.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                logger.warning("prefilld at %s does not answer yet, its model will be checked at "
                               "the first load: %s", target, error)
                return
            raise ValueError(f"PrefilldConnector: {target}: {error}") from None
    logger.info("prefilld at %s serves this engine's model", target)


def only_model(models: list[Any], target: str) -> Any:
    """ValueError when there is a choice."""
    if len(models) == 1:
        return models[0]
    raise ValueError(f"{target} serves {', '.join(m.name for m in models) or 'no model'}: "
                     "name one as `model` in kv_connector_extra_config")
