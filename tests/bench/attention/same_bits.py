"""Attend of two builds, bit for bit, on random inputs.

    python tests/bench/attention/same_bits.py --before=BUILD --after=BUILD [--backend=cuda]
        [--inputs=2000] [--seed=0] [--self-check]

Both servers are started here. An input is a number: --seed=S --inputs=1 runs S again. Methods,
dtypes, head_dims, groups, block sizes, budgets, ragged batches and prefixes are drawn, lengths
often at the edge of a block, data of every family of tests/spec and what they lack: equal keys,
large amplitudes, NaN and infinities. Compared are the block index, o, lse, pattern, captured
mass and the report; refusals by their message. Exits 1 on any difference.

--self-check compares the build of --before with itself, a single bit of v changed for the second
server, and succeeds when o differs in every input where that must show.
"""

import collections
import dataclasses
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # tests/bench

from bench import progress  # noqa: E402
from report import table  # noqa: E402
from spec import inputs  # noqa: E402
from two_builds import clients, parser, same  # noqa: E402

from prefilld import PrefillClient, PrefilldError  # noqa: E402

DTYPES = {"cpu": ("F32", "BF16", "F16"), "cuda": ("BF16", "F16")}
HEAD_DIMS = (64, 96, 128, 256)
FAMILIES = (*inputs.FAMILIES, "ties", "large", "broken")
TOKENS_MAX = 3000
KINDS = ("index", "o", "lse", "report", "refusal")


@dataclasses.dataclass
class Input:
    method: str
    family: str
    dtype: str
    lengths: list[tuple[int, int]]  # (queries, keys) of each sequence
    q_heads: int
    kv_heads: int
    d: int
    options: dict

    def __str__(self) -> str:
        return (f"{self.method}, {self.family}, {self.dtype}, (Sq, Sk) {self.lengths}, heads "
                f"{self.q_heads}/{self.kv_heads}, d {self.d}, {self.options}")


