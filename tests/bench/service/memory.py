"""What a long Attend takes beyond its tensors: the server's peak over its idle size."""

import numpy as np
import torch
from safetensors.torch import save_file

from bench import OUT, Bench, progress
from report import Check, Section

TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM = 131072, 4, 1, 128
EXTRA_MIB = 256
MIB = 1 << 20


def long_input() -> dict[str, torch.Tensor]:
    """q, k and v in bf16 whose heads are sparse in two ways: near keys win through rotary-like
    channels (lines cover them), and keys of the query's topic through a random code, where topics
    change every 256 tokens (no line covers those: rows need repair)."""
    rng = np.random.default_rng(7)
    half = HEAD_DIM // 2
    angles = np.arange(TOKENS)[:, None] * 10000.0 ** (-np.arange(half // 2) / (half // 2))
    near = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * 2.5
    codes = rng.standard_normal((64, half), np.float32)
    codes *= 9.5 / np.linalg.norm(codes, axis=1, keepdims=True)
    topic = np.repeat(codes[rng.integers(0, len(codes), TOKENS // 256)], 256, axis=0)

    def noisy(*parts: np.ndarray) -> torch.Tensor:
        x = np.concatenate(parts, axis=1)
        return torch.from_numpy(x + 0.3 * rng.standard_normal(x.shape, np.float32))

    weights = [(1.0, 0.2), (0.8, 0.6), (0.5, 1.0), (0.3, 1.0)]  # of near and topic, per head
    q = torch.stack([noisy(a * near, b * topic) for a, b in weights], dim=1)
    k = noisy(near, topic)[:, None]
    v = torch.from_numpy(rng.standard_normal((TOKENS, KV_HEADS, HEAD_DIM), np.float32))
    return {name: x.bfloat16().contiguous() for name, x in (("q", q), ("k", k), ("v", v))}


def section(bench: Bench) -> Section:
    progress(f"memory: {TOKENS} tokens, joint")
    source, result = OUT / "long.safetensors", OUT / "long-out.safetensors"
    tensors = long_input()
    save_file(tensors, source)
    # o is as q; lse is F32 [q_heads, tokens].
    inputs = sum(x.nbytes for x in tensors.values()) / MIB
    outputs = (tensors["q"].nbytes + 4 * Q_HEADS * TOKENS) / MIB
    del tensors
    with bench.server(model=False) as server:
        idle = server.memory_kib("VmRSS") / 1024
        run = bench.prefillctl(server, "attend", f"--in={source}", f"--out={result}",
                               "--method=joint")
        peak = server.memory_kib("VmHWM") / 1024
    for path in (source, result):
        path.unlink()
    extra = peak - idle - inputs - outputs
    return Section(
        f"Memory of attending {TOKENS} tokens (q heads {Q_HEADS}, kv {KV_HEADS}, d {HEAD_DIM}, "
        "BF16, joint; MiB)",
        ["inputs", "outputs", "idle", "peak", "beyond", "density", "captured mass", "seconds"],
        [[inputs, outputs, idle, peak, extra, run["density"], run["captured_mass"],
          run["total_seconds"]]],
        [Check("MiB beyond inputs, outputs and idle size", extra, EXTRA_MIB, at_least=False)])
