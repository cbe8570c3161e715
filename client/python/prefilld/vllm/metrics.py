"""The connector's own series in vLLM's /metrics, and the reasons of failed loads."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (KVConnectorPromMetrics,
                                                                  KVConnectorStats)

from ..errors import PrefilldError
from .failure_reasons import FailureReasons

_SECONDS = (.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 50, 100)
# gRPC's codes that a load can end with; the label `reason`, in lower case.
_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION",
          "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "ABORTED", "INTERNAL", "UNAUTHENTICATED",
          "PERMISSION_DENIED")


@dataclasses.dataclass
class LoadStats(KVConnectorStats):
    """What happened since the last report; plain data, for it travels between processes."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = {"seconds": [], "tokens": 0, "bytes": 0, "aborted": 0, "failures": {},
                     "reasons": {}, "running": None}

    def loaded(self, seconds: float, tokens: int, size: int) -> None:
        self.data["seconds"].append(seconds)
        self.data["tokens"] += tokens
        self.data["bytes"] += size

    def failed(self, request_id: str, error: PrefilldError) -> None:
        code = error.code.name if error.code.name in _CODES else "OTHER"
        failures = self.data["failures"]
        failures[code.lower()] = failures.get(code.lower(), 0) + 1
        self.data["reasons"][request_id] = str(error)

    def aborted(self) -> None:
        self.data["aborted"] += 1

    def running(self, loads: int) -> None:
        self.data["running"] = loads

    def is_empty(self) -> bool:
        return not any(self.data[key] for key in ("seconds", "aborted", "failures")) \
            and self.data["running"] is None

    def aggregate(self, other: KVConnectorStats) -> LoadStats:
        theirs = other.data
        self.data["seconds"] += theirs["seconds"]
        for key in ("tokens", "bytes", "aborted"):
            self.data[key] += theirs[key]
        for reason, count in theirs["failures"].items():
            self.data["failures"][reason] = self.data["failures"].get(reason, 0) + count
        self.data["reasons"].update(theirs["reasons"])
        if theirs["running"] is not None:
            self.data["running"] = theirs["running"]
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's periodic log line."""
        seconds = self.data["seconds"]
        return {"prefilld loads": len(seconds), "tokens": self.data["tokens"],
                "MB": round(self.data["bytes"] / 1e6, 1),
                "mean load s": round(sum(seconds) / len(seconds), 3) if seconds else 0,
                "aborted": self.data["aborted"], "failed": sum(self.data["failures"].values())}


class LoadMetrics(KVConnectorPromMetrics):
    """Lives in the API server's process."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str],
                 per_engine_labelvalues: dict[int, list[object]]):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._reasons = FailureReasons.install()

        def per_engine(kind: Any, name: str, what: str, **options: Any) -> dict[int, Any]:
            family = kind(name=f"vllm:prefilld_{name}", documentation=what, labelnames=labelnames,
                          **options)
            return {engine: family.labels(*values)
                    for engine, values in per_engine_labelvalues.items()}

        self._seconds = per_engine(self._histogram_cls, "load_seconds",
                                   "From a load's start to its last layer.", buckets=_SECONDS)
        self._tokens = per_engine(self._counter_cls, "load_tokens", "Tokens loaded.")
        self._bytes = per_engine(self._counter_cls, "load_bytes", "Bytes of KV loaded.")
        self._aborted = per_engine(self._counter_cls, "loads_aborted",
                                   "Loads that ended because their request did.")
        self._running = per_engine(self._gauge_cls, "loads_running", "Loads at work or waiting.")
        failures = self._counter_cls(
            name="vllm:prefilld_load_failures", documentation="Loads that failed.",
            labelnames=[*labelnames, "reason"])
        self._failures = {
            engine: {code.lower(): failures.labels(*values, code.lower())
                     for code in (*_CODES, "OTHER")}
            for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        data = transfer_stats_data
        for seconds in data["seconds"]:
            self._seconds[engine_idx].observe(seconds)
        self._tokens[engine_idx].inc(data["tokens"])
        self._bytes[engine_idx].inc(data["bytes"])
        self._aborted[engine_idx].inc(data["aborted"])
        for reason, count in data["failures"].items():
            self._failures[engine_idx][reason].inc(count)
        if data["running"] is not None:
            self._running[engine_idx].set(data["running"])
        self._reasons.learn(data["reasons"])
