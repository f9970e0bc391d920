"""What `gates`, `prepare` and `invert` make of a chunk, run warp by warp on the CPU, against formulas in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kda_cute.kernels.config import KdaFwdConfig
from kda_cute.kernels.fwd_sm90 import pipeline_of
from kda_cute.kernels.layout import A_ROW, ANCHORS, BOX, DECAY, SQUARES, SYSTEM, C, D
from tests.lanes import LANES, Warp, bf16, bf16_pair, copy_of, lane_by_lane, on_the_cpu

roles: Any = copy_of("kda_cute.kernels.roles_prepare")
chunk, fragments, gates = roles.chunk, roles.fragments, roles.gate

STAGE, TABLE, SYS, BIAS, TRIANGLE = 0, 45056, 49152, 57344, 58368
f32, u32 = np.float32, np.uint32


def rounded(x: Any) -> np.ndarray:
    return bf16_pair(bf16(x).astype(np.uint32))[..., 0]


def swizzled(box: int, row: Any, byte: Any) -> Any:
    """Address of a byte of a row of 128, in the 128-byte swizzle."""
    return box + row * 128 + ((byte // 16) ^ (row % 8)) * 16 + byte % 16


def put(warp: Warp, box: int, x: np.ndarray, dtype: str) -> None:
    """[32, 64] of 16 bits as TMA leaves it."""
    row, col = np.indices(x.shape)
    at, bits = swizzled(box, row, 2 * col), bf16(x) if dtype == "bf16" else x.astype(np.float16).view(np.uint16)
    warp.memory[at], warp.memory[at + 1] = bits & 255, bits >> 8


def get(warp: Warp, box: int) -> np.ndarray:
    row, col = np.indices((C, 64))
    at = swizzled(box, row, 2 * col)
    bits = warp.memory[at].astype(np.uint32) | warp.memory[at + 1].astype(np.uint32) << 8
    return (bits << 16).astype(np.uint32).view(f32)


def decay_of(gate: str, g: np.ndarray, A_log: float, bias: np.ndarray, lower_bound: float) -> np.ndarray:
    """log2 decay, fp64."""
    x, a = g.astype(np.float64) + bias, np.exp(A_log)
    if gate == "safe":
        return lower_bound / (1 + np.exp(-a * x)) * np.log2(np.e)
    if gate == "softplus":
        return -a * np.logaddexp(0, x) * np.log2(np.e)
    return g.astype(np.float64) * np.log2(np.e)


def prepare(
    gate: str,
    dtype: Any,
    g_dtype: Any,
    q: Any,
    k: Any,
    g: Any,
    A_log: float,
    bias: Any,
    lower_bound: float,
    tokens: int = C,
    v_split: Any = 1,
) -> dict[str, np.ndarray]:
    """What the two warps of a pair leave in shared memory."""
    pipe = pipeline_of(KdaFwdConfig(g_dtype, gate, v_split, dtype=dtype))  # type: ignore[arg-type]
    warp = Warp()
    with on_the_cpu(roles, warp):  # code with branches on the lane
        clear_rows, clear = (lane_by_lane(roles, warp, f) for f in (chunk.clear_rows, gates.clear))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(chunk, "clear_rows", clear_rows)
        m.setattr(gates, "clear", clear)
        m.setattr(fragments, "ones_if", lambda condition: np.where(condition, u32(0x3C003C00), u32(0)))
        return run(pipe, warp, dtype, g_dtype, q, k, g, A_log, bias, lower_bound, tokens)


def run(
    pipe: Any, warp: Warp, dtype: Any, g_dtype: Any, q: Any, k: Any, g: Any, A_log: float, bias: Any,
    lower_bound: float, tokens: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    form, tiles = pipe.form, pipe.tiles
    for half in range(2):
        cols = slice(64 * half, 64 * half + 64)
        put(warp, half * tiles.k_half, k[:, cols], dtype)
        put(warp, half * tiles.k_half + BOX, q[:, cols], dtype)
        if g_dtype != "fp32":
            put(warp, tiles.at_g + half * tiles.kr_half, g[:, cols], g_dtype)
        else:
            row, col = np.indices((C, 64))
            at = swizzled(tiles.at_g + half * tiles.kr_half + col // 32 * BOX, row, col % 32 * 4)
            for i in range(4):
                warp.memory[at + i] = g[:, cols].astype(f32).view(np.uint32) >> (8 * i) & 255
    for lane in range(3):  # code with branches
        with on_the_cpu(roles, Warp(warp)):
            chunk.lower_triangle(TRIANGLE, 1, np.int64(lane))
    with on_the_cpu(roles, warp):
        lam = gates.log2_of_factor(form, gates.Inputs(0, 0, f32(lower_bound), 0))
        row, col = LANES // 4, LANES % 4 * 2
        triangle = warp.lds_u32x4(TRIANGLE + 16 * ((col <= row).astype(int) + (col < row)))
        tile, sums = fragments.tile_at(0, LANES), []
        slope, shift = gates.slope_of(form, f32(A_log))
        for half in range(2):
            biases = gates.bias(form, slope, shift, bias[64 * half : 64 * half + 64].astype(f32))
            warp.memory[BIAS : BIAS + 256] = np.asarray(biases, f32).view(np.uint8)
            if tokens < C:
                chunk.clear_tail(pipe, LANES, half, tokens, STAGE)
            gates.of_chunk(
                form, slope, BIAS, half, STAGE, TABLE, gates.Inputs(0, 0, f32(lower_bound), 0), tokens, LANES
            )
            acc: list[Any] = [np.zeros(32, f32) for _ in range(64)]
            tile_kq = STAGE + half * tiles.k_half + tile
            tile_kr = STAGE + tiles.at_g + half * tiles.kr_half + tile
            table = STAGE + tiles.at_t + half * ANCHORS + LANES % 4 * 16
            for kk in range(4):
                chunk.decay(pipe, acc, tile_kq ^ (kk * 32), tile_kr ^ (kk * 32), table + kk * 128, triangle, lam)
            sums.append(chunk.accumulators(pipe, acc))
        a_at, m_at = SYS + LANES * 16, STAGE + tiles.at_t + LANES * 16
        for half, (A, M, _) in enumerate(sums):
            chunk.give(pipe, a_at, m_at, A, M, half)
        A, M = chunk.take(a_at, sums[0][0]), chunk.take(m_at, sums[1][1])
        q2 = [fragments.quad_sum(sums[0][2][i]) + fragments.quad_sum(sums[1][2][i]) for i in range(4)]
    for lane in range(32):
        one = Warp(warp)
        with on_the_cpu(roles, one):
            chunk.store_a([(x[0][lane], x[1][lane]) for x in A], SYS, np.int64(lane))
    words = M  # a pair of each lane: rows of 8 x 8 blocks
    found = {name: np.zeros((C, C)) for name in "AM"}
    system = warp.memory[SYS : SYS + SYSTEM].view(f32)
    for (i, j), (m0, m1) in zip(chunk.QUADS, words, strict=True):
        for e, m in enumerate((m0, m1)):
            found["M"][8 * i + LANES // 4, 8 * j + LANES % 4 * 2 + e] = m
    found["A"] = system[: C * A_ROW // 4].reshape(C, A_ROW // 4)[:, :C].T.astype(np.float64)
    found["k2"] = system[SQUARES // 4 : SQUARES // 4 + C].astype(np.float64)
    found["q2"] = np.concatenate([x[::4] for x in q2])
    for name, at in (("Kd", 0), ("Qd", BOX), ("Kr", tiles.at_g)):
        step = tiles.k_half if name != "Kr" else tiles.kr_half
        found[name] = np.concatenate([get(warp, at + half * step) for half in range(2)], 1).astype(np.float64)
    found["decay"] = warp.memory[TABLE + DECAY : TABLE + DECAY + 4 * D].view(f32).astype(np.float64)
    return found


def exact(q: np.ndarray, k: np.ndarray, log2_decay: np.ndarray) -> dict[str, np.ndarray]:
    q, k = q.astype(np.float64), k.astype(np.float64)
    G = np.cumsum(log2_decay, 0)
    E = np.zeros((C, C, D))
    for j in range(C):
        E[j:, j] = 2 ** np.concatenate([np.zeros((1, D)), np.cumsum(log2_decay[j + 1 :], 0)])
    A, M = np.einsum("ic,jc,ijc->ij", k, k, E), np.einsum("ic,jc,ijc->ij", q, k, E)
    return dict(
        A=np.tril(A, -1), M=np.tril(M), k2=(k * k).sum(1), q2=(q * q).sum(1), Kd=k * 2**G, Qd=q * 2**G, Kr=k * E[-1],
        decay=2 ** G[-1],
    )  # fmt: skip


GATES = {
    # gate, A_log, bias, g's scale
    "safe, strong": ("safe", 0.5, 0.5, 1.0),
    "safe, weak": ("safe", 0.0, -8.0, 1.0),
    "safe, all 5 nats": ("safe", 0.0, 100.0, 1.0),
    "softplus, weak": ("softplus", 0.0, -8.0, 1.0),
    "softplus, 1": ("softplus", 0.0, 0.0, 1.0),
    "softplus, 8": ("softplus", np.log(8), 0.0, 1.0),
    "softplus, 16": ("softplus", np.log(16), 0.5, 1.0),
    "softplus, 200": ("softplus", np.log(200), 0.0, 1.0),
    "softplus, A_log = 88": ("softplus", 88.0, -89.0, 1.0),
    "safe, A_log = 88": ("safe", 88.0, 0.5, 1.0),
    "softplus, 200 of few": ("softplus", np.log(200), -8.0, 3.0),
    "log, wide": ("log", 0.0, 0.0, 1.0),
    "log, 1e4": ("log", 0.0, 0.0, 1e4),
    "log, now and then": ("log", 0.0, 0.0, -1.0),
    "log, 0": ("log", 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("tokens, v_split", [(C, 1), (13, 1), (C, 2)])
@pytest.mark.parametrize("dtype, g_dtype", [("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16")])
@pytest.mark.parametrize("gate, A_log, bias, scale", GATES.values(), ids=GATES)
def test_prepare(
    gate: str, A_log: float, bias: float, scale: float, dtype: str, g_dtype: str, tokens: int, v_split: int
) -> None:
    """A whole chunk, and the last one of a sequence, behind which the next one's tokens are, here NaN."""
    rng = np.random.default_rng(0)
    to = {"bf16": rounded, "fp16": lambda x: x.clip(-6e4, 6e4).astype(np.float16).astype(f32), "fp32": f32}
    q, k = (to[dtype](rng.standard_normal((C, D)) * D**-0.5) for _ in range(2))
    g = rng.standard_normal((C, D))
    if gate == "log":
        g = -(10 ** (9 * rng.random((C, D)) - 6)) if scale == 1 else -scale * rng.random((C, D))
        if scale < 0:  # weak, but for a token of a thousand nats in one channel of five
            g = np.where(rng.random((C, D)) < 0.03, -1000, -0.001 * rng.random((C, D)))
    else:
        g = g * scale
    g = to[g_dtype](g)
    biases = (bias + rng.random(D)) if gate != "log" else np.zeros(D)
    poisoned = [np.where(np.arange(C)[:, None] < tokens, x, np.nan).astype(f32) for x in (q, k, g)]
    got = prepare(gate, dtype, g_dtype, *poisoned, A_log, biases, -5.0, tokens, v_split)
    decay = decay_of(gate, g, A_log, biases.astype(f32), -5.0)
    q[tokens:], k[tokens:], decay[tokens:] = 0, 0, 0
    want = exact(q, k, decay)
    rows, cols = np.indices((C, C))
    got["A"], got["M"] = np.where(cols < rows, got["A"], 0), np.where(cols <= rows, got["M"], 0)
    # two factors are rounded to bf16; of what is forgotten altogether 2^-24 may remain
    whole = exact(q, k, np.zeros((C, D)))
    for name, x in want.items():
        assert np.isfinite(got[name]).all(), name
        error, size = np.linalg.norm(got[name] - x), np.linalg.norm(x)
        print(f"{name} {error / size:.1e} {error / np.linalg.norm(whole[name]):.1e}", end=" ")
        assert error < 2 * 2.0**-9 * size + 1e-7 * np.linalg.norm(whole[name]), name


