"""KDA by chunks: the algebra of the kernels in plain torch, for every gate, differentiable, on any device.

Per chunk of C tokens, with g the log decay and E[i, j] = exp(g_{j+1} + ... + g_i) for i >= j, per key channel:

    A[i, j] = beta_i sum_k k_i k_j E[i, j]   (i > j)        Kd_i = k_i exp(g_1 + ... + g_i)
    M[i, j] = sum_k q_i k_j E[i, j]          (i >= j)       Qd_i = q_i exp(g_1 + ... + g_i)     (q is scaled already)
    T = (I + A)^-1    W = T diag(beta) Kd    U0 = T diag(beta) V                    Kr_j = k_j E[C, j]

    U = U0 - W S^T    O = Qd S^T + M U       S <- S diag(exp(g_1 + ... + g_C)) + U^T Kr
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .recurrence import token_by_token
from .transforms import sequence_bounds, transform

# Elements of E that exist at a time, unless autograd keeps them: 128 MiB in fp64 on the CPU, where larger blocks
# leave the cache; 1 GiB on a GPU, where launches are what costs.
BLOCK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    chunk_size: int = 16,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The arguments of `kda_cute.chunk_kda`; `dtype` is that of the arithmetic and of both results.

    safe_gate is a promise about g that this needs not: every exponent is a sum of log decays of its own, so none
    overflows and none cancels. Rows of o that no sequence covers are zero. A token that is not finite leaves those
    before it, other heads and other sequences as they are.
    """
    q, k, v, g, beta = transform(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        A_log=A_log,
        dt_bias=dt_bias,
        dtype=dtype,
    )
    B, T, HV, K, V = *k.shape, v.shape[-1]
    q, k, v, g, beta = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    plan = Plan.make(sequence_bounds(B, T, cu_seqlens), chunk_size, q.device)
    N = len(plan.order)

    if initial_state is None:
        S = k.new_zeros(N, HV, V, K)
    else:
        S = initial_state.to(dtype) if state_v_first else initial_state.to(dtype).transpose(-1, -2)
        S = S.index_select(0, plan.order)

    step_elements = max(plan.active[:1] or [1]) * HV * chunk_size**2 * K
    block = max(1, BLOCK_ELEMENTS.get(q.device.type, 1 << 24) // max(1, step_elements))
    o_blocks: list[torch.Tensor] = []
    finished: list[torch.Tensor] = []  # states of the sequences that have ended, shortest first
    for first in range(0, len(plan.active), block):
        steps = plan.active[first : first + block]
        begin = plan.offset[first]
        tokens, valid = plan.rows(begin, begin + sum(steps))
        gathered = [_gather(x, tokens, valid) for x in (q, k, v, g, beta)]
        chunks = prepare(*gathered)
        U, QS, before = [], [], []
        at = 0
        for n in steps:
            if n < S.shape[0]:
                finished.append(S[n:])
                S = S[:n]
            c = slice(at, at + n)
            at += n
            before.append(S)
            WS_QS = chunks.W_Qd[c] @ S.transpose(-1, -2)
            U_c = chunks.U0[c] - WS_QS[..., :chunk_size, :]
            S = S * chunks.decay[c] + U_c.transpose(-1, -2) @ chunks.Kr[c]
            U.append(U_c)
            QS.append(WS_QS[..., chunk_size:, :])
        O = torch.cat(QS) + chunks.M @ torch.cat(U)
        if not _is_finite(O):
            O = _causal(O, torch.cat(before), gathered)
        o_blocks.append(O.transpose(1, 2).reshape(-1, HV, V))
    finished.append(S)

    o = v.new_zeros(B * T, HV, V)
    if o_blocks:
        row, token = plan.valid_rows()
        o = o.index_copy(0, token, torch.cat(o_blocks).index_select(0, row))
    o = o.view(B, T, HV, V)
    if not output_final_state:
        return o, None
    S = torch.cat(finished[::-1]).index_select(0, plan.order.argsort())
    return o, (S if state_v_first else S.transpose(-1, -2)).contiguous()


class Chunks(NamedTuple):
    """What a chunk gives to the state loop, n chunks at once."""

    W_Qd: torch.Tensor  # [n, HV, 2C, K], W above Qd: one product with S for both
    U0: torch.Tensor  # [n, HV, C, V]
    M: torch.Tensor  # [n, HV, C, C]
    Kr: torch.Tensor  # [n, HV, C, K]
    decay: torch.Tensor  # [n, HV, 1, K]


def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> Chunks:
    """q, k, g [n, HV, C, K], v [n, HV, C, V], beta [n, HV, C]. Needs no state: all chunks in parallel."""
    C = q.shape[-2]
    E = pair_decays(g)
    kE = k[..., None, :, :] * E  # [n, HV, i, j, K]
    beta = beta[..., None]
    A = (beta * (kE @ k[..., :, :, None]).squeeze(-1)).tril(-1)
    M = (kE @ q[..., :, :, None]).squeeze(-1).tril()
    identity = torch.eye(C, dtype=q.dtype, device=q.device)
    T = torch.linalg.solve_triangular(identity + A, identity, upper=False, unitriangular=True)
    G = g.cumsum(-2).exp()
    W = T @ (beta * k * G)
    return Chunks(W_Qd=torch.cat((W, q * G), -2), U0=T @ (beta * v), M=M, Kr=kE[..., -1, :, :], decay=G[..., -1:, :])


def pair_decays(g: torch.Tensor) -> torch.Tensor:
    """E [n, HV, C, C, K] of g [n, HV, C, K], 1 above the diagonal."""
    row = torch.arange(g.shape[-2], device=g.device)
    # log E[i, j] is summed from j + 1 up and never taken as G_i - G_j: that would lose all digits of a weak decay
    # behind a token of -1000 nats. Above the diagonal nothing is summed, E is 1 there.
    return torch.where(row[:, None, None] > row[None, :, None], g[..., :, None, :], 0).cumsum(-3).exp()


def _is_finite(x: torch.Tensor) -> bool:
    """Whether all numbers are, or cannot be looked at: there are none on meta, and vmap has those of many calls."""
    level = x
    while torch._C._functorch.is_functorch_wrapped_tensor(level):
        if torch._C._functorch.is_batchedtensor(level):
            return True
        level = torch._C._functorch.get_unwrapped(level)
    return x.is_meta or bool(x.isfinite().all())


def _causal(O: torch.Tensor, S: torch.Tensor, gathered: list[torch.Tensor]) -> torch.Tensor:
    """O [n, HV, C, V] with what is not finite only where token by token it is not.

    In products over a chunk a NaN or infinity meets the zeros that earlier tokens have for it, and 0 * NaN is NaN. So
    chunks that are the first with it are done again, from the state before them, S [n, HV, V, K]. Once a row of the
    state has it, it stays there.
    """
    spoiled = ~O.isfinite().all(-2) & S.isfinite().all(-1)  # [n, HV, V]
    chunk = spoiled.flatten(1).any(1).nonzero().squeeze(1)
    q, k, v, g, beta = (x.index_select(0, chunk).transpose(1, 2) for x in gathered)
    o, _ = token_by_token(q, k, v, g, beta, S.index_select(0, chunk))
    spoiled, kept = spoiled.index_select(0, chunk), O.index_select(0, chunk)
    return O.index_copy(0, chunk, torch.where(spoiled[..., None, :], o.transpose(1, 2), kept))


def _gather(x: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Rows of x [tokens, HV, ...] as chunks [n, HV, C, ...]. Rows past a sequence's end act as k = beta = g = 0."""
    rows = x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape)
    return torch.where(valid.reshape(*valid.shape, *[1] * (x.dim() - 1)), rows, 0).transpose(1, 2)


class Plan(NamedTuple):
    """Which token sits in which chunk. Sequences go longest first, chunks step by step: the chunks of step c are those
    of sequences 0 .. active[c] - 1, next to each other, so a step of the state loop serves all sequences at once."""

    order: torch.Tensor  # [N], sequences, most chunks first
    active: list[int]  # sequences that have a chunk at each step
    offset: list[int]  # first chunk of each step
    begin: torch.Tensor  # [chunks], first token, on the CPU like the next two
    length: torch.Tensor  # [chunks], tokens, at most C
    chunk_size: int
    device: torch.device

    @staticmethod
    def make(bounds: list[tuple[int, int]], chunk_size: int, device: torch.device) -> Plan:
        begin = torch.tensor([b for b, _ in bounds], dtype=torch.int64, device="cpu")
        length = torch.tensor([e - b for b, e in bounds], dtype=torch.int64, device="cpu")
        order = length.argsort(descending=True, stable=True)
        begin, length = begin[order], length[order]
        count = (length + chunk_size - 1) // chunk_size
        steps = int(count[0]) if len(bounds) else 0
        active = (count[None, :] > torch.arange(steps, device="cpu")[:, None]).sum(1) if steps else count[:0]
        offset = active.cumsum(0) - active
        step = torch.repeat_interleave(torch.arange(steps, device="cpu"), active)
        sequence = torch.arange(len(step), device="cpu") - offset[step]
        return Plan(
            order=order.to(device),
            active=active.tolist(),
            offset=offset.tolist(),
            begin=begin[sequence] + step * chunk_size,
            length=(length[sequence] - step * chunk_size).clamp(max=chunk_size),
            chunk_size=chunk_size,
            device=device,
        )

    def rows(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token of every row of chunks first .. end - 1, [end - first, C], and whether the row holds one."""
        i = torch.arange(self.chunk_size, device="cpu")
        valid = i < self.length[first:end, None]
        tokens = torch.where(valid, self.begin[first:end, None] + i, self.begin[first:end, None])
        return tokens.to(self.device), valid.to(self.device)

    def valid_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of all chunks that hold a token, and that token."""
        i = torch.arange(self.chunk_size, device="cpu")
        row = (i < self.length[:, None]).flatten().nonzero().squeeze(1)
        token = (self.begin[:, None] + i).flatten()[row]
        return row.to(self.device), token.to(self.device)
