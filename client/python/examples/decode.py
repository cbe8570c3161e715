"""The decode process: takes a lease on a prompt's KV cache, pulls it, decodes greedily from it.

    python decode.py MODEL_DIRECTORY

Reads one JSON object per line on stdin:
    {"target": "HOST:PORT", "model": NAME, "lease": {...}, "last_token": ID, "count": N}
and answers on stdout, one object per line, each with an "event":
    ready                        the weights are loaded (once, at the start)
    layer   {index, bytes}       a layer of the cache arrived
    token   {id}                 decoded
    done    {kv_bytes}           the lease is released
    error   {message}            this prompt failed; the next one may be sent
It never sees the prompt: only its last token and the cache.
"""

import json
import sys

from llama_numpy import LayerCache, Llama
from prefilld import Lease, PrefillClient, PrefilldError


def say(event: str, **fields) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def decode(model: Llama, order: dict) -> None:
    lease = Lease(**order["lease"])
    count, kv_bytes = order["count"], 0
    with PrefillClient(order["target"]) as client:

        def caches():
            """A layer is computed as soon as it is here, while the next is on its way."""
            nonlocal kv_bytes
            for layer in client.pull(lease, order["model"]):
                size = layer.k.nbytes + layer.v.nbytes
                kv_bytes += size
                say("layer", index=layer.index, bytes=size)
                # The last prompt token is computed here, so its row of the cache is left out.
                yield LayerCache(layer.k, layer.v, lease.tokens - 1, lease.tokens + count)
            client.release(lease)

        for token in model.greedy(order["last_token"], caches(), lease.tokens, count):
            say("token", id=token)
    say("done", kv_bytes=kv_bytes)


def main() -> None:
    model = Llama(sys.argv[1])
    say("ready")
    for line in sys.stdin:
        try:
            decode(model, json.loads(line))
        except PrefilldError as error:
            say("error", message=str(error))


if __name__ == "__main__":
    main()
