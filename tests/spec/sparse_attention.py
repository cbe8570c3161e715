"""Sparse prefill attention, read from the mathematics a second time.

An independent, double-precision numpy reading of the three methods (dense, flexprefill, joint), of
attention over a block index and of the captured mass. It shares no code with the server and is the
reference that the end-to-end tests compare the server with. It is written to be obvious, not fast:
4,097 tokens with four heads take a few seconds.

Words and shapes: q [Sq, Hq, d], k and v [Sk, Hkv, d], all of one sequence; the prefix is
p = Sk - Sq, query t sits at absolute position p + t; B is the block size, n = ceil(Sk / B) the
number of key blocks. Query blocks are aligned to absolute positions, so the first one is p // B and
there are q_blocks = n - p // B of them. A mask is bool [Hq, q_blocks, n]: which key blocks the rows
of a query block read. Ties in every sort go to the lower index.
"""

import dataclasses
import math

import numpy as np

DENSE, VERTICAL_SLASH, QUERY_AWARE, JOINT = range(4)  # the pattern codes of reports

POOL = 32         # tokens pooled into one row of joint's repair map
PROBE_ROWS = 64   # rows that joint probes, and rows on which captured mass is measured
MAX_ROUNDS = 40   # of joint's greedy choice of lines; a head that needs more reads every block


@dataclasses.dataclass(frozen=True)
class Policy:
    """What may be skipped. Budgets are tokens; min_budget None is the method's own default."""

    method: str = "joint"
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int | None = None
    max_budget: int | None = None
    block_size: int = 128
    min_captured_mass: float = 0.0


@dataclasses.dataclass
class Result:
    """One sequence, or a ragged batch whose rows of blocks are concatenated.

    o [total_q, Hq, d] and lse [Hq, total_q] (natural log) are None unless asked for;
    rows[h][i] is the ascending list of key blocks of row i, relative to its sequence;
    pattern, captured_mass, captured_mass_min and density are [sequences, Hq].
    """

    o: np.ndarray | None
    lse: np.ndarray | None
    rows: list[list[list[int]]]
    pattern: np.ndarray
    captured_mass: np.ndarray
    captured_mass_min: np.ndarray
    density: np.ndarray


