"""What the demo leaves out at which speed, and what it shows meanwhile. Its clock is made up: nothing is timed."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kda_cute import demo

UNTIL = demo.SHARE * demo.CPU.seconds
CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which passes when a test says so, and a microsecond with each look at the clock."""
    now = [0.0]

    def look() -> float:
        now[0] += 1e-6
        return now[0]

    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=look))
    return now


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, now: list[float]) -> Callable[..., list[int]]:
    """machine(seconds a token, seconds a pair of tokens, slower): a model that reads nothing and takes so long for a
    prefill, times slower(streams, tokens before). Gives the list of (streams, tokens so far) of each."""

    def make(of_token: float, of_pair: float, slower: Callable[[int, int], float] = lambda streams, before: 1) -> Any:
        seen: list[tuple[int, int]] = []

        def prefill(self: Any, tokens: torch.Tensor, cache: demo.Cache, chunk: int | None = None) -> None:
            if not cache.layers:
                seen.append((len(tokens), 0))
                cache.layers[0] = (tokens,)
            streams, before = seen[-1]
            more = tokens.shape[1]
            now[0] += streams * more * (of_token + of_pair * (before + more / 2)) * slower(streams, before)
            seen[-1] = streams, before + more

        def forward(self: Any, tokens: torch.Tensor, cache: demo.Cache) -> torch.Tensor:
            return torch.zeros(*tokens.shape, self.config.vocab_size)

        monkeypatch.setattr(demo.KimiLinear, "prefill", prefill)
        monkeypatch.setattr(demo.KimiLinear, "forward", forward)
        return seen

    return make


def rows(out: str) -> list[int]:
    return [int(line.split()[0]) for line in out.splitlines() if " kB " in line]


def left_out(out: str) -> str:
    found = [line.split(": ")[1] for line in out.splitlines() if "left out" in line]
    assert len(found) <= 1
    return "".join(found)


SPEEDS = {
    "quick": (1e-4, 1e-9, [1000, 16360, 65512], ""),
    "slow": (1e-3, 0.0, [1000], "16360 tokens, about 65 s; 65512 tokens, about 66 s"),
    "slow attention": (1e-4, 4e-8, [1000, 16360], "65512 tokens, about 2 min"),
    "slower than all the time there is": (1e-2, 0.0, [1000], "16360 tokens, about 11 min; 65512 tokens, about 11 min"),
}


@torch.no_grad()
@pytest.mark.parametrize("of_token, of_pair, contexts, without", SPEEDS.values(), ids=SPEEDS)
def test_contexts_by_speed(
    of_token: float, of_pair: float, contexts: list[int], without: str, machine: Any, capsys: Any
) -> None:
    """The first one runs at any speed, and wrong answers fail: nothing was read here, so all are."""
    seen = machine(of_token, of_pair)
    (failure,) = demo.hybrid(demo.CPU, CPU, UNTIL)
    assert failure.startswith("recall up to 16384 tokens is ")
    out = capsys.readouterr().out
    assert rows(out) == contexts and left_out(out) == without
    assert [tokens for _, tokens in seen] == [1000, *contexts]  # the others did not begin


@torch.no_grad()
def test_a_machine_that_becomes_slow_is_noticed(machine: Any, now: list[float], capsys: Any) -> None:
    seen = machine(1e-4, 1e-9, lambda streams, before: 30 if streams == 1 and before else 1)
    demo.hybrid(demo.CPU, CPU, UNTIL)
    out = capsys.readouterr().out
    assert rows(out) == [1000, 16360] and left_out(out).startswith("65512 tokens, about ")
    assert 0 < seen[-1][1] < 65512 / 10 and now[0] < UNTIL


@torch.no_grad()
def test_one_slow_piece_stops_nothing(machine: Any, capsys: Any) -> None:
    machine(1e-4, 1e-9, lambda streams, before: 50 if streams == 1 and before == 512 else 1)
    demo.hybrid(demo.CPU, CPU, UNTIL)
    out = capsys.readouterr().out
    assert rows(out) == [1000, 16360, 65512] and not left_out(out)


