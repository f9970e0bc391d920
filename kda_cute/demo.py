"""`kda-cute demo`: a small Kimi Linear answers from a long context; before that KDA at Kimi Linear's shapes against the
fp64 recurrence and the memory floor, after it against softmax attention."""

from __future__ import annotations

import functools
import math
import operator
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
PIECE = 512  # tokens of a prefill on the CPU, after each of which the time is looked at
SHARE = 0.75  # of the time is over when the last context ends, the rest is for softmax attention
TELLS = 4096  # tokens from which on attention takes long enough to be told from noise
LINE_EVERY = 10  # seconds, where there is no terminal
CHECKPOINT = Path(kimi_linear.__path__[0]) / "recall.pt"

say = functools.partial(print, flush=True)


@dataclass
class Sizes:
    heads: int
    lengths: tuple[int, ...]  # of the sequences that the kernel is checked on
    streams: dict[int, int]  # for the model: how many of so many tokens
    attention: tuple[int, ...]  # tokens of one layer beside softmax attention
    seconds: float = math.inf  # for all of it: what does not fit is left out, but never the first of anything


GPU = Sizes(  # Kimi Linear's heads; 8192 tokens of mixed lengths
    32, (1300, 547, 2048, 963, 271, 3063), {1 << 10: 64, 1 << 14: 64, 1 << 16: 16, 1 << 18: 4, 1 << 20: 1},
    tuple(1 << i for i in range(12, 19)),
)  # fmt: skip
CPU = Sizes(4, (130, 55, 205, 97, 25), {1 << 10: 16, 1 << 14: 4, 1 << 16: 1}, (256, 1024, 4096), seconds=60)


def run(cpu: bool = False) -> int:
    device, sizes = (torch.device("cuda"), GPU) if not cpu and has_hopper() else (torch.device("cpu"), CPU)
    threads, begin = torch.get_num_threads(), clock(device)
    try:
        with torch.no_grad():
            if device.type == "cpu":
                # Operations are small: a second thread saves nothing. On busy cores threads wait for one another after
                # each of them until the scheduler lets the last one run, which took 25 times as long as one thread.
                torch.set_num_threads(1)
            failures = [*kernel(sizes, device), *hybrid(sizes, device, begin + SHARE * sizes.seconds)]
            attention(sizes, device, begin + sizes.seconds)
    finally:
        torch.set_num_threads(threads)
    for failure in failures:
        say(f"FAILED: {failure}")
    return 1 if failures else 0


def has_hopper() -> bool:
    """AMD's GPUs have a capability too, and some of them (9, 0)."""
    return torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() == (9, 0)


def kernel(sizes: Sizes, device: torch.device) -> list[str]:
    hopper, tokens = device.type == "cuda", sum(sizes.lengths)
    where = torch.cuda.get_device_name() if hopper else "CPU reference, one thread (the kernel needs a Hopper GPU)"
    say(f"KDA forward, {where}")
    say(f"  H = {sizes.heads}, K = V = {D}, {tokens} tokens in {len(sizes.lengths)} sequences")
    say("  bf16, safe gate, l2norm, beta sigmoid in the kernel, fp32 states in and out")
    call = inputs(sizes.heads, sizes.lengths, device)
    start = clock(device)
    o, state = chunk_kda(**call)
    first = clock(device) - start
    errors = error(call, o, state, heads=(0, sizes.heads - 1))
    seconds = (gpu_seconds if hopper else cpu_seconds)(lambda: chunk_kda(**call))
    moved = BYTES_PER_TOKEN_AND_HEAD * tokens * sizes.heads + 2 * len(sizes.lengths) * sizes.heads * D * D * 4
    copy = copy_bandwidth(device)
    say(f"  first call     {first:.2f} s" + ", with compiling or loading the kernel" * hopper)
    say(f"  error          o {errors[0]:.2e}, final state {errors[1]:.2e} (relative, first and last head, to fp64)")
    say(f"  time           {seconds * 1e6:.0f} us (median)")
    say(f"  memory floor   {moved / copy * 1e6:.0f} us: {moved / 1e6:.1f} MB at {copy / 1e9:.0f} GB/s, a copy's here")
    say(f"  bandwidth      {moved / seconds / 1e9:.1f} GB/s, {moved / copy / seconds:.1%} of the floor's")
    say(f"  tokens/s       {tokens / seconds:.3g} (one layer)")
    if max(errors) <= TOLERANCE:  # false for NaN too
        return []
    return [f"the error is above {TOLERANCE:.1e}"]


