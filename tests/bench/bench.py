"""Where the benchmarks find what they measure, and how they run it."""

import dataclasses
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from e2e.harness import BUILD, PREFILLCTL, Server  # noqa: E402  (as the end-to-end tests)

OUT = BUILD / "bench"
MODEL = "smollm2"
THREADS = 2  # everything is measured on two processors


class BenchError(Exception):
    """A program failed: nothing was measured."""


@dataclasses.dataclass
class Bench:
    model_dir: pathlib.Path
    token_ids: list[int]  # of the real text

    def tokens_file(self, tokens: int | None = None) -> pathlib.Path:
        """The first `tokens` of the text, or all, as a file of token IDs."""
        ids = self.token_ids[:tokens]
        path = OUT / f"ids-{len(ids)}.json"
        path.write_text(json.dumps(ids), encoding="utf-8")
        return path

    def server(self, *flags: str, model: bool = True) -> Server:
        """A prefilld, for a `with` block."""
        return Server(f"--threads={THREADS}", *flags, log_path=OUT / "prefilld.log",
                      models=[(MODEL, self.model_dir)] if model else [])

    def prefillctl(self, server: Server, *arguments: object) -> dict:
        command = [PREFILLCTL, f"--target={server.target}", "--json", *arguments]
        return json.loads(self.run(command))

    def program(self, name: str, *arguments: object) -> dict:
        """The JSON of one of our own benchmarks; a missed figure is no failure here."""
        return json.loads(self.run([BUILD / "tests" / name, *arguments], accept=(0, 1)))

    def run(self, command: list, accept: tuple[int, ...] = (0,)) -> str:
        """stdout; stderr, which shows progress, goes to ours."""
        done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
        if done.returncode not in accept or not done.stdout:
            raise BenchError(f"{pathlib.Path(command[0]).name} ended with {done.returncode}")
        return done.stdout


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
