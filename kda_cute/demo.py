"""`kda-cute demo`: KDA at Kimi Linear's shapes, against the fp64 recurrence and against the memory floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .ops import chunk_kda
from .reference.recurrence import recurrence

D = 128
GPU_HEADS, GPU_LENGTHS = 32, (1300, 547, 2048, 963, 271, 3063)  # Kimi Linear's heads; 8192 tokens of mixed lengths
CPU_HEADS, CPU_LENGTHS = 4, (130, 55, 205, 97, 25)
BYTES_PER_TOKEN_AND_HEAD = 5 * D * 2  # q, k, v, g in, o out, bf16
TOLERANCE = 5.0e-3  # relative Frobenius error; rounding o to bf16 alone is 1.7e-3


def run(cpu: bool = False) -> int:
    hopper = not cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device("cuda" if hopper else "cpu")
    heads, lengths = (GPU_HEADS, GPU_LENGTHS) if hopper else (CPU_HEADS, CPU_LENGTHS)
    tokens = sum(lengths)
    where = torch.cuda.get_device_name() if hopper else "CPU reference (the kernel needs a Hopper GPU)"
    print(f"KDA forward, {where}")
    print(f"  H = {heads}, K = V = {D}, {tokens} tokens in {len(lengths)} sequences: {', '.join(map(str, lengths))}")
    print("  bf16, safe gate, l2norm, beta sigmoid in the kernel, fp32 states in and out")

    call = inputs(heads, lengths, device)
    start = time.perf_counter()
    with torch.no_grad():
        o, state = chunk_kda(**call)
        if hopper:
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        errors = error(call, o, state, heads=(0, heads - 1))
        seconds = gpu_seconds(lambda: chunk_kda(**call)) if hopper else cpu_seconds(lambda: chunk_kda(**call))

    moved = BYTES_PER_TOKEN_AND_HEAD * tokens * heads + 2 * len(lengths) * heads * D * D * 4
    copy = copy_bandwidth(device)
    print(
        f"  first call     {first:.2f} s, with compiling or loading the kernel"
        if hopper
        else f"  first call     {first:.2f} s"
    )
    print(f"  error          o {errors[0]:.2e}, final state {errors[1]:.2e} (relative, first and last head, to fp64)")
    print(f"  time           {seconds * 1e6:.0f} us (median)")
    print(f"  memory floor   {moved / copy * 1e6:.0f} us: {moved / 1e6:.1f} MB at {copy / 1e9:.0f} GB/s, a copy's here")
    print(f"  bandwidth      {moved / seconds / 1e9:.1f} GB/s, {moved / copy / seconds:.1%} of the floor's")
    print(f"  tokens/s       {tokens / seconds:.3g} (one layer)")
    if max(errors) <= TOLERANCE:  # false for NaN too
        return 0
    print(f"FAILED: the error is above {TOLERANCE:.1e}")
    return 1


def inputs(heads: int, lengths: tuple[int, ...], device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Arguments of chunk_kda. dt_bias makes both kinds of channel: some forget in a token, some remember thousands."""
    rng = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(device)

    q, k, v, g = (normal(1, tokens, heads, D).bfloat16() for _ in range(4))
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": normal(1, tokens, heads).bfloat16(),
        "initial_state": normal(len(lengths), heads, D, D),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "safe_gate": True,
        "lower_bound": -5.0,
        "cu_seqlens": cuts.to(device),
        "A_log": normal(heads) / 2,
        "dt_bias": (torch.rand(heads * D, generator=rng) * 12 - 10).to(device),
    }


def error(
    call: dict[str, Any], o: torch.Tensor, state: torch.Tensor | None, heads: tuple[int, ...]
) -> tuple[float, float]:
    """Relative Frobenius error of o and of the final state on some heads."""
    assert state is not None
    index = torch.tensor(heads, device=o.device)
    part = dict(call)
    for name in ("q", "k", "v", "g", "beta"):
        part[name] = call[name].index_select(2, index)
    part["initial_state"] = call["initial_state"].index_select(1, index)
    part["A_log"] = call["A_log"].index_select(0, index)
    part["dt_bias"] = call["dt_bias"].view(-1, D).index_select(0, index)
    o_true, state_true = recurrence(**part)
    assert state_true is not None
    return relative(o.index_select(2, index), o_true), relative(state.index_select(1, index), state_true)


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def gpu_seconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median GPU time. The fill before each call empties L2 and keeps the GPU busy while the host enqueues."""
    cold = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        cold.fill_(1)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def cpu_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = (gpu_seconds if device.type == "cuda" else cpu_seconds)(lambda: target.copy_(source))
    return 2 * size / seconds