@torch.no_grad()
def test_nothing_is_left_out_without_a_limit(machine: Any, capsys: Any) -> None:
    machine(1.0, 1.0)
    demo.hybrid(demo.CPU, CPU)
    assert rows(capsys.readouterr().out) == [1000, 16360, 65512]


def pieces_of(streams: int, context: int, of_token: float, of_pair: float, noise: float = 0) -> list[demo.Piece]:
    return [
        demo.Piece(
            at, 512, streams, streams * 512 * (of_token + of_pair * (at + 256)) * (1 + noise * math.cos(at / 512))
        )
        for at in range(0, context, 512)
    ]


@pytest.mark.parametrize("of_token, of_pair", [(1e-4, 1e-9), (1e-4, 0.0), (0.0, 1e-8)])
def test_estimate(of_token: float, of_pair: float) -> None:
    pieces = [*pieces_of(16, 1024, of_token, of_pair), *pieces_of(4, 16384, of_token, of_pair)]
    want = 65536 * (of_token + of_pair * 32768)
    assert demo.seconds_for(1, 65536, pieces) == pytest.approx(want, rel=1e-6)


def test_short_pieces_tell_nothing_of_long_contexts() -> None:
    noisy = pieces_of(16, 1024, 1e-4, 0.0, noise=0.5)
    linear = sum(x.seconds for x in noisy) / (16 * 1024)
    assert demo.seconds_for(1, 65536, noisy) == pytest.approx(65536 * linear)


def test_estimate_of_pieces_that_become_quicker() -> None:
    assert demo.seconds_for(1, 65536, pieces_of(1, 16384, 1e-4, -1e-9)) > 0


LAYERS = [
    (math.inf, 3, ""),
    (1.0, 2, "4096 tokens, about 2 s"),
    (0.0, 1, "1024 tokens, about 0 s; 4096 tokens, about 2 s"),
]


@pytest.mark.parametrize("until, tokens, without", LAYERS)
def test_layers_by_speed(
    until: float, tokens: int, without: str, monkeypatch: pytest.MonkeyPatch, now: list[float], capsys: Any
) -> None:
    def layer(q: torch.Tensor, dim: int, of_token: float) -> None:
        now[0] += of_token * q.shape[dim]

    monkeypatch.setattr(demo, "chunk_kda", lambda q, **_: layer(q, 1, 1e-4))
    sdpa = SimpleNamespace(scaled_dot_product_attention=lambda q, k, v, is_causal: layer(q, 2, 1e-6))
    monkeypatch.setattr(demo, "F", sdpa)
    demo.attention(demo.CPU, CPU, until)
    out = capsys.readouterr().out
    assert sum(line.endswith("#") for line in out.splitlines()) == 2 * tokens and left_out(out) == without


def test_progress_without_a_terminal_is_a_line_now_and_then(now: list[float], capsys: Any) -> None:
    with demo.progress("what", 100) as advance:
        for _ in range(100):
            now[0] += 0.3
            advance(1)
    err = capsys.readouterr().err
    assert err.splitlines() == ["  what: 34%", "  what: 68%"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with demo.progress("what", 4) as advance:
        advance(3)
    assert "what   0% |" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_one_thread_and_a_minute_on_the_cpu(monkeypatch: pytest.MonkeyPatch, now: list[float]) -> None:
    now[0], seen = 7.0, []
    for name in ("kernel", "hybrid", "attention"):
        monkeypatch.setattr(
            demo, name, lambda sizes, device, *until: seen.append((*until, torch.get_num_threads())) or []
        )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert demo.run(cpu=True) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [(1,), (pytest.approx(7 + UNTIL), 1), (pytest.approx(7 + 60), 1)]


@pytest.mark.parametrize(
    "available, hip, capability, hopper",
    [
        (False, None, None, False),
        (True, None, (9, 0), True),
        (True, None, (8, 0), False),
        (True, "6.2", (9, 0), False),  # an MI200 says that of itself
    ],
)
def test_what_a_hopper_gpu_is(
    available: bool, hip: str | None, capability: Any, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import no_hopper

    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert demo.has_hopper() == hopper
    assert (no_hopper() is None) == hopper
