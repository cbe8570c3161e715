"""Prefills with Hugging Face transformers, in a process of its own, over JSON lines.

    python transformers_worker.py MODEL_DIR THREADS

Says {"ready": true} once the model is loaded; then, for every line {"token_ids": [...]}, the
{"seconds": S} of one forward pass: float32, sdpa, KV cache kept, logits of the last position only,
as a prefill server needs it.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32,
                                                 attn_implementation="sdpa").eval()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ids = torch.tensor([json.loads(line)["token_ids"]])
        begin = time.perf_counter()
        with torch.inference_mode():
            model(ids, use_cache=True, logits_to_keep=1)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
