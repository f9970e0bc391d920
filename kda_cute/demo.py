"""`kda-cute demo`: a small Kimi Linear answers from a long context; before that KDA at Kimi Linear's shapes against the
fp64 recurrence and the memory floor, after it against softmax attention."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .examples import kimi_linear
from .examples.kimi_linear.model import Cache, KimiLinear
from .examples.kimi_linear.recall import FACTS, QUESTIONS, Stream, sample
from .ops import chunk_kda
from .reference.recurrence import recurrence

D = 128
BYTES_PER_TOKEN_AND_HEAD = 5 * D * 2  # q, k, v, g in, o out, bf16
TOLERANCE = 5.0e-3  # relative Frobenius error; rounding o to bf16 alone is 1.7e-3
RECALL = 0.99  # of all answers from streams no longer than those that the model was trained on
BAR = 40  # characters
CHECKPOINT = Path(kimi_linear.__path__[0]) / "recall.pt"


@dataclass
class Sizes:
    heads: int
    lengths: tuple[int, ...]  # of the sequences that the kernel is checked on
    streams: dict[int, int]  # for the model: how many of so many tokens
    attention: tuple[int, ...]  # tokens of one layer beside softmax attention


GPU = Sizes(  # Kimi Linear's heads; 8192 tokens of mixed lengths
    32, (1300, 547, 2048, 963, 271, 3063), {1 << 10: 64, 1 << 14: 64, 1 << 16: 16, 1 << 18: 4, 1 << 20: 1},
    tuple(1 << i for i in range(12, 19)),
)  # fmt: skip
CPU = Sizes(4, (130, 55, 205, 97, 25), {1 << 10: 16, 1 << 14: 4, 1 << 16: 1}, (256, 1024, 4096))


def run(cpu: bool = False) -> int:
    hopper = not cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device, sizes = (torch.device("cuda"), GPU) if hopper else (torch.device("cpu"), CPU)
    with torch.no_grad():
        failures = [*kernel(sizes, device), *hybrid(sizes, device)]
        attention(sizes, device)
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def kernel(sizes: Sizes, device: torch.device) -> list[str]:
    hopper, tokens = device.type == "cuda", sum(sizes.lengths)
    where = torch.cuda.get_device_name() if hopper else "CPU reference (the kernel needs a Hopper GPU)"
    print(f"KDA forward, {where}")
    print(f"  H = {sizes.heads}, K = V = {D}, {tokens} tokens in {len(sizes.lengths)} sequences")
    print("  bf16, safe gate, l2norm, beta sigmoid in the kernel, fp32 states in and out")
    call = inputs(sizes.heads, sizes.lengths, device)
    start = clock(device)
    o, state = chunk_kda(**call)
    first = clock(device) - start
    errors = error(call, o, state, heads=(0, sizes.heads - 1))
    seconds = (gpu_seconds if hopper else cpu_seconds)(lambda: chunk_kda(**call))
    moved = BYTES_PER_TOKEN_AND_HEAD * tokens * sizes.heads + 2 * len(sizes.lengths) * sizes.heads * D * D * 4
    copy = copy_bandwidth(device)
    print(f"  first call     {first:.2f} s" + ", with compiling or loading the kernel" * hopper)
    print(f"  error          o {errors[0]:.2e}, final state {errors[1]:.2e} (relative, first and last head, to fp64)")
    print(f"  time           {seconds * 1e6:.0f} us (median)")
    print(f"  memory floor   {moved / copy * 1e6:.0f} us: {moved / 1e6:.1f} MB at {copy / 1e9:.0f} GB/s, a copy's here")
    print(f"  bandwidth      {moved / seconds / 1e9:.1f} GB/s, {moved / copy / seconds:.1%} of the floor's")
    print(f"  tokens/s       {tokens / seconds:.3g} (one layer)")
    if max(errors) <= TOLERANCE:  # false for NaN too
        return []
    return [f"the error is above {TOLERANCE:.1e}"]


def hybrid(sizes: Sizes, device: torch.device) -> list[str]:
    model = KimiLinear.load(CHECKPOINT, device)
    trained, layers, every = model.config.trained_tokens, model.config.num_layers, model.config.attention_every
    parameters = sum(x.numel() for x in model.parameters())
    print(f"\nKimi Linear of {parameters / 1e6:.1f}M parameters: {layers} layers, every {every}th of softmax attention")
    print(f"  trained to find {QUESTIONS} of {FACTS} facts in {trained} tokens; fresh streams; prefill, then decoding")
    print(
        "  context  streams   recall  prefill tokens/s  decode tokens/s  state of a KDA layer  an attention layer keeps"
    )
    rng, right, asked = torch.Generator(device).manual_seed(1), 0.0, 0
    answer(model, sample(1, min(sizes.streams), rng))  # loads the kernels
    for length, streams in sizes.streams.items():
        stream = sample(streams, length, rng)
        recall, prefill, decode, cache = answer(model, stream)
        if length <= trained:
            right, asked = right + recall * streams, asked + streams
        kept = [sum(x.nbytes for x in layer) / streams for layer in cache.layers.values()]
        print(
            f"  {stream.context:7d}  {streams:7d}  {recall:7.2%}  {streams * stream.context / prefill:16.0f}  "
            f"{3 * QUESTIONS * streams / decode:15.0f}  {kept[0] / 1e3:17.0f} kB  {kept[-1] / 1e3:21.0f} kB"
        )
    if right >= RECALL * asked:
        return []
    return [f"recall up to {trained} tokens is {right / asked:.1%}, below {RECALL:.0%}"]


def answer(model: KimiLinear, stream: Stream) -> tuple[float, float, float, Cache]:
    """(share of right answers, seconds of the prefill, seconds of decoding, the cache at the end)."""
    cache, values, device = Cache(), [], stream.tokens.device
    begin = clock(device)
    model.prefill(stream.tokens[:, : stream.context], cache)
    middle = clock(device)
    for key in stream.asked.tolist():
        model(stream.tokens[:, key - 1 : key], cache)
        values.append(model(stream.tokens[:, key : key + 1], cache).argmax(-1))
        model(values[-1], cache)
    end = clock(device)
    right = (torch.cat(values, 1) == stream.answers).float().mean().item()
    return right, middle - begin, end - middle, cache


def attention(sizes: Sizes, device: torch.device) -> None:
    """Times of one layer against the length of one sequence, with bars on a logarithmic scale."""
    times: list[tuple[int, str, float]] = []
    for tokens in sizes.attention:
        call = inputs(sizes.heads, (tokens,), device)
        q, k, v = (call[name].transpose(1, 2) for name in "qkv")
        clocked = gpu_seconds if device.type == "cuda" else cpu_seconds
        for name, layer in (
            ("KDA", lambda call=call: chunk_kda(**call)),
            ("SDPA", lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        ):
            layer()
            times.append((tokens, name, clocked(layer, 5)))
    print(f"\nOne layer, H = {sizes.heads}, against softmax attention (SDPA) of the same tokens, ms")
    for line in bars(times):
        print(line)


def bars(times: Sequence[tuple[int, str, float]]) -> list[str]:
    low, high = (math.log(f(t for *_, t in times)) for f in (min, max))
    unit = (high - low) / (BAR - 1) or 1.0
    return [
        f"  {tokens:7d} {name:4s} {seconds * 1e3:9.3f} {'#' * (1 + round((math.log(seconds) - low) / unit))}"
        for tokens, name, seconds in times
    ]


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def inputs(heads: int, lengths: tuple[int, ...], device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Arguments of chunk_kda. dt_bias makes both kinds of channel: some forget in a token, some remember thousands."""
    rng = torch.Generator(device).manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, device=device)

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
        "dt_bias": torch.rand(heads * D, generator=rng, device=device) * 12 - 10,
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
