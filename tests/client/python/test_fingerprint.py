"""The fingerprint on this side: the server's (tests/server/model/fingerprint_test.cc)."""

import json
import pathlib
import shutil

import pytest

from prefilld.fingerprint import fingerprint

MODELS = pathlib.Path(__file__).resolve().parents[2] / "fixtures" / "models"
GOLDEN = {
    "base": "9352059f8e1e73b4a2115ea4ef28fe1b6a48bb66b30e74b3a13b3f4d22107000",
    "bf16": "e06b2ecb80a914533ab593524e07bc08e872a0fddcbaad990d0e95b4bf6fed91",
    "biases": "a1d6637e1a8e2ca22dc1fc7cc165fcfeab889ebe5a468314ff4664d5ef09857a",
    "f16": "3f02ecc348f2d6e5a869c797c4286465ab068f8ed2ee1ec72657ab3827fe8029",
    "head_dim128": "c25a492ee8daa751bafe3bafd895e943878030bfb72bc3a18e135d3f88343e60",
    "head_dim96": "ff0d2d0aafa774410dcd4b1b2c38ad476b3cc1cdce1bbc3aed9c00de01c2af0b",
    "linear": "3b7b7be770c5f7e0b95446482fc233969da60369cbc8b7c43e127dc29c7430bb",
    "llama3": "d07e367ca3e8db0be78b2285980160251e4a7329ddb2f9889ce5cfbed0f8406c",
    "sharded": "c2da635403af88cd2e22a02854029ce8b9b8a058cdcd3c48bb8644815380c65b",
    "tied": "8c6960f9533fb088b3f340a3b0f97c11694866f7ba1fc074e51117cf8bfb02dd",
}
PARTIAL_INTERLEAVED = "2f6a3368e5e8c898c78133f4d74173cf087cf87cf9b2fe2108dea22f09c490a4"
PARTIAL = "3b9f7e76eb6962995e304a4a102ad604c894b23bbf9d9414873bb2df3d43824e"
INTERLEAVED = "861e5b9f07b6302438d3b2815666cbb66c4256bf55e49556f3d57dda74e0f18c"


def of(directory, **changes):
    shutil.copytree(MODELS / "base", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return fingerprint(directory)


@pytest.mark.parametrize("name", GOLDEN)
def test_of_a_full_rotation_in_halves_stays_what_it_was(name):
    assert fingerprint(MODELS / name) == GOLDEN[name]


@pytest.mark.parametrize(("changes", "golden"), [
    ({"partial_rotary_factor": 0.5, "rope_interleaved": True}, PARTIAL_INTERLEAVED),
    ({"partial_rotary_factor": 0.5}, PARTIAL),
    ({"rope_interleaved": True}, INTERLEAVED),
    ({"partial_rotary_factor": 1.0, "rope_interleaved": False}, GOLDEN["base"])])
def test_tells_partial_and_interleaved_rotations_apart(tmp_path, changes, golden):
    assert of(tmp_path / "model", **changes) == golden
