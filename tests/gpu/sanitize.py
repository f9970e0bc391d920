"""What `make sanitize` runs under compute-sanitizer: every configuration on the shapes where kernels go wrong.

Chunks that are full, partial and absent, more sequences than stages, items that go on in another block, segments that
run at the same time (that forget, that do not, that have to run again), every state layout and dtype. Small: racecheck
slows a kernel down a thousandfold. Prints one line a call, and fails when a result is wrong.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch

from kda_cute import chunk_kda, fused_decode_kda, fused_recurrent_kda, known_calls
from kda_cute.backends import hopper
from kda_cute.kernels.config import GATES
from tests import by_token
from tests.fused_cases import FusedCase, composition, make
from tests.gpu.oracle import BOUND, relative_error

LENGTHS = (0, 1, 15, 16, 17, 32, 33, 0, 70, 200)
H, D = 2, 128


def call(
    g_dtype: torch.dtype, gate: str, neg_eigval: bool, varlen: bool, state_dtype: torch.dtype,
    state_v_first: bool, decay: str,
) -> float:  # fmt: skip
    B, T = (1, sum(LENGTHS) + 5) if varlen else (2, 270)
    N = len(LENGTHS) if varlen else B
    cuda, in_kernel = {"device": "cuda"}, gate != "log"
    q, k, v = (torch.randn(B, T, H, D, **cuda).bfloat16() for _ in range(3))
    beta = torch.randn(B, T, H, **cuda).to(g_dtype)
    g = torch.randn(B, T, H, D, **cuda)
    g = (g - 9 * (decay == "weak") if in_kernel else g.sigmoid() * (-0.01 if decay == "weak" else -5)).to(g_dtype)
    state = (torch.randn(N, H, D, D, **cuda) * (1e30 if decay == "huge state" else 1)).to(state_dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], **cuda) if varlen else None
    arguments = dict(
        initial_state=state, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=neg_eigval,
        use_gate_in_kernel=in_kernel, lower_bound=-5.0 if gate == "safe" else None, cu_seqlens=cu_seqlens,
        state_v_first=state_v_first, A_log=torch.rand(H, **cuda) if in_kernel else None,
        dt_bias=torch.rand(H, D, **cuda) if in_kernel else None,
    )  # fmt: skip
    out, final = torch.zeros_like(v), torch.empty_like(state)
    o, s = chunk_kda(q, k, v, g, beta, out=out, final_state=final, **arguments)
    arguments = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected_o, expected_s = chunk_kda(
        q.cpu(), k.cpu(), v.cpu(), g.cpu(), beta.cpu(), out=torch.zeros_like(v, device="cpu"), output_final_state=True,
        **arguments,
    )  # fmt: skip

    return max(relative_error(o.cpu(), expected_o), relative_error(s.cpu(), expected_s))


def serving(split: int, state_dtype: torch.dtype) -> float:
    """States in a pool with gaps, null sequences, others without an initial state, and states after some tokens."""
    hopper.v_split = lambda *_: split
    hopper.sm_count = lambda _: 4
    hopper.builds_maps = lambda *_: split == 1
    known_calls.known.clear()
    N, T, cuda = len(LENGTHS), sum(LENGTHS) + 5, {"device": "cuda"}
    q, k, v, g = (torch.randn(1, T, H, D, **cuda).bfloat16() for _ in range(4))
    beta = torch.randn(1, T, 2 * H, **cuda).bfloat16()[..., :H]
    pools = [torch.randn(N + 3, H + 2, D, D, **cuda).to(state_dtype)[:, :H] for _ in range(2)]
    offsets = torch.tensor([[n // 2, 16, n] for n in LENGTHS], **cuda)
    arguments = dict(
        use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, use_gate_in_kernel=True, lower_bound=-5.0,
        state_v_first=True, A_log=torch.rand(H, **cuda), dt_bias=torch.rand(H, D, **cuda), null_index=0,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(LENGTHS)], **cuda),
        state_indices=torch.tensor([3, 0, 5, 1, -1, 7, 8, 9, 10, 2], **cuda),
        has_initial_state=torch.arange(N, **cuda) % 3 > 0, checkpoint_offsets=offsets,
        checkpoint_indices=torch.arange(3 * N, **cuda).view(N, 3) % (N + 3) * (torch.arange(3, **cuda) == 1),
    )  # fmt: skip
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected = [x.to("cpu", copy=True) for x in pools]
    o, _ = chunk_kda(q, k, v, g, beta, initial_state=pools[0], checkpoint_state=pools[1], **arguments)
    o_cpu, _ = chunk_kda(
        q.cpu(),
        k.cpu(),
        v.cpu(),
        g.cpu(),
        beta.cpu(),
        initial_state=expected[0],
        checkpoint_state=expected[1],
        **on_cpu,
    )
    return max(relative_error(x.cpu(), y) for x, y in zip((o, *pools), (o_cpu, *expected), strict=True))


def tokens_of(kind: str, v_first: bool) -> float:
    kwargs = by_token.arguments(
        "cuda", seed=8, kind=kind, v_first=v_first, null=0, dtypes=("fp32", "bf16"), wide=v_first, update=True,
        has=True, lengths=(9, 17, 2), group=1, gate="safe", gap=4, packed=True,
    )  # fmt: skip
    on_cpu = {name: x.to("cpu", copy=True) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    o, o_cpu = fused_recurrent_kda(**kwargs)[0], fused_recurrent_kda(**on_cpu)[0]
    pairs = [(o, o_cpu), *((kwargs[name], on_cpu[name]) for name in by_token.WRITTEN if name in kwargs)]
    return max(relative_error(x.cpu(), y) for x, y in pairs)


def decode(g_dtype: torch.dtype, gate: str, state_dtype: torch.dtype, state_v_first: bool) -> float:
    """Sequences of 0 to 19 tokens, from and into a pool of states, with the state after each token."""
    lengths, cuda = (1, 0, 19, 4, 1), {"device": "cuda"}
    T, N = sum(lengths) + 1, len(lengths)
    q, k, v = (torch.randn(1, T, H, D, **cuda).bfloat16() for _ in range(3))
    g, beta = torch.randn(1, T, H, D, **cuda).to(g_dtype), torch.randn(1, T, H, **cuda)
    pool = torch.randn(N + 2, H, D, D, **cuda).to(state_dtype)
    arguments = dict(
        use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, use_gate_in_kernel=gate != "log",
        lower_bound=-5.0 if gate == "safe" else None, state_v_first=state_v_first,
        A_log=torch.rand(H, **cuda) if gate != "log" else None,
        dt_bias=torch.rand(H, D, **cuda) if gate != "log" else None,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], **cuda),
        state_indices=torch.tensor([6, 0, 3, -1, 1], dtype=torch.int32, **cuda),
    )  # fmt: skip
    if gate == "log":
        g = -g.abs()
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected = pool.to("cpu", copy=True)
    o, states, after = fused_recurrent_kda(q, k, v, g, beta, initial_state=pool, output_token_states=True, **arguments)
    o_cpu, _, after_cpu = fused_recurrent_kda(
        q.cpu(), k.cpu(), v.cpu(), g.cpu(), beta.cpu(), initial_state=expected, output_token_states=True, **on_cpu
    )

    covered = sum(lengths)
    pairs = (o[:, :covered], o_cpu[:, :covered]), (states, expected), (after[:, :covered], after_cpu[:, :covered])
    return max(relative_error(x.cpu(), y) for x, y in pairs)


def fused(case: FusedCase) -> float:
    """Heads that share q and k or not, null slots, all dtypes; with and without what is around."""
    inputs = make(case, "cuda")
    truth, kwargs = composition(inputs), inputs.kwargs
    o, states = fused_decode_kda(**kwargs)
    return max(relative_error(o, truth.o), relative_error(states, truth.states))


def all_fused() -> Iterator[tuple[str, float]]:
    cases = itertools.product(("safe", "softplus"), (False, True), (False, True), (1, 2))
    for i, (gate, conv, norm, group) in enumerate(cases):
        case = FusedCase(
            i, N=5, H=H, group=group, gate=gate, conv=conv, norm=norm, state=("fp32", "bf16")[i % 3 % 2], nulls=True,
            indices=("int32", "int64")[i // 2 % 2], conv_layout=("channels", "taps", "view")[i % 3], gaps=i % 4 == 0,
            weight_dtype=("bf16", "fp32")[i // 3 % 2], separate=i % 5 == 0, large=i % 7 == 3,
        )  # fmt: skip
        yield f"{case}", fused(case)


def all_decode() -> Iterator[tuple[str, float]]:
    for g_dtype, gate, v_first in itertools.product((torch.bfloat16, torch.float32), GATES, (False, True)):
        state_dtype = torch.bfloat16 if gate == "safe" else torch.float32
        yield f"{g_dtype=} {gate=} {state_dtype=} {v_first=}", decode(g_dtype, gate, state_dtype, v_first)


def all_tokens() -> Iterator[tuple[str, float]]:
    for kind, v_first in itertools.product(by_token.KINDS, (False, True)):
        yield f"{kind=} {v_first=}", tokens_of(kind, v_first)


def all_serving() -> Iterator[tuple[str, float]]:
    for split, state_dtype in itertools.product((1, 2), (torch.float32, torch.bfloat16)):
        yield f"{split=} {state_dtype=}", serving(split, state_dtype)


def all_chunked() -> Iterator[tuple[str, float]]:
    cases = itertools.product((1, 2), (torch.bfloat16, torch.float32), GATES, (False, True), (True, False))
    cases = (case for case in cases if case[4] or not case[3])  # of beta up to 2 packed sequences, which are the harder
    for i, (split, g_dtype, gate, neg_eigval, varlen) in enumerate(cases):
        hopper.v_split = lambda *_, split=split: split
        # so few that items are cut, so many that they are segments
        hopper.sm_count = lambda _, few=varlen: 4 if few else 132
        hopper.builds_maps = lambda *_, split=split: split == 1
        known_calls.known.clear()
        state_dtype, state_v_first = (torch.float32, torch.bfloat16)[i % 2], i % 4 < 2
        decay = "strong" if varlen else ("strong", "weak", "huge state")[(i // 3 + i // 9) % 3]
        name = f"{split=} {g_dtype=} {gate=} {neg_eigval=} {varlen=} {decay=} {state_dtype=} {state_v_first=}"
        yield name, call(g_dtype, gate, neg_eigval, varlen, state_dtype, state_v_first, decay)


PARTS = {
    "fused": all_fused, "decode": all_decode, "tokens": all_tokens, "serving": all_serving, "chunked": all_chunked,
}  # fmt: skip


def main() -> None:
    """Arguments: names of PARTS; all without."""
    torch.manual_seed(0)
    for part in sys.argv[1:] or PARTS:
        for name, found in PARTS[part]():
            print(f"{part} {name} error {found:.1e}", flush=True)
            assert found < BOUND


if __name__ == "__main__":
    main()