def run(q, k, v, policy, softmax_scale=None, cu_seqlens_q=None, cu_seqlens_k=None, outputs=True):
    """Everything that an attention request answers, for one sequence or a ragged batch."""
    cu_q = [0, len(q)] if cu_seqlens_q is None else list(cu_seqlens_q)
    cu_k = [0, len(k)] if cu_seqlens_k is None else list(cu_seqlens_k)
    heads = q.shape[1]
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    rows = [[] for _ in range(heads)]
    pattern, mass, mass_min, density, o, lse = [], [], [], [], [], []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        qs, ks, vs = (x.astype(np.float64) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        mask, codes = select(qs, ks, policy, scale)
        means, minima = captured_mass(qs, ks, mask, policy.block_size, scale)
        below = means < policy.min_captured_mass
        if below.any():
            mask[below] = causal_mask(len(qs), len(ks), policy.block_size)
            codes[below] = DENSE
            means[below] = minima[below] = 1
        pattern.append(codes)
        mass.append(means)
        mass_min.append(minima)
        causal = causal_mask(len(qs), len(ks), policy.block_size).sum()
        density.append(mask.sum(axis=(1, 2)) / causal)
        for h in range(heads):
            rows[h] += [np.flatnonzero(row).tolist() for row in mask[h]]
        if outputs:
            out, out_lse = attend(qs, ks, vs, mask, policy.block_size, scale)
            o.append(out)
            lse.append(out_lse)
    return Result(
        o=np.concatenate(o) if outputs else None,
        lse=np.concatenate(lse, axis=1) if outputs else None,
        rows=rows,
        pattern=np.array(pattern),
        captured_mass=np.array(mass),
        captured_mass_min=np.array(mass_min),
        density=np.array(density),
    )


def select(q, k, policy, scale):
    """(mask, pattern [Hq]) of one sequence; q and k float64."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    causal = causal_mask(len(q), len(k), policy.block_size)
    mask = np.empty((heads, *causal.shape), bool)
    pattern = np.empty(heads, np.uint8)
    for h in range(heads):
        qh, kh = q[:, h], k[:, h // group]
        if policy.method == "dense":
            mask[h], pattern[h] = causal, DENSE
        elif policy.method == "flexprefill":
            mask[h], pattern[h] = flexprefill_head(qh, kh, policy)
        elif policy.method == "joint":
            mask[h], pattern[h] = joint_head(qh, kh, policy, scale), JOINT
        else:
            raise ValueError(f"no method {policy.method}")
    assert not (mask & ~causal).any()
    return mask, pattern


# --- blocks -----------------------------------------------------------------------------------


def blocks(tokens, block_size):
    return -(-tokens // block_size)


def causal_mask(sq, sk, block_size):
    """bool [q_blocks, n]: every block that a dense causal pass computes."""
    n = blocks(sk, block_size)
    first = (sk - sq) // block_size
    return np.arange(n)[None, :] <= np.arange(first, n)[:, None]


def block_sums(x, block_size):
    """Sums of the last axis over blocks of block_size; the last block may be short."""
    return np.add.reduceat(x, np.arange(0, x.shape[-1], block_size), axis=-1)


def block_means(x, block_size):
    """Means [blocks, d] of the valid rows of x [tokens, d]."""
    starts = np.arange(0, len(x), block_size)
    sizes = np.minimum(block_size, len(x) - starts)
    return np.add.reduceat(x, starts, axis=0) / sizes[:, None]


def largest(values, count):
    """Positions of the `count` largest values, largest first, ties to the lower position."""
    return np.argsort(-values, kind="stable")[:count]


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def bf16(x):
    """x rounded to the nearest bfloat16 (8 significant bits, ties to even), as float64."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def fp32(x):
    """x rounded to float32, as float64: where the method asks whether a value is exactly zero."""
    return np.asarray(x, np.float32).astype(np.float64)


# --- flexprefill ------------------------------------------------------------------------------


def flexprefill_head(q, k, policy):
    """(mask, pattern) of one head: FlexPrefill as published and released; q, k [S, d]."""
    size, tokens, d = policy.block_size, len(k), k.shape[1]
    if len(q) != tokens:
        raise ValueError("flexprefill needs Sq = Sk")
    n = blocks(tokens, size)
    min_budget = 1024 if policy.min_budget is None else policy.min_budget
    n_min = blocks(max(min_budget, 1), size)
    n_max = n if policy.max_budget is None else min(blocks(policy.max_budget, size), n)
    causal = causal_mask(tokens, tokens, size)
    if tokens <= max(2 * size, n_min * size):
        return causal, DENSE

    # Probe rows: the last B tokens, in bf16, softmax in fp32.
    position = np.arange(tokens - size, tokens)
    probe = bf16(q[position] / math.sqrt(d))
    logits = bf16(probe @ k.T)
    logits[np.arange(tokens)[None, :] > position[:, None]] = -np.inf
    p = fp32(softmax(logits))

    # Line scores of tokens, then of blocks. Slash bins are counted from the farthest offset.
    vertical = p.sum(axis=0) / size
    slash = np.zeros(tokens)
    for r, t in enumerate(position):
        slash[: t + 1] += p[r, t::-1] / size
    block_vertical = block_sums(vertical, size)
    block_slash = block_sums(slash[::-1], size)

    # Pattern test: does the pooled estimate agree with the probed one?
    pooled = softmax(bf16(block_means(k, size)) @ bf16(probe.mean(axis=0)))
    query_aware = jensen_shannon(fp32(pooled), fp32(block_vertical)) < policy.tau
    if query_aware:
        n_vertical = n_slash = n_min
    else:
        n_vertical = min(max(line_budget(vertical, policy.gamma), n_min), n_max)
        n_slash = min(max(line_budget(slash, policy.gamma), n_min), n_max)

    block_vertical[0] = np.inf
    block_slash[n - 1] = np.inf
    mask = np.zeros((n, n), bool)
    mask[:, largest(block_vertical, n_vertical)] = True
    block_row = np.arange(n)
    for u in largest(block_slash, n_slash):
        offset = n - 1 - u
        mask[block_row[offset:], block_row[offset:] - offset] = True
    mask[0, 0] = True
    if query_aware:
        mask |= query_aware_blocks(q, k, size, policy.gamma)
    return mask & causal, QUERY_AWARE if query_aware else VERTICAL_SLASH


def line_budget(scores, gamma):
    """Blocks of lines that the released code keeps: a count of tokens, made blocks of 128."""
    return token_budget(scores, gamma) // 128 + 1


def token_budget(scores, gamma):
    """Tokens whose descending prefix sums stay at or below gamma, and one more."""
    return int((np.cumsum(np.sort(scores)[::-1]) <= gamma).sum()) + 1


def jensen_shannon(b, a):
    """sqrt of the Jensen-Shannon divergence; NaN where either holds an exact zero, as released."""
    if (a == 0).any() or (b == 0).any():
        return math.nan
    m = (a + b) / 2
    divergence = 0.5 * (b * np.log(b / m)).sum() + 0.5 * (a * np.log(a / m)).sum()
    return math.sqrt(max(divergence, 0))


def query_aware_blocks(q, k, block_size, gamma):
    """bool [n, n]: pooled blocks, largest first over the whole map, the crossing one dropped."""
    n = blocks(len(k), block_size)
    logits = block_means(q, block_size) @ block_means(k, block_size).T / math.sqrt(k.shape[1])
    logits[~causal_mask(len(k), len(k), block_size)] = -np.inf
    keep = keep_below(softmax(logits).ravel(), gamma * n)
    keep[0] = True
    return keep.reshape(n, n)


def keep_below(values, total):
    """bool: the largest values whose inclusive prefix sum is <= total."""
    order = largest(values, len(values))
    keep = np.zeros(len(values), bool)
    keep[order[np.cumsum(values[order]) <= total]] = True
    return keep


# --- joint ------------------------------------------------------------------------------------


def radical_inverse(r):
    """r's bits mirrored behind the binary point, in 64ths (exact for r < 64)."""
    return int(f"{r:06b}"[::-1], 2)


def probe_rows(sq):
    """One query row in each of min(64, Sq) equal strata."""
    count = min(PROBE_ROWS, sq)
    return np.array([(64 * r + radical_inverse(r)) * sq // (64 * count) for r in range(count)])


def mass_map(q, k, rows, block_size, scale):
    """[rows, n]: exact softmax mass of each key block for the given query rows of one head."""
    position = len(k) - len(q) + rows
    logits = q[rows] @ k.T * scale
    logits[np.arange(len(k))[None, :] > position[:, None]] = -np.inf
    return block_sums(softmax(logits), block_size)


def joint_head(q, k, policy, scale):
    """The mask of one head: lines chosen together from rows all over the prompt, then repaired."""
    size, gamma = policy.block_size, policy.gamma
    sq, sk = len(q), len(k)
    n, first = blocks(sk, size), (sk - sq) // size
    causal = causal_mask(sq, sk, size)
    rows = probe_rows(sq)
    row_block = (sk - sq + rows) // size
    mass = mass_map(q, k, rows, size, scale)

    mask = joint_lines(mass, row_block, causal, first, gamma - 0.1)
    captured = np.where(mask[row_block - first], mass, 0).sum(axis=1)
    pooled = pooled_map(q, k, size, scale)
    if (captured < gamma).sum() > len(rows) // 20:
        for i in range(n - first):
            order = largest(np.where(mask[i] | ~causal[i], -1, pooled[i]), n)
            for j in order[: (causal[i] & ~mask[i]).sum()]:
                if pooled[i, mask[i]].sum() >= gamma:
                    break
                mask[i, j] = True

    for i in range(n - first):
        apply_budgets(mask[i], first + i, pooled[i], policy)
    return mask


def joint_lines(mass, row_block, causal, first, gamma_lines):
    """Forced blocks, then verticals and diagonals by gain per computed block; see joint_head."""
    n = causal.shape[1]
    row_index = np.arange(first, n)[:, None] - np.arange(n)[None, :]  # offset of block (row, J)
    mask = causal & ((row_index == 0) | (row_index == 1))
    mask[:, 0] = True
    mask[-2:] = causal[-2:]

    offset = row_block[:, None] - np.arange(n)[None, :]  # of entry (probe row, J)
    cost = np.maximum(1, (row_block[:, None] >= np.arange(n)[None, :]).sum(axis=0))
    uncovered = np.where(mask[row_block - first], 0.0, mass)
    free_vertical = np.arange(n) > 0
    free_diagonal = np.arange(n) > 1
    limit = math.inf

    def reached():
        return 1 - uncovered.sum(axis=1).mean() >= gamma_lines

    def vertical_gains():
        return np.where(free_vertical, uncovered.sum(axis=0) / cost, -1)

    def diagonal_gains():
        # by_offset[r][o] = uncovered[r][I_r - o]
        source = row_block[:, None] - np.arange(n)[None, :]
        by_offset = np.where(
            source >= 0, np.take_along_axis(uncovered, np.maximum(source, 0), axis=1), 0
        )
        return np.where(free_diagonal, by_offset.sum(axis=0) / cost, -1)

    for _ in range(MAX_ROUNDS):
        if reached():
            return mask
        gains = vertical_gains()
        best = max(gains.max(), diagonal_gains().max())
        if best <= 0:
            return mask
        theta = limit = min(best / 2, limit / 2)
        for j in largest(gains, int((gains >= theta).sum())):
            if reached():
                break
            free_vertical[j] = False
            mask[:, j] |= causal[:, j]
            uncovered[:, j] = 0
        gains = diagonal_gains()
        for o in largest(gains, int((gains >= theta).sum())):
            if reached():
                break
            free_diagonal[o] = False
            mask |= causal & (row_index == o)
            uncovered[offset == o] = 0
    return mask if reached() else causal.copy()


def pooled_map(q, k, block_size, scale):
    """[q_blocks, n]: softmax over pools of 32 tokens, summed by blocks, each row made 1."""
    sq, sk = len(q), len(k)
    prefix = sk - sq
    first_pool, pools = prefix // POOL, blocks(sk, POOL)
    # Absolute alignment: the first pool of queries may lack its first rows.
    pool_of = np.arange(prefix, sk) // POOL - first_pool
    pooled_q = np.zeros((pools - first_pool, q.shape[1]))
    np.add.at(pooled_q, pool_of, q)
    pooled_q /= np.bincount(pool_of)[:, None]
    logits = pooled_q @ block_means(k, POOL).T * scale
    absolute = np.arange(first_pool, pools)
    logits[np.arange(pools)[None, :] > absolute[:, None]] = -np.inf
    by_key_block = block_sums(softmax(logits), block_size // POOL)
    query_block = absolute * POOL // block_size
    starts = np.flatnonzero(np.diff(query_block, prepend=-1))
    pooled = np.add.reduceat(by_key_block, starts, axis=0)
    return pooled / pooled.sum(axis=1, keepdims=True)


def apply_budgets(row, i, pooled, policy):
    """min_budget adds the nearest earlier blocks to a row, max_budget keeps 0, I, I-1, then P."""
    size = policy.block_size
    need = blocks(policy.min_budget or 0, size)
    for j in range(i, -1, -1):
        if row.sum() >= need:
            break
        row[j] = True
    if policy.max_budget is not None:
        allowed = blocks(policy.max_budget, size)
        if row.sum() > allowed:
            keep = {j for j in (0, i, i - 1) if j >= 0 and row[j]}
            rest = [j for j in largest(pooled, len(row)) if row[j] and j not in keep]
            keep.update(rest[: max(0, allowed - len(keep))])
            row[:] = False
            row[sorted(keep)] = True


# --- captured mass and attention ----------------------------------------------------------------


def captured_rows(sq):
    """The query rows on which captured mass is measured: others than joint's probe rows."""
    if sq <= PROBE_ROWS:
        return np.arange(sq)
    rows = [(64 * (r + 1) - radical_inverse(r)) * sq // (64 * PROBE_ROWS)
            for r in range(PROBE_ROWS)]
    return np.minimum(rows, sq - 1)


def captured_mass(q, k, mask, block_size, scale):
    """(mean [Hq], minimum [Hq]) share of exact softmax mass that falls in selected blocks."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    prefix = len(k) - len(q)
    rows = captured_rows(len(q))
    mask_row = (prefix + rows) // block_size - prefix // block_size
    means, minima = np.empty(heads), np.empty(heads)
    for h in range(heads):
        mass = mass_map(q[:, h], k[:, h // group], rows, block_size, scale)
        captured = np.where(mask[h][mask_row], mass, 0).sum(axis=1)
        means[h], minima[h] = captured.mean(), captured.min()
    return means, minima


def attend(q, k, v, mask, block_size, scale):
    """(o [Sq, Hq, d], lse [Hq, Sq]): softmax over the tokens of selected blocks, key <= query."""
    sq, heads, _ = q.shape
    sk, group = len(k), heads // k.shape[1]
    prefix = sk - sq
    first = prefix // block_size
    o = np.empty((sq, heads, v.shape[2]))
    lse = np.empty((heads, sq))
    for h in range(heads):
        kh, vh = k[:, h // group], v[:, h // group]
        for i, row in enumerate(mask[h]):
            begin = max((first + i) * block_size - prefix, 0)
            end = min((first + i + 1) * block_size - prefix, sq)
            keys = np.concatenate([np.arange(j * block_size, min((j + 1) * block_size, sk))
                                   for j in np.flatnonzero(row)])
            logits = q[begin:end, h] @ kh[keys].T * scale
            logits[keys[None, :] > prefix + np.arange(begin, end)[:, None]] = -np.inf
            top = logits.max(axis=1, keepdims=True)
            weights = np.exp(logits - top)
            total = weights.sum(axis=1, keepdims=True)
            o[begin:end, h] = weights / total @ vh[keys]
            lse[h, begin:end] = (top + np.log(total))[:, 0]
    return o, lse


def mask_of_rows(rows, sq, sk, block_size):
    """The mask of lists of key blocks (what a server returned), rows[h][i] of one sequence."""
    causal = causal_mask(sq, sk, block_size)
    mask = np.zeros((len(rows), *causal.shape), bool)
    for h, head in enumerate(rows):
        for i, row in enumerate(head):
            mask[h, i, row] = True
    return mask