def draw(rng: np.random.Generator, backend: str) -> Input:
    method = str(rng.choice(["joint", "flexprefill", "dense"], p=[.45, .35, .2]))
    block = int(rng.choice([64, 128]))
    group, kv_heads = int(rng.choice([1, 2, 3, 4, 7])), int(rng.choice([1, 1, 2, 3]))
    options = {"method": method, "block_size": block, "gamma": float(rng.choice(
        [.05, .5, .8, .9, .95, .99, rng.uniform(.01, .999)]))}
    if rng.random() < .6:
        options["tau"] = float(rng.choice([0, .1, .3, 1, rng.random()]))
    if rng.random() < .6:
        options["min_budget_tokens"] = int(rng.choice([0, 1, block, 129, rng.integers(2000)]))
    if rng.random() < .3:
        options["max_budget_tokens"] = int(rng.integers(1, 1500)) + options.get(
            "min_budget_tokens", 1024)
    if rng.random() < .2:
        options["min_captured_mass"] = float(rng.uniform(.5, 1))
    if rng.random() < .8:
        options["report_level"] = str(rng.choice(["captured_mass", "captured_mass", "density"]))
    d = int(rng.choice(HEAD_DIMS))
    if rng.random() < .3:
        options["softmax_scale"] = float(rng.uniform(.3, 3) / d**.5)
    sequences = int(rng.choice([1, 1, 1, 2, 3, 4]))
    lengths = []
    for _ in range(sequences):
        keys = length(rng, block, TOKENS_MAX // sequences)
        queries = keys if method == "flexprefill" or rng.random() < .6 else length(rng, block, keys)
        lengths.append((queries, keys))
    return Input(method, str(rng.choice(FAMILIES)), str(rng.choice(DTYPES[backend])), lengths,
                 group * kv_heads, kv_heads, d, options)


def length(rng: np.random.Generator, block: int, most: int) -> int:
    """1 to `most`, half of them within two tokens of the edge of a block."""
    tokens = int(rng.integers(1, most + 1) if rng.random() < .7 else most**rng.random())
    if rng.random() < .5:
        tokens = round(tokens / block) * block + int(rng.integers(-2, 3))
    return min(max(tokens, 1), most)


def tensors(case: Input, rng: np.random.Generator) -> list[np.ndarray]:
    """q, k, v as they go to the client, bfloat16 as its bits."""
    shape = {"q_heads": case.q_heads, "kv_heads": case.kv_heads, "d": case.d}
    parts = []
    for queries, keys in case.lengths:
        base = case.family if case.family in inputs.FAMILIES else "random"
        part = inputs.make(base, queries, prefix=keys - queries, seed=int(rng.integers(1 << 30)),
                           **shape)
        if case.family == "ties":  # a few different keys, each many times
            part[1] = part[1][rng.integers(0, min(3, keys), keys)]
        elif case.family == "large":
            part = [x * np.float32(10.0**rng.uniform(1, 4)) for x in part]
        elif case.family == "broken":
            for x in part:
                spoiled = rng.random(x.shape) < 2 / x.size
                x[spoiled] = rng.choice([np.nan, np.inf, -np.inf])
        parts.append(part)
    whole = [np.concatenate(x) for x in zip(*parts, strict=True)]
    if case.dtype == "BF16":
        return [inputs.to_bf16_bits(x) for x in whole]
    with np.errstate(over="ignore"):
        return [x.astype(np.float16 if case.dtype == "F16" else np.float32) for x in whole]


def one_bit_off(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """v[0] is all that query 0 of a sequence without a prefix reads."""
    q, k, v = arrays
    v = v.copy()
    v.reshape(-1).view(np.uint8)[0] ^= 1
    return [q, k, v]


def answer(client: PrefillClient, case: Input, arrays: list[np.ndarray]) -> dict:
    """By kind of result, whatever must be the same."""
    cu_q, cu_k = (np.cumsum([0, *x]) for x in zip(*case.lengths, strict=True))
    try:
        result = client.attend(*arrays, dtype=case.dtype.lower(), return_lse=True,
                               return_block_index=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
                               **case.options)
    except PrefilldError as error:
        return {"refusal": [error.code, error.message]}
    report = [result.pattern, result.captured_mass, *vars(result.report).values()]
    return {"index": [result.block_count, result.block_index], "o": [result.o],
            "lse": [result.lse], "report": report}


def differences(before: dict, after: dict) -> list[str]:
    if before.keys() != after.keys():
        return ["refusal"]
    return [kind for kind in before if not all(map(same, before[kind], after[kind]))]


def must_show(case: Input) -> bool:
    queries, keys = case.lengths[0]
    return queries == keys and case.family != "broken"


def main() -> int:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--inputs", type=int, default=2000)
    flags.add_argument("--seed", type=int, default=0, help="of the first")
    flags.add_argument("--self-check", action="store_true")
    args = flags.parse_args()
    if args.self_check:
        args.after = args.before
    rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    first, unseen = "", 0
    with clients(args) as (before, after):
        for seed in range(args.seed, args.seed + args.inputs):
            rng = np.random.default_rng([20, seed])
            case = draw(rng, args.backend)
            if args.self_check and not must_show(case):
                continue
            arrays = tensors(case, rng)
            changed = one_bit_off(arrays) if args.self_check else arrays
            old = answer(before, case, arrays)
            different = differences(old, answer(after, case, changed))
            row = rows[case.method]
            row.update(["inputs", *different, *(["refused"] if "refusal" in old else [])])
            unseen += "o" not in different
            if different and not first:
                first = f"{', '.join(different)} of input {seed}: {case}"
                progress(f"DIFFERS: {first}")
            if (seed + 1 - args.seed) % 100 == 0:
                progress(f"{seed + 1 - args.seed} of {args.inputs} inputs")
    print(table(["method", "inputs", "refused", *(f"{kind} differs" for kind in KINDS)],
                [[method, *(row[key] for key in ("inputs", "refused", *KINDS))]
                 for method, row in sorted(rows.items())]))
    if args.self_check:
        print(f"a bit of v: {unseen} changes were not seen in o")
        return 1 if unseen or not first else 0
    print(f"first difference: {first}" if first else "every bit is the same")
    return 1 if first else 0


if __name__ == "__main__":
    sys.exit(main())
