"""The fingerprint on this side: the server's (tests/server/model/fingerprint_test.cc)."""

import json
import math
import pathlib
import shutil

import pytest

from prefilld.fingerprint import fingerprint

MODELS = pathlib.Path(__file__).resolve().parents[2] / "fixtures" / "models"
GOLDEN = {
    "base": "9352059f8e1e73b4a2115ea4ef28fe1b6a48bb66b30e74b3a13b3f4d22107000",
    "bf16": "e06b2ecb80a914533ab593524e07bc08e872a0fddcbaad990d0e95b4bf6fed91",
    "biases": "a1d6637e1a8e2ca22dc1fc7cc165fcfeab889ebe5a468314ff4664d5ef09857a",
    "dynamic": "3e6adf865c7ab9625dfa9eb9983fc22137e951e254a8ccb322fccee42b04c5c4",
    "f16": "3f02ecc348f2d6e5a869c797c4286465ab068f8ed2ee1ec72657ab3827fe8029",
    "glm": "33df4f4f7b86f3eddf494478fa2279987442c4ebaa787d915515d2656e39b525",
    "glm_bf16": "cf0e9f3b7ba70ed68e396575199c8ab6be12d79e82d63df0f0cb2119b5d0d3af",
    "head_dim128": "c25a492ee8daa751bafe3bafd895e943878030bfb72bc3a18e135d3f88343e60",
    "head_dim96": "ff0d2d0aafa774410dcd4b1b2c38ad476b3cc1cdce1bbc3aed9c00de01c2af0b",
    "linear": "3b7b7be770c5f7e0b95446482fc233969da60369cbc8b7c43e127dc29c7430bb",
    "llama3": "d07e367ca3e8db0be78b2285980160251e4a7329ddb2f9889ce5cfbed0f8406c",
    "mistral": "21b09a209283ccbf7a2a852faf2bb92ffb4dd2bf3ce07659920c028b8b39ecb2",
    "mistral_dynamic_bf16": "c1b6d06881bfa9ca6cddd301be431826e821d0b5c597edba372c178145befcd1",
    "qwen2": "0adb1f846fc1c8d75769d757e31d01beba00e1905d74d5415191de336a1ab701",
    "qwen2_yarn_bf16": "50733281cd586a0f9e9a7db2ca4d30cecbf3b887c1e7c5fc7ae75a3a58185aca",
    "qwen3": "18ac7ec58423be67f93a174e3fd92a35707d94e5e25d0297e742003cec095134",
    "qwen3_bf16": "14ad75b7827ce86e3d7436b0e21773f0cca2e108631f2e917db629324d987b99",
    "sharded": "c2da635403af88cd2e22a02854029ce8b9b8a058cdcd3c48bb8644815380c65b",
    "tied": "8c6960f9533fb088b3f340a3b0f97c11694866f7ba1fc074e51117cf8bfb02dd",
    "yarn": "2a172ecfb7a3cff0fe4df257365fac4dd434dc1c6c2dc2d5950c537017e99ce5",
}
PARTIAL_INTERLEAVED = "2f6a3368e5e8c898c78133f4d74173cf087cf87cf9b2fe2108dea22f09c490a4"
PARTIAL = "3b9f7e76eb6962995e304a4a102ad604c894b23bbf9d9414873bb2df3d43824e"
INTERLEAVED = "861e5b9f07b6302438d3b2815666cbb66c4256bf55e49556f3d57dda74e0f18c"


def of(directory, model="base", **changes):
    shutil.copytree(MODELS / model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return fingerprint(directory)


@pytest.mark.parametrize("name", GOLDEN)
def test_stays_what_it_was(name):
    assert fingerprint(MODELS / name) == GOLDEN[name]


def test_of_every_fixture_is_known():
    assert sorted(GOLDEN) == sorted(path.parent.name for path in MODELS.glob("*/config.json"))


@pytest.mark.parametrize(("changes", "golden"), [
    ({"partial_rotary_factor": 0.5, "model_type": "glm"}, PARTIAL_INTERLEAVED),
    ({"model_type": "glm"}, PARTIAL_INTERLEAVED),
    ({"partial_rotary_factor": 0.5}, PARTIAL),
    ({"partial_rotary_factor": 1.0, "model_type": "glm"}, INTERLEAVED),
    ({"partial_rotary_factor": 1.0}, GOLDEN["base"])])
def test_tells_partial_and_interleaved_rotations_apart(tmp_path, changes, golden):
    assert of(tmp_path / "model", **changes) == golden


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope", [
    YARN | {"factor": 5.0}, YARN | {"original_max_position_embeddings": 65},
    YARN | {"beta_fast": 31.0}, YARN | {"beta_slow": 2.0}, YARN | {"truncate": False},
    YARN | {"attention_factor": 1.0}, YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
    {"rope_type": "dynamic", "factor": 4.0}], ids=str)
def test_tells_every_parameter_of_a_scaling_apart(tmp_path, rope):
    assert of(tmp_path / "model", "yarn", rope_scaling=rope) != GOLDEN["yarn"]


@pytest.mark.parametrize("rope", [
    YARN | {"type": "yarn"}, YARN | {"beta_fast": 32, "beta_slow": 1, "truncate": True},
    YARN | {"mscale": 2.0}, YARN | {"attention_factor": 0.1 * math.log(4) + 1}], ids=str)
def test_is_the_same_where_the_same_is_said_otherwise(tmp_path, rope):
    assert of(tmp_path / "model", "yarn", rope_scaling=rope) == GOLDEN["yarn"]
