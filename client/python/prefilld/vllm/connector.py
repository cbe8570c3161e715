"""PrefilldConnector: what vLLM calls. The scheduler's half decides and names blocks, the worker's
half moves the bytes; vLLM makes one of each, in different processes where it runs several."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import base

from .metrics import LoadMetrics, LoadStats
from .model_check import ModelCheck
from .scheduler import Orders, SchedulerHalf
from .settings import Settings
from .worker import WorkerHalf


class PrefilldConnector(base.KVConnectorBase_V1, base.SupportsHMA):
    """See the package's docstring for how to switch it on, settings.Settings for its settings."""

    def __init__(self, vllm_config: VllmConfig, role: base.KVConnectorRole,
                 kv_cache_config: Any):
        if not hasattr(base.KVConnectorBase_V1, "on_new_request"):
            raise ValueError("PrefilldConnector: this vLLM does not tell connectors of new "
                             "requests, without which sparse and dense blocks would share its "
                             "prefix cache; 0.32 does")
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        settings = Settings.from_config(extra)
        groups = getattr(kv_cache_config, "kv_cache_groups", None)
        if groups is not None and len(groups) > 1:
            raise ValueError(f"PrefilldConnector: a model with {len(groups)} kinds of KV cache is "
                             "not supported, only full attention in every layer")
        check = ModelCheck(vllm_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._idle = False  # this step computes nothing
        if role is base.KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(settings, check, vllm_config.cache_config.block_size)
        else:
            self._worker = WorkerHalf(settings, check, vllm_config)

    # --- the scheduler's process ---

    def on_new_request(self, request: Any) -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any,
                                   num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> base.KVConnectorMetadata:
        return self._scheduler.take_orders()

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduler.loads_ended(connector_output.finished_recving or ())

    def request_finished(self, request: Any,
                         block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.request_finished(request.request_id)
        return False, None

    def request_finished_all_groups(
            self, request: Any,
            block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # --- the worker's process ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)
        self._worker.take(orders)
        self._idle = forward_context.attn_metadata is None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request runs when all of its layers are here."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any,
                      **kwargs: Any) -> None:
        """A consumer saves nothing."""

    def wait_for_save(self) -> None:
        """A consumer saves nothing."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.finished(self._idle) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed_blocks()

    def get_kv_connector_stats(self) -> LoadStats | None:
        return self._worker.stats() if self._worker else None

    def shutdown(self) -> None:
        if self._worker:
            self._worker.close()

    # --- the API server's process ---

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LoadStats:
        return LoadStats(data=data) if data else LoadStats()

    @classmethod
    def build_prom_metrics(cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str],
                           per_engine_labelvalues: Any) -> LoadMetrics:
        return LoadMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
