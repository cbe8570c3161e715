"""Stock vLLM from prefilld's KV against vLLM alone: dense must give the same tokens, of joint the
agreement is printed, with the divergence of the next token's distribution.

    build/vllm-venv/bin/python tests/vllm/exactness.py
"""

import argparse
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in
                ("client/python", "client/python/examples", "tests", "tests/vllm")]

import numpy as np  # noqa: E402

import rig  # noqa: E402
from prefilld import PrefillClient  # noqa: E402
from progress import Progress  # noqa: E402
from vllm_server import VllmServer  # noqa: E402

NEW_TOKENS = 96
AT_A_TIME = 8
SHORTEST, LONGEST = 200, 7000


def prompts(count):
    """Slices of a text, no two with the same start, of lengths spread evenly."""
    ids = rig.text_ids()
    lengths = np.linspace(SHORTEST, LONGEST, count).round().astype(int)
    return [ids[i * 7:i * 7 + n] for i, n in enumerate(lengths)]


def answers(folder, name, asked, extra=None, params=None):
    """(token IDs of each, prompt tokens by source)"""
    flags = ["--no-enable-prefix-caching"]
    with VllmServer(rig.MODEL, pathlib.Path(folder) / f"{name}.log", extra, flags=flags) as vllm, \
            Progress(name) as bar:
        texts = vllm.complete_all(asked, params, AT_A_TIME, tokens=NEW_TOKENS,
                                  done=lambda n: bar.update(n / len(asked), f"{n}/{len(asked)}"))
        return texts, vllm.prompt_tokens()


def divergence(target, prompt, gamma):
    """KL(dense || joint) of the token after the prompt, in nats."""
    def log_probabilities(**policy):
        with PrefillClient(target) as client, client.prefill(
                "smol", prompt, return_logits=True, **policy) as run:
            logits = run.logits.astype(np.float64)
        top = logits.max()
        return logits - top - np.log(np.exp(logits - top).sum())

    dense, joint = log_probabilities(method="dense"), log_probabilities(method="joint", gamma=gamma)
    return float((np.exp(dense) * (dense - joint)).sum())


def agreeing(a, b):
    return sum(x == y for x, y in zip(a, b, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="prompts")
    parser.add_argument("--gamma", type=float, default=0.95)
    parser.add_argument("--transport", default=None, choices=["grpc", "posix_shm", "cuda_ipc"])
    args = parser.parse_args()
    asked = prompts(args.count)
    with tempfile.TemporaryDirectory() as folder:
        alone, _ = answers(folder, "vLLM alone", asked)
        with rig.prefilld(pathlib.Path(folder) / "prefilld.jsonl") as server:
            extra = {"target": server.target, "timeout_s": 600, "transport": args.transport}
            dense, sources = answers(folder, "dense", asked, extra, {"method": "dense"})
            joint, joint_sources = answers(folder, "joint", asked, extra,
                                           {"method": "joint", "gamma": args.gamma})
            with Progress("divergence") as bar:
                divergences = []
                for i, prompt in enumerate(asked):
                    divergences.append(divergence(server.target, prompt, args.gamma))
                    bar.update((i + 1) / len(asked))
    print(f"{'tokens':>7}{'dense = alone':>15}{'joint = alone':>15}{'KL(dense||joint)':>18}")
    for prompt, a, d, j, kl in zip(asked, alone, dense, joint, divergences, strict=True):
        print(f"{len(prompt):>7}{f'{agreeing(a, d)}/{NEW_TOKENS}':>15}"
              f"{f'{agreeing(a, j)}/{NEW_TOKENS}':>15}{kl:>18.5f}")
    same = sum(a == d for a, d in zip(alone, dense, strict=True))
    good = same == len(asked) and sources["local_compute"] == len(asked)
    print(f"exactness: {'OK' if good else 'FAILED'} dense_equal={same}/{len(asked)} "
          f"computed_dense={sources['local_compute']} "
          f"computed_joint={joint_sources['local_compute']} "
          f"kl_mean={np.mean(divergences):.5f} joint_agree="
          f"{np.mean([agreeing(a, j) for a, j in zip(alone, joint, strict=True)]):.1f}"
          f"/{NEW_TOKENS}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
