"""transformers on the same weights, in this process: what prefilld is measured beside."""

import contextlib
import pathlib
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

# How sdpa may compute; "any": what torch chooses.
ATTENTION = {"any": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


class Transformers:
    def __init__(self, directory: pathlib.Path, dtype: torch.dtype | str, device: str):
        """dtype: or "auto", the checkpoint's own."""
        logging.disable_progress_bar()
        on = {} if device == "cpu" else {"device_map": device}  # straight to the device
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", **on).eval()
        self.model.generation_config.eos_token_id = None  # an end token is one like others
        self.device = device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.inference_mode()
    def prefill(self, ids, attention: str = "any", chunk: int = 0
                ) -> tuple[DynamicCache, torch.Tensor]:
        """The cache and the logits of the last position, on the host. chunk: tokens at a time, for
        a prompt that does not fit else."""
        tokens = torch.as_tensor(ids, device=self.device)[None]
        step = chunk or tokens.shape[1]
        cache = DynamicCache(config=self.model.config)
        one = ATTENTION[attention]
        with sdpa_kernel(one) if one is not None else contextlib.nullcontext():
            for begin in range(0, tokens.shape[1], step):
                out = self.model(tokens[:, begin:begin + step], past_key_values=cache,
                                 use_cache=True, logits_to_keep=1)
        return cache, out.logits[0, -1].float().cpu()

    @torch.inference_mode()
    def generate(self, ids, tokens: int, cache: DynamicCache | None = None
                 ) -> tuple[list[int], float]:
        """New tokens, greedy, and the seconds to the first of them."""
        prompt = torch.as_tensor(ids, device=self.device)[None]
        first = FirstToken()
        out = self.model.generate(
            prompt, past_key_values=cache, max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones_like(prompt), streamer=first)
        return out[0, prompt.shape[1]:].tolist(), first.seconds

    def close(self) -> None:
        """Its memory is the next one's."""
        del self.model
        if self.device != "cpu":
            torch.cuda.empty_cache()


class FirstToken:
    """What generate calls a streamer; notes when the first token came."""

    def __init__(self):
        self._begin, self._times = time.perf_counter(), []

    def put(self, _):
        self._times.append(time.perf_counter())

    def end(self):
        pass

    @property
    def seconds(self) -> float:
        return self._times[1] - self._begin  # [0] is the prompt
