"""Dense causal attention by torch on one GPU: the independent yardstick of attention_bench.

    python attention_peers.py [--lengths=32768,131072] [--json=FILE]

cuDNN's and FlashAttention-2's scaled_dot_product_attention, bf16 or fp16, batch 1; query heads
share keys by enable_gqa or by expanded heads, whichever is faster. Medians with an empty L2 before
each, as attention_bench takes them.
"""

import argparse
import json
import statistics

FLUSH_BYTES = 256 << 20


def measure(backend, inputs, repetitions, flush):
    """(median, least, most) ms of the fastest way to call it, or None where it has no kernel."""
    import torch
    from torch.nn.attention import sdpa_kernel

    def times(arguments, count):
        q, k, v, gqa = arguments
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
        for i in range(count):
            flush.sum()
            events[2 * i].record()
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=gqa
            )
            events[2 * i + 1].record()
        torch.cuda.synchronize()
        return sorted(events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(count))

    tried = []
    with sdpa_kernel(backend):
        for arguments in inputs:
            try:
                tried.append((times(arguments, 3)[0], arguments))
            except RuntimeError:
                pass
        if not tried:
            return None
        ms = times(min(tried, key=lambda pair: pair[0])[1], repetitions)
    return statistics.median(ms), ms[0], ms[-1]


def peers(length, heads=32, kv_heads=8, head_dim=128, dtype="bf16", repetitions=10):
    """One record for each backend that has a kernel."""
    import torch
    from torch.nn.attention import SDPBackend

    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    q = torch.randn(1, heads, length, head_dim, device="cuda", dtype=kind)
    k = torch.randn(1, kv_heads, length, head_dim, device="cuda", dtype=kind)
    v = torch.randn_like(k)
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    expanded = [x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v)]
    records = []
    inputs = [(q, k, v, True), (q, *expanded, False)]
    for name, backend in (
        ("torch cudnn", SDPBackend.CUDNN_ATTENTION),
        ("torch fa2", SDPBackend.FLASH_ATTENTION),
    ):
        timing = measure(backend, inputs, repetitions, flush)
        if timing is None:
            continue
        median, least, most = timing
        flops = 4 * head_dim * heads * length * (length + 1) / 2
        records.append(
            {
                "workload": "any",
                "method": "dense",
                "kernels": name,
                "tokens": length,
                "sequences": 1,
                "ms": median,
                "ms_min": least,
                "ms_max": most,
                "tflops": flops / median * 1e-9,
                "density": 1.0,
            }
        )
    del q, k, v, expanded, inputs, flush
    torch.cuda.empty_cache()
    return records


def line(record):
    return (
        f"{record['workload']:16} {record['tokens']:8} {record['method']:11} "
        f"{record['kernels']:11} {record['ms']:.3f} "
        f"({record['ms_min']:.3f}..{record['ms_max']:.3f}) ms  {record['tflops']:.1f} TFLOP/s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", help="also write the records to this file")
    args = parser.parse_args()
    records = []
    for length in map(int, args.lengths.split(",")):
        for record in peers(
            length, args.heads, args.kv_heads, args.head_dim, args.dtype, args.repetitions
        ):
            print(line(record), flush=True)
            records.append(record)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
