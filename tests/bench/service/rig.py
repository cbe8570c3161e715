"""What state_matrix.py and cuts.py measure with: a small model, its prompts, what their caches must
be, and what a server has done."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import google_crc32c
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # tests
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "client" / "python"))

from e2e import checkpoints, harness  # noqa: E402
from prefilld import Layer, PrefillClient  # noqa: E402

MODEL = "tiny"
ROUNDING = 1e-4  # of the norm: prompts that share a batch are rounded as the batch has it


@dataclasses.dataclass
class Bytes:
    """What was compared."""

    checked: int = 0
    rounded: int = 0  # other bits, the same values
    wrong: int = 0


class Prompt:
    """One prompt, and what it gives."""

    def __init__(self, checkpoint: checkpoints.Checkpoint, tokens: int, target: str, **how):
        self.token_ids = checkpoint.tokens(tokens)
        with PrefillClient(target, transport="grpc", **how) as client, \
                client.prefill(MODEL, self.token_ids, method="dense") as call:
            self.layers = [np.stack([layer.k, layer.v]) for layer in call]
        self._crcs = [google_crc32c.value(layer.tobytes()) for layer in self.layers]

    def check(self, layers: Iterator[Layer], seen: Bytes) -> None:
        """Of a whole cache, or of as much as comes before an error."""
        for layer in layers:
            got, expected = np.stack([layer.k, layer.v]), self.layers[layer.index]
            seen.checked += 1
            if google_crc32c.value(got.tobytes()) == self._crcs[layer.index]:
                continue
            far = np.linalg.norm(got - expected) > ROUNDING * np.linalg.norm(expected)
            seen.wrong += bool(far)
            seen.rounded += not far


def ends(server: harness.Server, call: str = "prefill") -> tuple[int, dict[str, int]]:
    """Of the log: how many were admitted, and how many ended, by code."""
    admitted, by_code = 0, {}
    for line in server.log():
        admitted += line["event"] == f"{call}_admitted"
        if line["event"] == f"{call}_finished":
            by_code[line["code"]] = by_code.get(line["code"], 0) + 1
    return admitted, by_code
