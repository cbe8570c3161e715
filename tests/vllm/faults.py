"""Every way in which KV can fail to come, under both of vLLM's policies: "recompute" must give
vLLM's own text, "fail" a 5xx with the reason, and neither may hang or leave anything behind.

    build/vllm-venv/bin/python tests/vllm/faults.py --count 10
"""

import argparse
import concurrent.futures
import dataclasses
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in
                ("client/python", "client/python/examples", "tests", "tests/vllm")]

import rig  # noqa: E402
from e2e import harness  # noqa: E402
from prefilld import PrefillClient  # noqa: E402
from vllm_server import VllmError, VllmServer, completion, free_port  # noqa: E402

PROMPT_TOKENS = 300
NEW_TOKENS = 16
LOAD_TIMEOUT_S = 20     # the connector's; a load takes a second
DEADLINE_S = 60         # of a request, from outside
LEASE_TTL_S = 0.5
# What the answer must say, by fault.
FAULTS = {
    "down": "UNAVAILABLE", "slow": "DEADLINE_EXCEEDED", "killed in a pull": "UNAVAILABLE",
    "lease expired": "NOT_FOUND", "other weights": "fingerprint", "other shape": "layers is 30",
    "wrong dtype": "f32 here, bf16 there", "chunk corrupted": "DATA_LOSS",
}


@dataclasses.dataclass
class Row:
    policy: str
    fault: str
    requests: int = 0
    right: int = 0       # vLLM's own text
    refused: int = 0     # 5xx with the reason
    wrong: int = 0       # another text, or an answer that explains nothing
    hung: int = 0        # not over within DEADLINE_S
    slowest_s: float = 0.0
    left: str = ""       # what was not as before
    example: str = ""

    @property
    def good(self):
        expected = self.right if self.policy == "recompute" else self.refused
        return expected == self.requests and not self.left


class Bench:
    """One prefilld behind a proxy, and the ways to break them."""

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)
        self._models = [*rig.variants(folder).items(), ("tiny", rig.FIXTURES / "base")]
        self._starts = 0
        self.server = None
        self.restart()
        self.proxy = rig.FaultyProxy(self.server.target)

    def restart(self):
        self._starts += 1
        self.server = harness.Server(
            "--kv_memory=256MiB", log_path=self._folder / f"prefilld{self._starts}.jsonl",
            models=[("smol", rig.MODEL), *self._models])
        self.footprint = self.server.footprint()

    def close(self):
        self.proxy.__exit__(None, None, None)
        self.server.__exit__(None, None, None)

    def kill(self):
        self.server.process.kill()
        self.server.process.wait()

    def params(self, fault, prompt):
        """kv_transfer_params for one request; sets the fault up."""
        through_proxy = {"target": self.proxy.target, "model": "smol", "method": "dense"}
        self.proxy.fault = {"slow": "stall", "chunk corrupted": "corrupt",
                            "killed in a pull": self.kill}.get(fault, "")
        if fault == "down":
            return {**through_proxy, "target": f"127.0.0.1:{free_port()}"}
        if fault == "lease expired":
            with PrefillClient(self.server.target) as client:
                prompt_ = client.prefill("smol", prompt, method="dense", lease_ttl=LEASE_TTL_S)
                assert prompt_.summary
                lease = dataclasses.asdict(prompt_.detach())
                fingerprint = prompt_.model.fingerprint
            harness.eventually(lambda: self.server.metric("prefilld_leases_active") == 0)
            return {"target": self.server.target, "lease": lease, "tokens": len(prompt),
                    "fingerprint": fingerprint}
        model = {"other weights": "other", "other shape": "tiny", "wrong dtype": "bf16"}.get(fault)
        return {**through_proxy, **({"model": model} if model else {})}


