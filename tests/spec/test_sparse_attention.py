"""The golden facts of the methods, and what every mask must satisfy, on five families of inputs."""

import math

import numpy as np
import pytest

from spec import inputs
from spec import sparse_attention as spec

LENGTHS = (1, 127, 128, 129, 300, 1000, 2049)
METHODS = ("dense", "flexprefill", "joint")


def run(family, tokens, policy, prefix=0, outputs=False, **shape):
    q, k, v = inputs.make(family, tokens, prefix=prefix, **shape)
    return spec.run(q, k, v, policy, outputs=outputs)


def test_last_block_of_300_tokens_has_44_and_offsets_run_from_the_end():
    deltas = np.arange(300)
    bins = [set(299 - deltas[u * 128:(u + 1) * 128]) for u in range(spec.blocks(300, 128))]
    by_offset = bins[::-1]
    assert by_offset == [set(range(44)), set(range(44, 172)), set(range(172, 300))]


def test_vertical_slash_keeps_the_crossing_token_and_query_aware_drops_it():
    p = np.array([.5, .3, .1, .1])
    assert spec.token_budget(p, .85) == 3
    assert spec.keep_below(p, .85).sum() == 2


@pytest.mark.parametrize("tokens,expected", [(127, 1), (128, 2), (129, 2)])
def test_token_budget_becomes_blocks_of_128(tokens, expected):
    equal = np.full(1024, 1 / 1024)
    gamma = (tokens - .5) / 1024  # tokens - 1 entries stay below it, the next one crosses it
    assert spec.token_budget(equal, gamma) == tokens
    assert spec.line_budget(equal, gamma) == expected


def zero_divergence(n):
    """D of a head with Q = K = 0: the probed blocks are causal, the pooled ones are not."""
    size, tokens = 128, n * 128
    position = np.arange(tokens - size, tokens)
    p = (np.arange(tokens)[None] <= position[:, None]) / (position[:, None] + 1)
    return spec.jensen_shannon(np.full(n, 1 / n), spec.block_sums(p.sum(axis=0) / size, size))


@pytest.mark.parametrize("n,expected", [(3, .1155), (4, .1008), (8, .0718), (16, .0509),
                                        (32, .0361)])
def test_zero_input_divergence(n, expected):
    assert zero_divergence(n) == pytest.approx(expected, abs=5e-5)
    code = spec.QUERY_AWARE if n >= 8 else spec.VERTICAL_SLASH
    policy = spec.Policy("flexprefill", .95, min_budget=128)
    assert (run("zero", n * 128, policy).pattern == code).all()


def test_an_exact_zero_means_vertical_slash():
    assert math.isnan(spec.jensen_shannon(np.array([1., 0]), np.array([.5, .5])))


def test_flexprefill_loses_half_of_a_band_and_joint_keeps_it():
    q, k, v = inputs.make("band", 4096, q_heads=1, kv_heads=1)
    released = spec.run(q, k, v, spec.Policy("flexprefill", .9, min_budget=128), outputs=False)
    joint = spec.run(q, k, v, spec.Policy("joint", .9), outputs=False)
    chosen = released.rows[0][20]
    assert 20 in chosen
    if 19 not in chosen:
        assert released.captured_mass[0, 0] == pytest.approx((128 - 70) / 128, abs=.08)
    assert joint.captured_mass[0, 0] > .98


def test_129_needles_in_129_blocks_give_two_blocks():
    vertical = np.zeros(129 * 128)
    vertical[::128] = 1 / 129
    assert spec.line_budget(vertical, 128.5 / 129) == 2


def test_radical_inverse_and_probe_rows():
    assert [spec.radical_inverse(r) for r in (0, 1, 2, 3, 4)] == [0, 32, 16, 48, 8]
    assert spec.probe_rows(1).tolist() == [0]
    assert spec.probe_rows(64).tolist() == list(range(64))
    for sq in (65, 127, 1000, 4097):
        rows = spec.probe_rows(sq)
        strata = np.arange(65) * sq / 64
        assert (rows >= np.floor(strata[:-1])).all() and (rows < strata[1:]).all()
        other = spec.captured_rows(sq)
        assert (np.diff(other) >= 0).all() and other.max() < sq


