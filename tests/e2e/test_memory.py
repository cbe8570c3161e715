"""Attending 128K tokens takes the inputs, the outputs and a bounded rest."""

import numpy as np
import pytest

from e2e import attending

TOKENS = 128 * 1024
REST_MIB = 256


@pytest.mark.slow
def test_attending_128k_tokens(start_server):
    rng = np.random.default_rng(1)
    q = rng.standard_normal((TOKENS, 4, 128), np.float32)
    k, v = (rng.standard_normal((TOKENS, 1, 128), np.float32) for _ in range(2))
    with start_server() as server:
        attending.attend(server.prefill, *attending.small(tokens=300))
        idle = server.memory_kib("VmRSS")
        outputs, _ = attending.attend(server.prefill, q, k, v, "BF16", timeout=1200,
                                      sparsity=attending.policy("joint"), return_lse=True)
        peak = server.memory_kib("VmHWM") - idle
    assert np.isfinite(outputs["o"]).all() and np.isfinite(outputs["lse"]).all()
    tensors = 2 * (2 * q.size + k.size + v.size) + 4 * 4 * TOKENS
    assert peak <= tensors / 1024 + REST_MIB * 1024, (
        f"{peak / 1024:.0f} MiB, of which {tensors / 2**20:.0f} MiB are tensors")
