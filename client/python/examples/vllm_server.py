"""vLLM's OpenAI server on a free port, with or without prefilld's connector: for the demo and the
tests. On CPUs, greedy, float32."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60
REQUEST_TIMEOUT_S = 600
NAME = "smol"


class VllmError(Exception):
    """vLLM did not start or answered with an error; in one line, or with the end of its log."""


class VllmServer:
    """Use as a context manager, which waits until it serves and stops it at the end."""

    def __init__(self, model_dir: str | pathlib.Path, log_path: str | pathlib.Path,
                 extra: dict[str, Any] | None = None, policy: str = "recompute",
                 flags: Sequence[str] = (), waiting: Callable[[float], None] = lambda _: None):
        """extra: kv_connector_extra_config; None: without the connector. policy: what vLLM does
        about KV that does not come, "recompute" or "fail". waiting(seconds): while it starts."""
        self._waiting = waiting
        self.log_path = pathlib.Path(log_path)
        self.port = free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model_dir}",
            f"--served-model-name={NAME}", "--host=127.0.0.1", f"--port={self.port}",
            "--dtype=float32", "--enforce-eager", "--max-model-len=8192", *flags]
        if extra is not None:
            command.append("--kv-transfer-config=" + json.dumps({
                "kv_connector": "PrefilldConnector", "kv_connector_module_path": "prefilld.vllm",
                "kv_role": "kv_consumer", "kv_load_failure_policy": policy,
                "kv_connector_extra_config": extra}))
        environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0",
            "PYTHONPATH": str(PACKAGE)}
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                            env=environment, start_new_session=True)

    def __enter__(self) -> "VllmServer":
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            if kind is None:
                raise VllmError(f"vLLM did not stop within {STOP_TIMEOUT_S} s of SIGTERM") from None

    def kill(self) -> None:
        """Its whole session: the engine runs in processes of its own."""
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait_ready(self) -> None:
        begin = time.monotonic()
        while True:
            self._waiting(time.monotonic() - begin)
            if self.process.poll() is not None:
                raise VllmError(f"vLLM ended with status {self.process.returncode}; the end of its "
                                f"log {self.log_path}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(self._url("/health"), timeout=5):
                    return
            except OSError:
                if time.monotonic() > begin + START_TIMEOUT_S:
                    raise VllmError(f"vLLM does not serve after {START_TIMEOUT_S} s; the end of its"
                                    f" log {self.log_path}:\n{self.log_tail()}") from None
                time.sleep(0.5)

    def log_tail(self, size: int = 4000) -> str:
        return self.log_path.read_text(errors="replace")[-size:]

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _call(self, path: str, body: dict[str, Any], timeout: float):
        return urllib.request.urlopen(urllib.request.Request(
            self._url(path), json.dumps({"model": NAME, **body}).encode(),
            {"Content-Type": "application/json"}), timeout=timeout)

    def post(self, path: str, timeout: float = REQUEST_TIMEOUT_S,
             **body: Any) -> tuple[int, dict[str, Any]]:
        """(status, parsed body)"""
        try:
            with self._call(path, body, timeout) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def complete(self, prompt: list[int], params: dict[str, Any] | None = None, tokens: int = 96,
                 **fields: Any) -> list[int]:
        """The token IDs that follow `prompt`. params: kv_transfer_params."""
        status, body = self.post("/v1/completions", **completion(prompt, params, tokens, **fields))
        if status != 200:
            raise VllmError(f"vLLM answered {status}: {body}")
        return body["choices"][0]["token_ids"]

    def complete_all(self, prompts: Sequence[list[int]], params: dict[str, Any] | None = None,
                     at_a_time: int = 8, done: Callable[[int], None] = lambda _: None,
                     **fields: Any) -> list[list[int]]:
        """complete() of each, several at a time; done(count) after each."""
        with concurrent.futures.ThreadPoolExecutor(at_a_time) as threads:
            runs = [threads.submit(self.complete, p, params, **fields) for p in prompts]
            for count, _ in enumerate(concurrent.futures.as_completed(runs), start=1):
                done(count)
            return [run.result() for run in runs]

    def stream(self, prompt: list[int], params: dict[str, Any] | None = None, tokens: int = 96,
               **fields: Any) -> Iterator[tuple[float, list[int]]]:
        """(seconds since the request, token IDs), piece by piece."""
        begin = time.monotonic()
        with self._call("/v1/completions", {"stream": True, **completion(
                prompt, params, tokens, **fields)}, REQUEST_TIMEOUT_S) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    piece = json.loads(line[len(b"data: "):])
                    if "error" in piece:
                        raise VllmError(str(piece["error"]))
                    yield time.monotonic() - begin, piece["choices"][0]["token_ids"] or []

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """{(name, ((label, value), ...)): number}"""
        with urllib.request.urlopen(self._url("/metrics"), timeout=10) as reply:
            text = reply.read().decode()
        samples = {}
        for line in text.splitlines():
            found = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line)
            if found:
                labels = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or "")
                samples[found[1], tuple(sorted(labels))] = float(found[3])
        return samples

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all series of `name` that carry these labels."""
        wanted = set(labels.items())
        return sum(value for (found, pairs), value in self.metrics().items()
                   if found == name and wanted <= set(pairs))

    def prompt_tokens(self) -> dict[str, int]:
        """By where their KV came from: local_compute, local_cache_hit, external_kv_transfer."""
        return {dict(labels)["source"]: int(value) for (name, labels), value
                in self.metrics().items() if name == "vllm:prompt_tokens_by_source_total"}


def completion(prompt: list[int], params: dict[str, Any] | None, tokens: int,
               **fields: Any) -> dict[str, Any]:
    """The body of a greedy completion request."""
    handed = {} if params is None else {"kv_transfer_params": params}
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **handed, **fields}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