@pytest.mark.parametrize("neg_eigval", [False, True])
def test_invert(neg_eigval: bool) -> None:
    """T = diag(1/|k|) (I + A)^-1 diag(beta), or bare, of keys that are alike, so that it is not near the identity."""
    rng = np.random.default_rng(0)
    pipe = pipeline_of(KdaFwdConfig(neg_eigval=neg_eigval))
    k = rng.standard_normal((C, D)) + 1
    rk, beta = 1 / np.linalg.norm(k, axis=1), rng.random(C) * (2 if neg_eigval else 1)
    A = np.tril(k @ k.T, -1)
    inverse = np.linalg.inv(np.eye(C) + (beta * rk)[:, None] * A * rk)
    warp, norm_at, stage = Warp(), TABLE, 0
    system = np.zeros((C, A_ROW // 4), f32)
    system[:, :C] = A.T
    for at, x in (
        (SYS, system.reshape(-1)),
        (SYS + SQUARES, -rk * beta),
        (norm_at, rk),
        (norm_at + 2 * C * 4, beta),
    ):
        x = np.asarray(x, f32)
        warp.memory[at : at + x.nbytes] = x.view(np.uint8)
    with on_the_cpu(roles, warp), pytest.MonkeyPatch.context() as m:
        m.setattr(fragments, "delta", lambda i, j: np.where(i == j, f32(1), f32(0)))
        roles.inverse.of_chunk(pipe, SYS, norm_at, STAGE, stage, beta.astype(f32), LANES)
    row, col = np.indices((C, C))
    at = STAGE + pipe.tiles.at_t + row * 64 + ((col // 8) ^ (row // 2 % 4)) * 16 + col % 8 * 2
    bits = warp.memory[at].astype(np.uint32) | warp.memory[at + 1].astype(np.uint32) << 8
    got = (bits << 16).astype(np.uint32).view(f32)
    want = inverse if neg_eigval else rk[:, None] * inverse * beta
    assert (got[:16, 16:] == 0).all()
    assert np.abs(got - want).max() < 2.0**-8 * np.abs(want).max()
    assert np.linalg.norm(got - want) < 2.0**-8 * np.linalg.norm(want)
