"""A decode tier that is not ours: stock vLLM answers one long question three ways, alone and from
KV that prefilld computed, densely and sparsely. `make demo-vllm` runs this.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Iterator

from demo import DemoError, server
from prefilld import PrefilldError
from progress import Progress
from tokenizer import Tokenizer
from vllm_server import VllmError, VllmServer

PROMPT_TOKENS = 4000
ANSWER_TOKENS = 96
START_S = 80   # what vLLM takes, for the progress bar
QUESTION = ("Above is a software license. In two sentences: what must somebody who distributes a "
            "modified version of the program do?")


@dataclasses.dataclass
class Answer:
    """One way of answering."""

    name: str
    ttft_s: float
    computed: int      # tokens of the prompt that vLLM computed itself
    tokens: list[int]


def question(tokenizer: Tokenizer, document: pathlib.Path) -> list[int]:
    """PROMPT_TOKENS tokens: as much of the document as fits before the question."""
    head = tokenizer.encode("<|im_start|>user\n")
    tail = tokenizer.encode(f"\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    text = tokenizer.encode(document.read_text(encoding="utf-8"))
    room = PROMPT_TOKENS - len(head) - len(tail)
    if len(text) < room:
        raise DemoError(f"{document} has {len(text)} tokens, {room} are needed")
    return head + text[:room] + tail


def ask(vllm: VllmServer, name: str, prompt: list[int], params: dict | None) -> Answer:
    computed = vllm.prompt_tokens()["local_compute"]
    ttft, tokens = 0.0, []
    with Progress(name) as bar:
        for seconds, piece in vllm.stream(prompt, params, tokens=ANSWER_TOKENS):
            ttft = ttft or seconds
            tokens += piece
            bar.update(len(tokens) / ANSWER_TOKENS, "decode")
    return Answer(name, ttft, vllm.prompt_tokens()["local_compute"] - computed, tokens)


@contextlib.contextmanager
def vllm_server(model_dir: pathlib.Path, log: pathlib.Path,
                extra: dict | None) -> Iterator[VllmServer]:
    label = "start vLLM alone" if extra is None else "start vLLM"
    with contextlib.ExitStack() as stack:
        with Progress(label) as bar:
            vllm = stack.enter_context(VllmServer(
                model_dir, log, extra,
                waiting=lambda s: bar.update(min(s / START_S, 1), f"{s:.0f} s")))
        yield vllm


def demo(build: pathlib.Path, document: pathlib.Path) -> None:
    model_dir = build / "models" / "SmolLM2-135M-Instruct"
    logs = build / "demo"
    logs.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(model_dir)
    prompt = question(tokenizer, document)
    warm_up = prompt[:256]
    print(f"{len(prompt)} tokens, ending in: {QUESTION!r}")

    with vllm_server(model_dir, logs / "vllm-alone.log", None) as vllm:
        vllm.complete(warm_up, tokens=4)
        answers = [ask(vllm, "vLLM alone", prompt, None)]
    with (server(build, model_dir, logs / "prefilld.log") as target,
          vllm_server(model_dir, logs / "vllm.log", {"target": target}) as vllm):
        vllm.complete(warm_up, tokens=4)
        for method in ("dense", "joint"):
            params = {"method": method}
            if method == "joint":
                params["gamma"] = 0.95
            answers.append(ask(vllm, f"prefilld {method}", prompt, params))

    alone, dense, joint = answers
    print(f"\n{'':<16}{'first token s':>14}{'computed by vLLM':>18}{'as vLLM alone':>15}")
    for answer in answers:
        print(f"{answer.name:<16}{answer.ttft_s:>14.2f}{answer.computed:>18}"
              f"{f'{agreeing(answer, alone)}/{ANSWER_TOKENS}':>15}")
    for answer in answers:
        print(f"\n{answer.name} answers: {tokenizer.decode(answer.tokens)!r}")
    print(f"\ndemo-vllm: OK computed={max(dense.computed, joint.computed)} "
          f"agree_dense={agreeing(dense, alone)}/{ANSWER_TOKENS} "
          f"agree_joint={agreeing(joint, alone)}/{ANSWER_TOKENS} "
          f"ttft_alone_s={alone.ttft_s:.2f} ttft_dense_s={dense.ttft_s:.2f} "
          f"ttft_joint_s={joint.ttft_s:.2f}")


def agreeing(answer: Answer, alone: Answer) -> int:
    """Tokens equal to those of vLLM alone, position by position."""
    return sum(a == b for a, b in zip(answer.tokens, alone.tokens, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="stock vLLM on KV from prefilld: see "
                                                 "make demo-vllm")
    parser.add_argument("--build", type=pathlib.Path, required=True,
                        help="holds prefilld and models/SmolLM2-135M-Instruct")
    parser.add_argument("--document", type=pathlib.Path,
                        default=pathlib.Path("/usr/share/common-licenses/GPL-3"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so every process ends
    try:
        demo(args.build, args.document)
    except (DemoError, VllmError, PrefilldError, OSError) as error:
        print(f"demo-vllm: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo-vllm: FAILED: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
