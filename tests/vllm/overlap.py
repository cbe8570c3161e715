"""What loading costs: a hand-off beside the prefill that it saves, and what the engine's decode
steps notice of eight loads at once.

    build/vllm-venv/bin/python tests/vllm/overlap.py
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import threading

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in
                ("client/python", "client/python/examples", "tests", "tests/vllm")]

import rig  # noqa: E402
from prefilld import PrefillClient  # noqa: E402
from vllm_server import VllmServer  # noqa: E402

PROMPT_TOKENS = 4096
LOADS = 8
DECODE_TOKENS = 160
ROUNDS = 5


def prefilled(client, prompt):
    """(kv_transfer_params of a finished cache, seconds that computing it took)"""
    run = client.prefill("smol", prompt, method="dense")
    seconds = sum(run.summary.seconds.values())
    return {"lease": dataclasses.asdict(run.detach()), "tokens": len(prompt),
            "fingerprint": run.model.fingerprint}, seconds


def load_seconds(vllm):
    return vllm.metric("vllm:prefilld_load_seconds_sum")


class Decode:
    """One request that decodes all the time; the gaps between its tokens."""

    def __init__(self, vllm, prompt):
        self._times = []
        self.started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(vllm, prompt))
        self._thread.start()

    def _run(self, vllm, prompt):
        for seconds, tokens in vllm.stream(prompt, {"min_tokens": 10 ** 6}, DECODE_TOKENS):
            if tokens:
                self._times.append(seconds)
            if len(self._times) == 10:
                self.started.set()

    def gaps_ms(self):
        self._thread.join()
        gaps = [1e3 * (b - a) for a, b in zip(self._times, self._times[1:])]
        return statistics.median(gaps), sorted(gaps)[int(0.95 * len(gaps))], max(gaps)


def handoff(client, vllm, ids, transport):
    """Medians over ROUNDS of a finished cache's way into vLLM's blocks, alone on the machine."""
    computed, loaded = [], []
    for i in range(ROUNDS):
        prompt = ids[i:i + PROMPT_TOKENS]
        params, seconds = prefilled(client, prompt)
        before = load_seconds(vllm)
        vllm.complete(prompt, params, tokens=1)
        computed.append(seconds)
        loaded.append(load_seconds(vllm) - before)
    prefill_s, load_s = statistics.median(computed), statistics.median(loaded)
    print(f"hand-off of {PROMPT_TOKENS} tokens over {transport}: {1e3 * load_s:.0f} ms (rounds "
          f"{', '.join(f'{1e3 * s:.0f}' for s in loaded)}), prefill {prefill_s:.2f} s: "
          f"{100 * load_s / prefill_s:.1f} %", flush=True)


def gaps(client, vllm, ids, transport):
    """Inter-token gaps with nothing else, with loads, and with the same prompts computed here."""
    short = ids[:64]
    vllm.complete(short, {"min_tokens": 10 ** 6}, tokens=8)
    leases = [prefilled(client, ids[i:i + PROMPT_TOKENS])[0] for i in range(LOADS)]

    def show(what, decode):
        median, high, most = decode.gaps_ms()
        print(f"inter-token gap, {what:<44} median {median:6.1f} ms  95% {high:6.1f}  "
              f"longest {most:7.1f}", flush=True)

    show("alone", Decode(vllm, short))
    decode = Decode(vllm, short)
    decode.started.wait()
    loads = [threading.Thread(target=vllm.complete, args=(ids[i:i + PROMPT_TOKENS], lease, 1))
             for i, lease in enumerate(leases)]
    for thread in loads:
        thread.start()
    show(f"{LOADS} x {PROMPT_TOKENS} tokens loaded over {transport}", decode)
    for thread in loads:
        thread.join()
    decode = Decode(vllm, short)
    decode.started.wait()
    local = threading.Thread(target=vllm.complete,
                             args=(ids[:PROMPT_TOKENS], {"min_tokens": 10 ** 6}, 1))
    local.start()
    show(f"1 x {PROMPT_TOKENS} tokens computed by vLLM itself", decode)
    local.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", nargs="*", default=["grpc", "posix_shm"])
    args = parser.parse_args()
    ids = rig.text_ids()
    for transport in args.transport:
        with tempfile.TemporaryDirectory() as folder, \
                rig.prefilld(pathlib.Path(folder) / "prefilld.jsonl", "--kv_memory=4GiB",
                             "--lease_ttl=10m") as server, \
                VllmServer(rig.MODEL, pathlib.Path(folder) / "vllm.log", flags=[
                    "--no-enable-prefix-caching"],
                    extra={"target": server.target, "transport": transport}) as vllm, \
                PrefillClient(server.target) as client:
            vllm.complete(ids[:300], {"method": "dense"}, tokens=2)
            handoff(client, vllm, ids, transport)
            gaps(client, vllm, ids, transport)
    return 0


if __name__ == "__main__":
    sys.exit(main())
