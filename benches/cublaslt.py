#!/usr/bin/env python3
"""Times cuBLASLt (through PyTorch) on the shapes that the self-test's `throughput` check times.

Run both on the same machine, one after the other: machines differ by 10-30 %.
Weights rotate, so that they never come out of L2; each figure is a median of graph replays.
"""

import statistics

import torch
import torch.nn.functional as F

COLD = 400 << 20
RUNS = 20
SHAPES = [
    ("qkv", 6144, 4096, 8192),
    ("o", 4096, 4096, 8192),
    ("gate_up", 28672, 4096, 8192),
    ("down", 4096, 14336, 8192),
    ("lm_head", 128256, 4096, 256),
]
TOKENS = [1, 16, 64, 72, 96, 128, 192, 256, 320, 384, 512, 576, 640, 768, 1024, 2048, 8192]


def time_us(work):
    """Microseconds of one call of `work(i)`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(RUNS):
            work(i)
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / RUNS)
    return statistics.median(times)


def main():
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    for name, outputs, inputs, most in SHAPES:
        copies = COLD // (2 * outputs * inputs) + 1
        weights = [
            torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(copies)
        ]
        for tokens in (t for t in TOKENS if t <= most):
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            us = time_us(lambda i: F.linear(x, weights[i % copies]))
            if tokens <= 64:
                rate = f"{2 * outputs * inputs / us / 1e3:6.0f} GB/s"
            else:
                rate = f"{2 * tokens * outputs * inputs / us / 1e6:6.1f} TFLOP/s"
            print(f"linear {name} x {tokens:<6} {us:8.2f} us  {rate}", flush=True)


if __name__ == "__main__":
    main()
