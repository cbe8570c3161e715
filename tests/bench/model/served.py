"""A prefilld with one model, for a `with` block: what the measurements of this folder ask."""

import contextlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "client/python"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # tests/bench

from bench import Server  # noqa: E402
from e2e import harness  # noqa: E402

MODEL = "model"
START_S = 300  # many gigabytes are read, hashed and sent to the device


@contextlib.contextmanager
def server(directory: pathlib.Path, backend: str, longest: int, flags: list[str] = (),
           transports: Sequence[str] = ()) -> Iterator[Server]:
    """Its KV memory holds two prompts of `longest` tokens: one goes as the next one comes. So does
    the GPU's, where cuda_ipc is one of the transports."""
    config = json.loads((directory / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    width = (config.get("num_key_value_heads") or heads) * head_dim
    size = 4 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2
    kv_bytes = 2 * 2 * size * config["num_hidden_layers"] * width * (longest + 128)
    room = f"{kv_bytes // 2**20 + 64}MiB"
    on_device = room if "cuda_ipc" in transports else "0"
    flags = [f"--kv_memory={room}", *flags]
    if backend == "cuda":
        flags.insert(0, f"--kv_device_memory={on_device}")
    harness.START_TIMEOUT_S = START_S
    with tempfile.TemporaryDirectory() as logs, Server(
            f"--backend={backend}", *flags,
            log_path=pathlib.Path(logs) / "prefilld.jsonl",
            models=[(MODEL, directory.resolve())]) as running:
        yield running


def token_ids(path: pathlib.Path | None, tokens: int, directory: pathlib.Path) -> np.ndarray:
    """The first of a JSON array, or random ones."""
    if path is None:
        vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
        return np.random.default_rng(tokens).integers(0, vocabulary, tokens)
    ids = json.loads(path.read_text())
    if len(ids) < tokens:
        sys.exit(f"{path} has {len(ids)} tokens, not {tokens}")
    return np.array(ids[:tokens])
