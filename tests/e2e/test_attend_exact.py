"""`prefillctl attend` computes what docs/sparse-attention.md says: index, output, LSE, mass."""

import json

import numpy as np
import pytest

from e2e import harness, safetensors_file
from spec import inputs
from spec import sparse_attention as spec

LENGTHS = (1, 127, 128, 129, 300, 1000, 2049, 4097)
OUTPUT_ERROR = {"F32": 1e-5, "BF16": 1e-2, "F16": 2e-3}
LSE_ERROR = 1e-3
MASS_ERROR = 1e-3


def flags(policy):
    names = {"method": policy.method, "gamma": policy.gamma, "tau": policy.tau,
             "min_budget": policy.min_budget, "max_budget": policy.max_budget,
             "block_size": policy.block_size, "min_captured_mass": policy.min_captured_mass}
    return [f"--{name}={value}" for name, value in names.items() if value is not None]


def run_cli(server, folder, arrays, dtype, policy, cu_q=None, cu_k=None, more=()):
    """(outputs, the JSON object that it prints)."""
    tensors = {name: (x, dtype) for name, x in zip("qkv", arrays)}
    if cu_q is not None:
        tensors["cu_seqlens_q"] = np.array(cu_q, np.int32)
        tensors["cu_seqlens_k"] = np.array(cu_k, np.int32)
    safetensors_file.save(folder / "in.safetensors", tensors)
    done = harness.prefillctl(
        server, "--json", "attend", f"--in={folder}/in.safetensors",
        f"--out={folder}/out.safetensors", "--return_index", *flags(policy), *more)
    return safetensors_file.load(folder / "out.safetensors"), json.loads(done.stdout)


def index_rows(out):
    """rows[h][i]: the ascending key blocks; padding must be -1."""
    count, index = out["block_count"], out["block_index"]
    assert count.dtype == index.dtype == np.int32
    assert count.shape == index.shape[:2]
    padding = np.arange(index.shape[2])[None, None, :] >= count[:, :, None]
    assert (index[padding] == -1).all() and (index[~padding] >= 0).all()
    return [[index[h, i, :count[h, i]].tolist() for i in range(count.shape[1])]
            for h in range(count.shape[0])]


def assert_same_rows(got, expected):
    for h, (got_head, expected_head) in enumerate(zip(got, expected, strict=True)):
        for i, (a, b) in enumerate(zip(got_head, expected_head, strict=True)):
            assert a == b, f"head {h} row {i}: extra {set(a) - set(b)}, missing {set(b) - set(a)}"


def assert_close(name, got, expected, limit, relative=False):
    """Frobenius error, or the largest absolute one; names the worst element."""
    difference = np.abs(got.astype(np.float64) - expected)
    error = np.linalg.norm(difference) / np.linalg.norm(expected) if relative else difference.max()
    worst = np.unravel_index(difference.argmax(), difference.shape)
    assert error <= limit, (f"{name}: error {error:.3g} > {limit:.3g}; worst at {worst}: "
                            f"{got[worst]} instead of {expected[worst]}")


def check(server, folder, arrays, dtype, policy, cu_q=None, cu_k=None, softmax_scale=None):
    more = [] if softmax_scale is None else [f"--softmax_scale={softmax_scale}"]
    stored = [inputs.rounded(x, dtype) for x in arrays]
    out, printed = run_cli(server, folder, stored, dtype, policy, cu_q, cu_k, more)
    # Where the server's index equals the specification's, the same run is the reference of the
    # output too; the comparison of indices comes first and says where they part.
    expected = spec.run(*stored, policy, softmax_scale, cu_q, cu_k)
    assert_same_rows(index_rows(out), expected.rows)
    ragged = cu_q is not None
    pattern = expected.pattern if ragged else expected.pattern[0]
    mass = expected.captured_mass if ragged else expected.captured_mass[0]
    assert out["pattern"].dtype == np.uint8
    np.testing.assert_array_equal(out["pattern"], pattern)
    assert out["o"].shape == stored[0].shape and out["lse"].dtype == np.float32
    assert_close("o", out["o"], expected.o, OUTPUT_ERROR[dtype], relative=True)
    assert_close("lse", out["lse"], expected.lse, LSE_ERROR)
    if policy.method == "joint":
        assert_close("captured_mass", out["captured_mass"], mass, MASS_ERROR)
    assert printed["density"] == pytest.approx(expected.density.mean(), abs=1e-4)
    return out


