import pathlib
import sys

import pytest

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "client" / "python"))
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))  # certificates

from fake_server import FakeServer  # noqa: E402
from prefilld import PrefillClient, RetryPolicy  # noqa: E402


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.stop()
    fake.handout.close()


@pytest.fixture
def client(server):
    with PrefillClient(server.target, retry=RetryPolicy(attempts=4, initial_backoff=0.01)) as c:
        yield c
