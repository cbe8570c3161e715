"""Seeded attention inputs: what a head may look like, in five families, and dtypes of numpy."""

import numpy as np

FAMILIES = ("random", "sink", "band", "needle", "zero")
BAND_DELTA = 70


def make(family, tokens, q_heads=4, kv_heads=2, d=64, prefix=0, seed=0):
    """(q [tokens, q_heads, d], k, v [prefix + tokens, kv_heads, d]) in float32.

    random: no structure; sink: every row looks at the first tokens and its neighbours; band: row t
    looks at key t - 70; needle: every row looks at a few keys far back; zero: q = k = 0.
    """
    rng = np.random.default_rng([seed, tokens, prefix, d, FAMILIES.index(family)])
    total, group = prefix + tokens, q_heads // kv_heads
    q = rng.standard_normal((total, q_heads, d))
    k = rng.standard_normal((total, kv_heads, d))
    v = rng.standard_normal((total, kv_heads, d))
    if family == "sink":
        common = unit(rng.standard_normal(d))
        strength = 1.5 * d**0.25
        q += strength * common * np.linspace(1.5, 2.0, q_heads)[None, :, None]
        k[:4] += 3 * strength * common
    elif family == "band":
        # Keys are random codes; a query repeats the code of the key 70 before it.
        codes = np.repeat(k, group, axis=1)
        strength = 16 / np.sqrt(d)
        for h in range(q_heads):
            q[BAND_DELTA:, h] = strength * codes[:-BAND_DELTA, h]
            q[BAND_DELTA:, h] += 0.3 * rng.standard_normal((max(total - BAND_DELTA, 0), d))
    elif family == "needle":
        common = unit(rng.standard_normal(d))
        needles = rng.choice(total, min(7, total), replace=False)
        q += 2.0 * d**0.25 * common
        k[needles] += 4.0 * d**0.25 * common
    elif family == "zero":
        q[:] = 0
        k[:] = 0
    return [x.astype(np.float32) for x in (q[prefix:], k, v)]


def unit(x):
    return x / np.linalg.norm(x)


def to_bf16_bits(x):
    """float32 to bfloat16, nearest-even, as uint16 bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16_bits(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x, dtype):
    """float32 values of x after storage as "F32", "BF16" or "F16"."""
    if dtype == "BF16":
        return from_bf16_bits(to_bf16_bits(x))
    if dtype == "F16":
        return x.astype(np.float16).astype(np.float32)
    return x
