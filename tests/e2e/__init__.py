"""The contract, tested from outside against a running prefilld."""

import spec  # noqa: F401 - settings that must come before numpy