def hybrid(sizes: Sizes, device: torch.device, until: float = math.inf) -> list[str]:
    model = KimiLinear.load(CHECKPOINT, device)
    trained, layers, every = model.config.trained_tokens, model.config.num_layers, model.config.attention_every
    parameters = sum(x.numel() for x in model.parameters())
    say(f"\nKimi Linear of {parameters / 1e6:.1f}M parameters: {layers} layers, every {every}th of softmax attention")
    say(f"  trained to find {QUESTIONS} of {FACTS} facts in {trained} tokens; fresh streams; prefill, then decoding")
    say(
        "  context  streams   recall  prefill tokens/s  decode tokens/s  state of a KDA layer  an attention layer keeps"
    )
    rng, right, asked = torch.Generator(device).manual_seed(1), 0.0, 0
    answer(model, sample(1, min(sizes.streams), rng))  # loads the kernels
    pieces: list[Piece] = []
    left_out: dict[int, float] = {}  # tokens -> the seconds that they would take
    for length, streams in sizes.streams.items():
        context, room = length - 3 * QUESTIONS, until - clock(device)
        if pieces and (needed := seconds_for(streams, context, pieces)) > room:
            left_out[context] = needed
            continue
        stream = sample(streams, length, rng)
        try:
            recall, prefill, decode, cache = answer(model, stream, pieces, room if pieces else math.inf)
        except OutOfTime as stopped:
            left_out[context] = stopped.needed
            continue
        if length <= trained:
            right, asked = right + recall * streams, asked + streams
        kept = [sum(x.nbytes for x in layer) / streams for layer in cache.layers.values()]
        say(
            f"  {stream.context:7d}  {streams:7d}  {recall:7.2%}  {streams * stream.context / prefill:16.0f}  "
            f"{3 * QUESTIONS * streams / decode:15.0f}  {kept[0] / 1e3:17.0f} kB  {kept[-1] / 1e3:21.0f} kB"
        )
    say_left_out(left_out)
    if right >= RECALL * asked:
        return []
    return [f"recall up to {trained} tokens is {right / asked:.1%}, below {RECALL:.0%}"]


@dataclass
class Piece:
    """Of a prefill: what attention takes depends on the tokens before it."""

    before: int
    tokens: int
    streams: int
    seconds: float


class OutOfTime(Exception):
    def __init__(self, needed: float):
        self.needed = needed


def seconds_for(streams: int, context: int, pieces: Sequence[Piece]) -> float:
    """What a prefill takes at the speed of those pieces: so much for a token, so much for each pair of one and another
    before it, by least squares. Short ones tell nothing of pairs."""
    tokens = [x.streams * x.tokens for x in pieces]
    pairs = [n * (x.before + x.tokens / 2) for n, x in zip(tokens, pieces, strict=True)]
    seconds = [x.seconds for x in pieces]

    def dot(x: Sequence[float], y: Sequence[float]) -> float:
        return sum(map(operator.mul, x, y))

    of_token, of_pair = sum(seconds) / sum(tokens), 0.0
    determinant = dot(tokens, tokens) * dot(pairs, pairs) - dot(tokens, pairs) ** 2
    if max(x.before for x in pieces) >= TELLS and determinant > 0:
        of_pair = (dot(tokens, tokens) * dot(pairs, seconds) - dot(tokens, pairs) * dot(tokens, seconds)) / determinant
        of_pair = min(max(of_pair, 0.0), sum(seconds) / sum(pairs))  # neither takes less than nothing
        of_token = (sum(seconds) - of_pair * sum(pairs)) / sum(tokens)
    return streams * context * (of_token + of_pair * context / 2)