@pytest.mark.parametrize("family", inputs.FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_rows_hold_the_first_and_their_own_block_and_nothing_later(family, method, tokens):
    result = run(family, tokens, spec.Policy(method, .9, min_budget=128))
    n = spec.blocks(tokens, 128)
    for head in result.rows:
        assert len(head) == n
        for i, row in enumerate(head):
            assert row == sorted(set(row)) and row[0] == 0 and row[-1] == i


@pytest.mark.parametrize("family", inputs.FAMILIES)
@pytest.mark.parametrize("gamma", [.8, .9, .95])
def test_joint_captures_what_gamma_says(family, gamma):
    result = run(family, 2049, spec.Policy("joint", gamma))
    assert result.captured_mass.min() >= gamma - .03


@pytest.mark.parametrize("method", ("flexprefill", "joint"))
def test_permuting_heads_permutes_rows(method):
    q, k, v = inputs.make("random", 1000, q_heads=4, kv_heads=4)
    order = [2, 0, 3, 1]
    policy = spec.Policy(method, .9, min_budget=128)
    straight = spec.run(q, k, v, policy, outputs=False)
    permuted = spec.run(q[:, order], k[:, order], v[:, order], policy, outputs=False)
    assert permuted.rows == [straight.rows[h] for h in order]


def test_attention_over_every_block_is_plain_causal_attention():
    q, k, v = (x.astype(np.float64) for x in inputs.make("random", 200, prefix=60))
    o, lse = spec.attend(q, k, v, np.ones((4, 3, 3), bool), 128, .2)
    for h in range(4):
        logits = q[:, h] @ k[:, h // 2].T * .2
        logits[np.arange(260)[None] > 60 + np.arange(200)[:, None]] = -np.inf
        weights = np.exp(logits)
        np.testing.assert_allclose(lse[h], np.log(weights.sum(axis=1)), atol=1e-12)
        np.testing.assert_allclose(
            o[:, h], weights @ v[:, h // 2] / weights.sum(axis=1)[:, None], atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 127, 128, 300])
def test_a_prefix_keeps_blocks_on_absolute_positions(prefix):
    result = run("random", 500, spec.Policy("joint", .9), prefix=prefix)
    first, n = prefix // 128, spec.blocks(prefix + 500, 128)
    for head in result.rows:
        assert len(head) == n - first
        assert [row[-1] for row in head] == list(range(first, n))


def test_a_ragged_batch_equals_its_sequences():
    q, k, v = inputs.make("sink", 900)
    cu = [0, 129, 130, 900]
    policy = spec.Policy("joint", .8)
    batch = spec.run(q, k, v, policy, cu_seqlens_q=cu, cu_seqlens_k=cu)
    parts = [spec.run(q[a:b], k[a:b], v[a:b], policy) for a, b in zip(cu, cu[1:])]
    np.testing.assert_array_equal(batch.o, np.concatenate([p.o for p in parts]))
    for h in range(4):
        assert batch.rows[h] == sum((p.rows[h] for p in parts), [])


def test_budgets_bound_the_rows_of_joint():
    wide = run("band", 1500, spec.Policy("joint", .5, min_budget=600))
    assert all(len(row) >= min(5, i + 1) for head in wide.rows for i, row in enumerate(head))
    narrow = run("random", 1500, spec.Policy("joint", .95, max_budget=512))
    for head in narrow.rows:
        for i, row in enumerate(head):
            assert len(row) <= 4 and {0, i, max(i - 1, 0)} <= set(row)


def test_min_captured_mass_runs_the_head_dense():
    q, k, v = inputs.make("random", 2049)
    policy = spec.Policy("joint", .5, min_captured_mass=.9)
    result = spec.run(q, k, v, policy, outputs=False)
    assert (result.pattern == spec.DENSE).all() and (result.density == 1).all()
