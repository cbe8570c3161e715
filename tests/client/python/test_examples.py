"""The parts of the demo that are easy to get subtly wrong."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

EXAMPLES = str(pathlib.Path(__file__).resolve().parents[3] / "client/python/examples")
sys.path.insert(0, EXAMPLES)

from convert_smollm2 import unpermute  # noqa: E402
from llama_numpy import LayerCache, Llama  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from tokenizer import Tokenizer, byte_alphabet  # noqa: E402


@pytest.fixture
def tokenizer(tmp_path):
    """All bytes but 0x1d, some merges, one special token."""
    alphabet = byte_alphabet()
    merges = [("a", "b"), ("Ġ", "ab"), ("Ġ", "Ġ"), ("'", "s"), ("ab", "ab"), ("1", "2"), ("Ċ", "Ċ")]
    vocab = [alphabet[b] for b in range(256) if b != 0x1D] + [x + y for x, y in merges] + ["<end>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "model": {"vocab": {token: i for i, token in enumerate(vocab)}, "merges": merges},
        "added_tokens": [{"id": len(vocab) - 1, "content": "<end>"}],
    }), encoding="utf-8")
    made = Tokenizer(tmp_path)
    made.pieces = lambda text: [vocab[i] for i in made.encode(text)]
    return made


@pytest.mark.parametrize("text, pieces", [
    ("abab ab", ["abab", "Ġab"]),
    ("ab  ab", ["ab", "Ġ", "Ġab"]),              # the last space belongs to the word
    ("12", ["1", "2"]),                          # digits one by one, whatever the merges say
    ("ab  1", ["ab", "ĠĠ", "1"]),                # but a digit takes no space
    ("ab's", ["ab", "'s"]),
    ("ab\n\n ab", ["ab", "ĊĊ", "Ġab"]),
    ("<end>ab", ["<end>", "ab"]),
    ("a\x1db", ["a", "b"]),                      # a byte the vocabulary lacks; words stay apart
    ("½²", ["Â", "½", "Â", "²"]),
])
def test_pieces(tokenizer, text, pieces):
    assert tokenizer.pieces(text) == pieces


@pytest.mark.parametrize("text", ["abé 中\u2003😀 12\n <end> ab", "", " \t\r\n", "\u00a0½Ⅷ٣"])
def test_decode_is_the_inverse(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unpermuted_rows_rotate_alike():
    """Interleaved rotation of the stored rows = rotate-half of the unpermuted ones, reordered."""
    heads, dim = 2, 8
    stored = np.random.default_rng(3).standard_normal((heads * dim, 1))
    angles = np.arange(1, dim // 2 + 1) * 0.3
    cos, sin = np.cos(angles), np.sin(angles)
    pairs = stored.reshape(heads, dim // 2, 2)
    interleaved = np.stack([pairs[..., 0] * cos - pairs[..., 1] * sin,
                            pairs[..., 1] * cos + pairs[..., 0] * sin], axis=-1)
    half = unpermute(stored, heads).reshape(heads, 2, dim // 2)
    rotated = np.stack([half[:, 0] * cos - half[:, 1] * sin,
                        half[:, 1] * cos + half[:, 0] * sin], axis=1)
    np.testing.assert_allclose(rotated.swapaxes(1, 2), interleaved, rtol=1e-12)


def test_decoder_equals_attention_over_the_whole_prompt(tmp_path):
    """Token by token from a cache = one pass over all tokens, written out the slow way."""
    rng = np.random.default_rng(11)
    layers, q_heads, kv_heads, dim, hidden, inner, vocab, tokens = 2, 4, 2, 8, 32, 48, 50, 7
    config = {"num_hidden_layers": layers, "num_attention_heads": q_heads, "rms_norm_eps": 1e-5,
              "num_key_value_heads": kv_heads, "head_dim": dim, "eos_token_id": 0,
              "rope_theta": 100.0, "rope_scaling": None, "tie_word_embeddings": True}
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    for i in range(layers):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q_heads * dim, hidden),
            "self_attn.o_proj": (hidden, q_heads * dim),
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.v_proj": (kv_heads * dim, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner)}.items()})
    weights = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) / 3
               for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))

    ids = rng.integers(0, vocab, tokens)
    model = Llama(tmp_path)
    empty = np.empty((kv_heads, 0, dim), np.float32)
    caches = [LayerCache(empty, empty, 0, tokens) for _ in range(layers)]
    stepped = [model.step(token, position, caches) for position, token in enumerate(ids)]

    wanted = whole_prompt(weights, ids, config)
    for position in range(tokens):
        np.testing.assert_allclose(stepped[position], wanted[position], rtol=2e-4, atol=2e-4)


def whole_prompt(weights, ids, config):
    """Logits [tokens, vocab] in double precision."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    dim = config["head_dim"]
    groups = config["num_attention_heads"] // config["num_key_value_heads"]

    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]

    def rotate(x):  # [tokens, heads, dim]: pair (c, c + dim/2) as a complex number
        turns = np.exp(1j * np.arange(len(x))[:, None] * 100.0 ** (-np.arange(0, dim, 2) / dim))
        turned = (x[..., :dim // 2] + 1j * x[..., dim // 2:]) * turns[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = w["model.embed_tokens.weight"][ids]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = ((y @ w[f"{layer}.self_attn.{n}_proj.weight"].T).reshape(len(ids), -1, dim)
                   for n in "qkv")
        q, k = rotate(q), rotate(k).repeat(groups, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim) + mask
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v.repeat(groups, axis=1))
        x = x + out.reshape(len(ids), -1) @ w[f"{layer}.self_attn.o_proj.weight"].T
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate = y @ w[f"{layer}.mlp.gate_proj.weight"].T
        up = y @ w[f"{layer}.mlp.up_proj.weight"].T
        x = x + gate / (1 + np.exp(-gate)) * up @ w[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w["model.embed_tokens.weight"].T


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_the_demo_on_a_gpu_says_in_a_line_what_it_lacks(missing, tmp_path):
    script = (f"import runpy, sys; sys.modules[{missing!r}] = None; "
              f"sys.argv = ['demo_gpu.py', '--build={tmp_path}']; "
              f"sys.path.insert(0, {EXAMPLES!r}); "
              f"runpy.run_path({EXAMPLES + '/demo_gpu.py'!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("demo-gpu: FAILED: torch and transformers are needed: ")
