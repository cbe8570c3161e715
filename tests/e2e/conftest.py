"""One server for most tests; every test leaves it as it found it.

The binaries are taken from the build directory in PREFILLD_BUILD (default: build/).
"""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "client" / "python"))  # runs from a checkout, installed or not

from e2e import attending, checkpoints, harness, prefilling  # noqa: E402

KV_MEMORY_MIB = 64
FIXTURES = sorted(path.parent for path in (ROOT / "tests/fixtures/models").glob("*/config.json"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes or gigabytes; not in the default run")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow: select with -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random llama model: object with directory, config, weights."""
    return checkpoints.Checkpoint.create(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shared_server(tiny, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.jsonl"
    models = [("tiny", tiny.directory)] + [(path.name, path) for path in FIXTURES]
    with harness.Server(f"--kv_memory={KV_MEMORY_MIB}MiB", log_path=log, models=models) as server:
        warm_up(server)
        at_rest = server.footprint()
        yield server
        assert server.footprint() == at_rest


def warm_up(server):
    """Makes the thread pools and workspaces exist, so that later counts compare."""
    for _ in range(2):
        attending.attend(server.prefill, *attending.small(tokens=300))
        with prefilling.prefilled(server, [1, 2, 3]):
            pass


@pytest.fixture
def server(shared_server):
    """The shared server; afterwards no block, lease, job, descriptor or thread may be left."""
    with harness.leaves_nothing_behind(shared_server):
        yield shared_server


@pytest.fixture
def start_server(tmp_path):
    """Starts servers of the test's own: start_server("--flag=...", models=[(name, dir)])."""
    count = 0

    def start(*flags, models=(), **how):
        nonlocal count
        count += 1
        return harness.Server(*flags, log_path=tmp_path / f"log{count}.jsonl", models=models,
                              **how)

    return start


@pytest.fixture
def qkv():
    """Small arrays that an Attend accepts."""
    return attending.small(tokens=300)
