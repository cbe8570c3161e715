"""vLLM's connector to prefilld: prompts are prefilled there, vLLM decodes from the KV it pulls.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "PrefilldConnector",
        "kv_connector_module_path": "prefilld.vllm", "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"target": "127.0.0.1:50051", "method": "joint"}}'

Settings and the parameters of a request: see settings.py, or docs/vllm.md.
"""

__all__ = ["PrefilldConnector"]


def __getattr__(name: str):
    # Not before vLLM asks for it: what needs no vLLM (settings.py) can be imported without.
    if name == "PrefilldConnector":
        from .connector import PrefilldConnector

        return PrefilldConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
