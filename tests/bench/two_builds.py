"""Two builds of prefilld side by side: what a change must leave as it was is compared bit for bit,
what it must not slow down is timed in turn."""

import argparse
import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
from bench import Server

from prefilld import PrefillClient


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    for side in ("--before", "--after"):
        result.add_argument(side, type=pathlib.Path, required=True, metavar="BUILD",
                            help="a build directory, with prefilld in it")
    result.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--threads", type=int, default=2)
    return result


@contextlib.contextmanager
def clients(args: argparse.Namespace, model: pathlib.Path | None = None
            ) -> Iterator[list[PrefillClient]]:
    """A client of a server of each build, before and after; `model` is loaded as "model"."""
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        result = []
        for side in ("before", "after"):
            server = stack.enter_context(Server(
                f"--backend={args.backend}", f"--threads={args.threads}",
                log_path=pathlib.Path(logs) / f"{side}.jsonl",
                models=[("model", model)] if model else [],
                program=getattr(args, side).resolve() / "prefilld"))
            result.append(stack.enter_context(PrefillClient(server.target)))
        yield result


def same(before: object, after: object) -> bool:
    """Bit for bit: type and shape too, a NaN is itself, -0 is not 0."""
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        return (before.dtype == after.dtype and before.shape == after.shape
                and before.tobytes() == after.tobytes())
    return type(before) is type(after) and repr(before) == repr(after)