def answer(
    model: KimiLinear, stream: Stream, pieces: list[Piece] | None = None, room: float = math.inf
) -> tuple[float, float, float, Cache]:
    """(share of right answers, seconds of the prefill, seconds of decoding, the cache at the end). On the CPU `pieces`
    gets what the prefill takes; one that would take more than `room` seconds is given up."""
    cache, values, device = Cache(), [], stream.tokens.device
    begin = clock(device)
    if pieces is None or device.type == "cuda":
        model.prefill(stream.tokens[:, : stream.context], cache)
    else:
        prefill(model, stream, cache, pieces, room)
    middle = clock(device)
    for key in stream.asked.tolist():
        model(stream.tokens[:, key - 1 : key], cache)
        values.append(model(stream.tokens[:, key : key + 1], cache).argmax(-1))
        model(values[-1], cache)
    end = clock(device)
    right = (torch.cat(values, 1) == stream.answers).float().mean().item()
    return right, middle - begin, end - middle, cache


def prefill(model: KimiLinear, stream: Stream, cache: Cache, pieces: list[Piece], room: float) -> None:
    streams, done, spent = len(stream.tokens), 0, 0.0
    with progress(f"{stream.context} tokens", stream.context) as advance:
        for part in stream.tokens[:, : stream.context].split(PIECE, 1):
            begin = time.perf_counter()
            model.prefill(part, cache)
            pieces.append(Piece(done, part.shape[1], streams, time.perf_counter() - begin))
            done, spent = done + part.shape[1], spent + pieces[-1].seconds
            advance(part.shape[1])
            needed = spent / done * stream.context  # at least: later pieces take longer
            if needed > room and spent > room / 8:  # one slow piece is not held against it
                raise OutOfTime(max(needed, seconds_for(streams, stream.context, pieces)))


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Gives a function that takes how much more is done: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=f"  {what}", total=total, leave=False, bar_format="{desc} {percentage:3.0f}% |{bar}|") as bar:
            yield bar.update
        return
    done, last = 0, time.perf_counter()

    def advance(more: int) -> None:
        nonlocal done, last
        done += more
        if time.perf_counter() - last >= LINE_EVERY and done < total:
            last = time.perf_counter()
            print(f"  {what}: {done / total:.0%}", file=sys.stderr, flush=True)

    yield advance


def say_left_out(left_out: dict[int, float]) -> None:
    if left_out:
        each = [
            f"{tokens} tokens, about {f'{seconds / 60:.0f} min' if seconds >= 90 else f'{seconds:.0f} s'}"
            for tokens, seconds in left_out.items()
        ]
        say(f"  left out, to end in about a minute: {'; '.join(each)}")


def attention(sizes: Sizes, device: torch.device, until: float = math.inf) -> None:
    """Times of one layer against the length of one sequence, with bars on a logarithmic scale."""
    times: list[tuple[int, str, float]] = []
    left_out: dict[int, float] = {}
    clocked, repeats = (gpu_seconds, 5) if device.type == "cuda" else (cpu_seconds, 3)
    with progress("one layer against its length", 2 * len(sizes.attention)) as advance:
        for tokens in sizes.attention:
            if times:
                (before, _, kda), (_, _, sdpa) = times[-2:]
                more = tokens / before
                needed = (1 + repeats) * (more * kda + more**2 * sdpa)
                if needed > until - clock(device):
                    left_out[tokens] = needed
                    continue
            call = inputs(sizes.heads, (tokens,), device)
            q, k, v = (call[name].transpose(1, 2) for name in "qkv")
            for name, layer in (
                ("KDA", lambda call=call: chunk_kda(**call)),
                ("SDPA", lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
            ):
                layer()
                times.append((tokens, name, clocked(layer, repeats)))
                advance(1)
    say(f"\nOne layer, H = {sizes.heads}, against softmax attention (SDPA) of the same tokens, ms")
    for line in bars(times):
        say(line)
    say_left_out(left_out)


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
