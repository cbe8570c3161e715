"""Stock vLLM and transformers on KV from a real prefilld. Needs the environment of
client/python/requirements-vllm.txt; SmolLM2 and the server are taken from the build directory."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
for folder in ("client/python", "client/python/examples", "tests", "tests/vllm"):
    sys.path.insert(0, str(ROOT / folder))

from rig import MODEL, text_ids  # noqa: E402


@pytest.fixture(scope="session")
def document():
    """Token IDs of a long text."""
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing: make demo makes it")
    return text_ids()
