"""K, V and logits of two builds on one model, byte for byte.

    python tests/bench/quality/same_kv.py --before=BUILD --after=BUILD --model=DIR
        [--lengths=1,129,700,1024] [--seed=0] [--self-check]

The prompts are random token IDs, a third of them said before, so that joint finds something. Exits
1 on any difference. --self-check gives the second server another last token, and succeeds when
every prompt is told.
"""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # tests/bench

from bench import progress  # noqa: E402
from report import table  # noqa: E402
from two_builds import clients, parser, same  # noqa: E402

from prefilld import PrefillClient  # noqa: E402

METHODS = ("dense", "flexprefill", "joint")


def prompt(vocab_size: int, tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, tokens])
    ids = rng.integers(0, vocab_size, tokens)
    again = rng.random(tokens) < 1 / 3
    ids[again] = ids[rng.integers(0, tokens, tokens)][again]
    return ids


def prefill(client: PrefillClient, ids: np.ndarray, method: str) -> dict[str, list]:
    with client.prefill("model", ids, method=method, return_logits=True, widen=False) as call:
        # Views of shared memory go with the lease: copies stay.
        layers = [(layer.k.copy(), layer.v.copy()) for layer in call]
        return {"k": [k for k, _ in layers], "v": [v for _, v in layers],
                "logits": [call.logits], "report": list(vars(call.summary.report).values())}


def main() -> int:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--model", type=pathlib.Path, required=True)
    flags.add_argument("--lengths", default="1,129,700,1024")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--self-check", action="store_true")
    args = flags.parse_args()
    if args.self_check:
        args.after = args.before
    vocab_size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    rows, differing = [], 0
    with clients(args, args.model.resolve()) as (before, after):
        for tokens in map(int, args.lengths.split(",")):
            for method in METHODS:
                ids = prompt(vocab_size, tokens, args.seed)
                progress(f"{method}, {tokens} tokens")
                old = prefill(before, ids, method)
                if args.self_check:
                    ids[-1] = (ids[-1] + 1) % vocab_size
                new = prefill(after, ids, method)
                marks = ["same" if len(old[what]) == len(new[what])
                         and all(map(same, old[what], new[what])) else "DIFFERS" for what in old]
                differing += "DIFFERS" in marks
                rows.append([method, tokens, len(old["k"]), *marks])
    print(table(["method", "tokens", "layers", "K", "V", "logits", "report"], rows))
    if args.self_check:
        print(f"another last token: told in {differing} of {len(rows)} prompts")
        return 0 if differing == len(rows) else 1
    print(f"{differing} of {len(rows)} prompts differ" if differing else "every bit is the same")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
