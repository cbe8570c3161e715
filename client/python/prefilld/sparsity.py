"""What may be skipped (arguments) and what was skipped (reports), in numpy's terms."""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict

import numpy as np

from .tensors import data_loss, invalid
from .v1 import prefill_service_pb2, sparsity_pb2

METHODS = {
    name.removeprefix("METHOD_").lower(): value for name, value in sparsity_pb2.Method.items()
    if value != sparsity_pb2.METHOD_UNSPECIFIED
}
REPORT_LEVELS = {
    "density": sparsity_pb2.REPORT_LEVEL_DENSITY,
    "captured_mass": sparsity_pb2.REPORT_LEVEL_CAPTURED_MASS,
}
PATTERNS = tuple(  # by the values of `pattern`
    name.removeprefix("PATTERN_").lower()
    for name, _ in sorted(sparsity_pb2.Pattern.items(), key=lambda item: item[1]))


class Policy(TypedDict, total=False):
    """Keyword arguments of attend() and prefill(); what is absent or None is the server's default.
    """

    method: str | None                 # "dense", "flexprefill", "joint"; server default: joint
    gamma: float | None                # coverage, 0 < gamma < 1; 0.9
    tau: float | None                  # flexprefill's pattern threshold, 0 to 1; 0.1
    min_budget_tokens: int | None      # 1024 for flexprefill, 0 for joint
    max_budget_tokens: int | None      # none
    block_size: int | None             # 64 or 128; 128
    min_captured_mass: float | None    # 0 to 1: a head that captures less is run dense; 0
    report_level: str | None           # "density" or "captured_mass"


def policy_message(policy: Policy) -> sparsity_pb2.SparsityPolicy:
    """The wire's form. Values are checked by the server, names here."""
    unknown = sorted(set(policy) - Policy.__annotations__.keys())
    if unknown:
        raise TypeError(f"unexpected keyword arguments: {', '.join(unknown)}")
    fields: dict[str, Any] = {
        key: value for key, value in policy.items() if value is not None}
    for key, names in (("method", METHODS), ("report_level", REPORT_LEVELS)):
        if key in fields:
            if fields[key] not in names:
                raise invalid(f"{key} {fields[key]!r} is not one of {', '.join(names)}")
            fields[key] = names[fields[key]]
    return sparsity_pb2.SparsityPolicy(**fields)


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """What was computed, per layer and head. Of an attend() each sequence is one "layer"."""

    mean_density: float                      # computed / causal blocks, over all layers and heads
    mean_captured_mass: float | None         # None: not measured
    density: np.ndarray                      # [layers, heads] float32
    pattern: np.ndarray                      # [layers, heads] uint8, index into PATTERNS
    captured_mass: np.ndarray | None         # [layers, heads] float32, mean over sampled rows
    captured_mass_min: np.ndarray | None     # [layers, heads] float32, their minimum
    dense_fallback_heads: int                # run dense although a sparse method was asked for
    reasons: tuple[str, ...]                 # why

    @classmethod
    def from_message(cls, message: sparsity_pb2.SparsityReport) -> SparsityReport:
        shape = (message.layers, message.heads)
        measured = message.captured_mass_measured

        def ratios(raw: bytes) -> np.ndarray:
            if len(raw) != 2 * message.layers * message.heads:
                raise data_loss(f"sparsity report: {len(raw)} bytes for {shape} ratios")
            return (np.frombuffer(raw, "<u2").reshape(shape) / 65535.0).astype(np.float32)

        if message.layers * message.heads != len(message.pattern_u8):
            raise data_loss(f"sparsity report: {len(message.pattern_u8)} patterns for {shape}")
        return cls(
            mean_density=message.mean_density,
            mean_captured_mass=message.mean_captured_mass if measured else None,
            density=ratios(message.density_u16),
            pattern=np.frombuffer(message.pattern_u8, np.uint8).reshape(shape),
            captured_mass=ratios(message.captured_mass_u16) if measured else None,
            captured_mass_min=ratios(message.captured_mass_min_u16) if measured else None,
            dense_fallback_heads=message.dense_fallback_heads,
            reasons=tuple(message.reasons))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What happened to a request, with where the time went."""

    request_id: str
    tokens: int                 # query tokens computed
    # By phase: queue, upload, estimate, select, attention, linear, handoff.
    seconds: dict[str, float]
    bytes_in: int
    bytes_out: int
    report: SparsityReport
    transport: str              # how the tensors came here: "grpc", "posix_shm" or "cuda_ipc"

    @classmethod
    def from_message(cls, message: prefill_service_pb2.Summary, transport: str) -> Summary:
        phases = ("queue", "upload", "estimate", "select", "attention", "linear", "handoff")
        return cls(
            request_id=message.request_id, tokens=message.tokens,
            seconds={p: getattr(message, p).ToNanoseconds() / 1e9 for p in phases},
            bytes_in=message.bytes_in, bytes_out=message.bytes_out,
            report=SparsityReport.from_message(message.sparsity), transport=transport)
