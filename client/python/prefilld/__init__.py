"""Client of prefilld, the sparse prefill service for LLM decode tiers.

    with PrefillClient("127.0.0.1:50051") as client:
        with client.prefill("smollm2", token_ids, method="joint", gamma=0.9) as prompt:
            for layer in prompt:               # as each is computed
                cache.append(layer.k, layer.v)
            print(prompt.report.mean_density)
"""

from .attend import AttendResult, InPlaceAttend
from .client import Health, PrefillClient
from .credentials import Credentials
from .errors import Cancellation, PrefilldError, RetryPolicy
from .prefill import Prefill
from .pull import KvPull, Layer, Lease
from .sparsity import PATTERNS, Policy, SparsityReport, Summary

__all__ = [
    "PATTERNS", "AttendResult", "Cancellation", "Credentials", "Health", "InPlaceAttend", "KvPull",
    "Layer", "Lease", "Policy", "Prefill", "PrefillClient", "PrefilldError", "RetryPolicy",
    "SparsityReport", "Summary",
]