def run_row(bench, vllm, policy, fault, count, prompt, own_text):
    row = Row(policy, fault)

    def one(params):
        begin = time.monotonic()
        try:
            status, body = vllm.post("/v1/completions", DEADLINE_S, **completion(
                prompt, params, NEW_TOKENS))
        except TimeoutError:
            row.hung += 1
            return
        finally:
            row.requests += 1
            row.slowest_s = max(row.slowest_s, time.monotonic() - begin)
        if status == 200:
            if body["choices"][0]["token_ids"] == own_text:
                row.right += 1
            else:
                row.wrong += 1
        elif status >= 500 and FAULTS[fault] in str(body):
            row.refused += 1
            row.example = body["error"]["message"]
        else:
            row.wrong += 1
            row.example = str(body)

    if fault == "killed in a pull":
        for _ in range(count):
            one(bench.params(fault, prompt))
            bench.kill()
            bench.restart()
            bench.proxy.retarget(bench.server.target)
    else:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            list(threads.map(one, [bench.params(fault, prompt) for _ in range(count)]))
    bench.proxy.fault = ""
    row.left = leftovers(bench, vllm)
    return row


def leftovers(bench, vllm):
    """Empty when both sides are as before the first request."""
    def found():
        ours = bench.server.footprint()
        differences = [f"{key} {ours[key]:g} not {value:g}" for key, value in
                       bench.footprint.items() if ours[key] != value]
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting",
                     "vllm:prefilld_loads_running", "vllm:kv_cache_usage_perc"):
            if vllm.metric(name) != 0:
                differences.append(f"{name} {vllm.metric(name):g}")
        return ", ".join(differences)

    try:
        harness.eventually(lambda: not found(), timeout=15)
    except AssertionError:
        return found()
    return ""


def table(count, policies, folder, faults=tuple(FAULTS), report=lambda row: None):
    """A Row for every policy and fault, `count` requests each."""
    folder = pathlib.Path(folder)
    prompt = rig.text_ids()[1000:1000 + PROMPT_TOKENS]
    bench = Bench(folder)
    rows = []
    try:
        for policy in policies:
            with VllmServer(rig.MODEL, folder / f"vllm-{policy}.log", policy=policy, extra={
                    "timeout_s": LOAD_TIMEOUT_S, "transport": "grpc", "min_tokens": 16,
                    "allowed_targets": ["127.0.0.1"]},
                    flags=["--no-enable-prefix-caching"]) as vllm:
                own_text = vllm.complete(prompt, None, NEW_TOKENS)
                healthy = vllm.complete(prompt, bench.params("", prompt), NEW_TOKENS)
                if healthy != own_text:
                    raise VllmError(f"without any fault the text is {healthy}, not {own_text}")
                for fault in faults:
                    rows.append(run_row(bench, vllm, policy, fault, count, prompt, own_text))
                    report(rows[-1])
                if vllm.complete(prompt, bench.params("", prompt), NEW_TOKENS) != own_text:
                    raise VllmError("after all faults the text is another one")
    finally:
        bench.close()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="requests of each kind")
    parser.add_argument("--policy", nargs="*", default=["recompute", "fail"])
    parser.add_argument("--fault", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    args = parser.parse_args()
    print(f"{'policy':<11}{'fault':<18}{'requests':>9}{'own text':>9}{'5xx':>5}{'wrong':>6}"
          f"{'hung':>5}{'slowest s':>10}  left behind")

    def report(row):
        print(f"{row.policy:<11}{row.fault:<18}{row.requests:>9}{row.right:>9}{row.refused:>5}"
              f"{row.wrong:>6}{row.hung:>5}{row.slowest_s:>10.2f}  {row.left or 'nothing'}"
              + (f"\n{'':<29}{row.example}" if row.example else ""), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        rows = table(args.count, args.policy, folder, args.fault, report)
    good = all(row.good for row in rows)
    print("faults:", "OK" if good else "FAILED", f"requests={sum(r.requests for r in rows)} "
          f"wrong={sum(r.wrong for r in rows)} hung={sum(r.hung for r in rows)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
