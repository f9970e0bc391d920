"""GPU time from CUDA-graph replay, from eager calls and from the profiler; host time from calls that outrun the GPU."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 cache
REPEATS = 25
PROFILER_REPEATS = 5

T = TypeVar("T")
Quartiles = tuple[float, float, float]  # lower, median, upper


def capture(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of a call that has run before, and the tensors its replay writes."""
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    try:
        # The outer stream context restores the stream where torch.cuda.graph, failing to end a capture, does not.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=pool, stream=stream):
            results = call()
    except Exception:
        # Nor does it then tell the allocator, which would go on as if in a capture: no freeing, no empty_cache.
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise
    return graph, results


def event_times(
    calls: Mapping[str, Callable[[], object]], repeats: int = REPEATS, from_idle: bool = False
) -> dict[str, Quartiles]:
    """Microseconds between events around each call: interleaved, in another order each round, L2 flushed before each.

    from_idle: the GPU has nothing queued when the call starts, so the host's time that it waits for counts.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    for i in range(repeats):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.fill_(1)
            if from_idle:
                torch.cuda.synchronize()
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: quartiles(t) for name, t in times.items()}


def host_time(call: Callable[[], object], calls: int = 20, repeats: int = 15) -> float:
    """Microseconds that the CPU spends in a call, GPU not waited for: the least of short runs' medians, queue empty,
    each on the core that is quickest just then. What other work adds to it (see there) is not the call's."""
    medians = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        spent = []
        with on_quickest_core():
            for _ in range(calls):
                start = time.perf_counter()
                call()
                spent.append(time.perf_counter() - start)
        medians.append(statistics.median(spent) * 1e6)
    torch.cuda.synchronize()
    return min(medians)


@contextlib.contextmanager
def on_quickest_core() -> Iterator[None]:
    """This thread on the core that is quickest just now: what else runs on a machine, other virtual machines' work too,
    makes some of its cores half as fast, and host times with them."""
    cores = os.sched_getaffinity(0)

    def pace(core: int) -> float:
        os.sched_setaffinity(0, {core})
        return min(timeit.repeat(lambda: sum(range(10_000)), number=1, repeat=5))

    try:
        os.sched_setaffinity(0, {min(cores, key=pace)})
        yield
    finally:
        os.sched_setaffinity(0, cores)


def profiler_times(
    calls: Mapping[str, Callable[[], object]], repeats: int = PROFILER_REPEATS
) -> dict[str, float | None]:
    """Microseconds of the kernels, copies and fills of each eager call, the gaps between them left out; L2 flushed."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            for call in calls.values():
                flush.fill_(1)
                call()
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.time_range.elapsed_us(), event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return split_by_flush(events, list(calls), repeats)


def split_by_flush(
    events: Iterable[tuple[float, float, str]], names: list[str], repeats: int
) -> dict[str, float | None]:
    """Median GPU time of each call, from (start, duration, kernel) of flush, call, flush, call, ...

    The flushes are known by the first event's name. If they are not as many as they were, the profiler saw no GPU or
    lost something, and all are None.
    """
    ordered = sorted(events)
    spent: list[float] = []
    for _, duration, kernel in ordered:
        if kernel == ordered[0][2]:
            spent.append(0.0)
        else:
            spent[-1] += duration
    if len(spent) != repeats * len(names):
        return dict.fromkeys(names)
    return {name: statistics.median(spent[i :: len(names)]) for i, name in enumerate(names)}


def quartiles(times: list[float]) -> Quartiles:
    lower, median, upper = statistics.quantiles(times, n=4)
    return lower, median, upper
