"""The contract, generated from proto/prefilld/v1 by generate.py."""
