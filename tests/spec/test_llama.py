"""The numpy llama against transformers, on the stored models of what it states."""

import json
import pathlib

import numpy as np
import pytest

from e2e import safetensors_file
from spec import llama
from spec import sparse_attention as spec

MODELS = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"


def is_stated(directory):
    config = json.loads((directory / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return config["model_type"] == "llama" and kind in ("default", "linear", "llama3")


@pytest.mark.parametrize("directory", sorted(p.parent for p in MODELS.glob("*/config.json")
                                             if is_stated(p.parent)), ids=lambda p: p.name)
def test_equals_transformers(directory):
    config = json.loads((directory / "config.json").read_text())
    weights = {}
    for file in directory.glob("model*.safetensors"):
        weights |= safetensors_file.load(file)
    expected = safetensors_file.load(directory / "expected.safetensors")
    keys, values, logits = llama.prefill(config, weights, expected["token_ids"].tolist(),
                                         spec.Policy("dense"))
    for got, name in ((np.stack(keys).transpose(0, 2, 1, 3), "k"),
                      (np.stack(values).transpose(0, 2, 1, 3), "v"), (logits, "logits")):
        assert np.linalg.norm(got - expected[name]) <= 1e-5 * np.linalg.norm(expected[name]), name