@pytest.mark.parametrize("family", inputs.FAMILIES)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("method", ["joint", "flexprefill"])
def test_families(server, tmp_path, method, tokens, family):
    heads = (2, 1) if tokens > 2048 else (4, 2)
    arrays = inputs.make(family, tokens, *heads)
    policy = spec.Policy(method, .9, min_budget=128 if method == "flexprefill" else None)
    check(server, tmp_path, arrays, "F32", policy)


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("method", ["dense", "flexprefill", "joint"])
def test_dtypes_and_head_dims(server, tmp_path, method, dtype, d):
    arrays = inputs.make("sink", 1000, 4, 2, d)
    check(server, tmp_path, arrays, dtype, spec.Policy(method, .9, min_budget=128))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("tokens", [1, 127, 129, 2049])
def test_dense_lengths(server, tmp_path, tokens, dtype):
    check(server, tmp_path, inputs.make("random", tokens, 2, 1), dtype, spec.Policy("dense"))


@pytest.mark.parametrize("family", inputs.FAMILIES)
@pytest.mark.parametrize("tokens", [2048, 2100])
def test_query_aware_heads(server, tmp_path, family, tokens):
    # tau = 1 makes every head query-aware whose estimates hold no exact zero.
    check(server, tmp_path, inputs.make(family, tokens), "F32",
          spec.Policy("flexprefill", .93, tau=1.0, min_budget=256))


@pytest.mark.parametrize("tokens", [1000, 1025, 2049])
def test_published_budget_of_flexprefill(server, tmp_path, tokens):
    check(server, tmp_path, inputs.make("sink", tokens), "BF16", spec.Policy("flexprefill", .95))


@pytest.mark.parametrize("method", ["joint", "flexprefill"])
@pytest.mark.parametrize("changes", [
    {"gamma": .05}, {"gamma": .5}, {"gamma": .8}, {"gamma": .95}, {"gamma": .999},
    {"block_size": 64}, {"max_budget": 640}, {"max_budget": 200},
    {"min_budget": 700}, {"min_captured_mass": .93},
], ids=str)
def test_parameters(server, tmp_path, method, changes):
    defaults = {"gamma": .9, "min_budget": 128}
    check(server, tmp_path, inputs.make("needle", 1500), "F32",
          spec.Policy(method, **(defaults | changes)))


@pytest.mark.parametrize("method", ["dense", "joint"])
@pytest.mark.parametrize("prefix,tokens", [(1, 1), (127, 2), (128, 128), (300, 1), (300, 700),
                                           (1000, 45), (1337, 900)])
def test_fewer_queries_than_keys(server, tmp_path, method, prefix, tokens):
    arrays = inputs.make("sink", tokens, prefix=prefix)
    check(server, tmp_path, arrays, "F32", spec.Policy(method, .9))


@pytest.mark.parametrize("method", ["dense", "flexprefill", "joint"])
def test_ragged_batch(server, tmp_path, method):
    cu = [0, 1, 130, 1130, 1430]
    check(server, tmp_path, inputs.make("sink", 1430), "F32",
          spec.Policy(method, .9, min_budget=128), cu, cu)


@pytest.mark.parametrize("method", ["dense", "joint"])
def test_ragged_batch_with_prefixes(server, tmp_path, method):
    cu_q, cu_k = [0, 5, 300, 700], [0, 400, 800, 1200]
    q, k, v = inputs.make("needle", 1200)
    check(server, tmp_path, [q[:700], k, v], "BF16", spec.Policy(method, .9), cu_q, cu_k)


@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (9, 3), (8, 1)], ids=str)
def test_grouped_heads(server, tmp_path, heads):
    check(server, tmp_path, inputs.make("band", 600, *heads), "F32", spec.Policy("joint", .9))


@pytest.mark.parametrize("scale", [.02, .5])
@pytest.mark.parametrize("method", ["dense", "joint", "flexprefill"])
def test_softmax_scale(server, tmp_path, method, scale):
    check(server, tmp_path, inputs.make("random", 700), "F32",
          spec.Policy(method, .9, min_budget=128), softmax_scale=scale)


def test_same_input_same_bytes(server, tmp_path):
    arrays = inputs.make("random", 1000)
    first, _ = run_cli(server, tmp_path, arrays, "BF16", spec.Policy("joint"))
    second, _ = run_cli(server, tmp_path, arrays, "BF16", spec.Policy("joint"))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_zero_input_is_vertical_slash_at_4_blocks_and_query_aware_from_8(server, tmp_path):
    for blocks, code in ((4, spec.VERTICAL_SLASH), (8, spec.QUERY_AWARE), (32, spec.QUERY_AWARE)):
        out = check(server, tmp_path, inputs.make("zero", blocks * 128, 2, 1), "F32",
                    spec.Policy("flexprefill", .95, min_budget=128))
        assert (out["pattern"] == code).all()


def test_logits_beyond_the_range_of_exp_do_not_overflow(server, tmp_path):
    q, k, v = inputs.make("random", 300)
    check(server, tmp_path, [6 * q, 6 * k, v], "F32", spec.Policy("dense"))
