"""GPU time from CUDA-graph replay, host time from calls that outrun the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 cache


def graph_times(calls: dict[str, Callable[[], object]], repeats: int = 25) -> dict[str, tuple[float, float, float]]:
    """Microseconds (lower quartile, median, upper) of each call's graph: interleaved, L2 flushed before each."""
    graphs = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs[name] = graph
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: tuple(statistics.quantiles(t, n=4)) for name, t in times.items()}


def host_time(call: Callable[[], object], calls: int = 50, repeats: int = 20) -> float:
    """Microseconds that the CPU spends in a call, GPU not waited for: best median of short runs from an empty queue."""
    medians = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        spent = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
        medians.append(statistics.median(spent) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(medians)


def copy_bandwidth(size: int = 4 << 30) -> float:
    """Bytes a second, read plus written, of a large device copy (no graph: in one, a slower engine copies)."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * size / statistics.median(times[2:])
