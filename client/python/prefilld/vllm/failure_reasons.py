"""Why a request failed, in vLLM's answer. With kv_load_failure_policy "fail" vLLM answers 500
"Internal server error" and keeps the reason to its log. The reason travels with our statistics into
the API server's process, where this adds it to that answer.

It reaches into vLLM beyond the connector interface, as scheduler.py does where it hashes a
request's blocks anew. Where vLLM has changed, nothing is replaced and the answer stays vLLM's own.
"""

from __future__ import annotations

import collections
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.prefilld")

_KEPT = 1024  # reasons; those of requests that were computed again are never asked for


class FailureReasons:
    """By request; one event loop uses it."""

    _installed: FailureReasons | None = None

    def __init__(self) -> None:
        self._reasons: collections.OrderedDict[str, str] = collections.OrderedDict()

    @classmethod
    def install(cls) -> FailureReasons:
        """Once per process."""
        if cls._installed is None:
            cls._installed = cls()
            try:
                cls._installed._hook()
            except (ImportError, AttributeError) as error:
                logger.warning("prefilld: the reasons of failed loads will be in the log only: %s",
                               error)
        return cls._installed

    def learn(self, reasons: dict[str, str]) -> None:
        """reasons: by the engine's request id, which starts with the API's."""
        self._reasons.update(reasons)
        while len(self._reasons) > _KEPT:
            self._reasons.popitem(last=False)

    def take(self, request_id: str) -> str | None:
        for engine_id in self._reasons:
            if engine_id == request_id or engine_id.startswith(f"{request_id}-"):
                return self._reasons.pop(engine_id)
        return None

    def _hook(self) -> None:
        from vllm.entrypoints.generate.base.serving import GenerateBaseServing
        from vllm.exceptions import GenerationError

        raise_if_error = GenerateBaseServing._raise_if_error

        def with_reason(serving: Any, finish_reason: str | None, request_id: str) -> None:
            reason = self.take(request_id) if finish_reason == "error" else None
            if reason is not None:
                raise GenerationError(f"the prompt's KV could not be loaded: {reason}")
            raise_if_error(serving, finish_reason, request_id)

        GenerateBaseServing._raise_if_error = with_reason
