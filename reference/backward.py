"""The backward pass of KDA by chunks, by hand: no autograd but through the input transforms, and little memory.

In the names of `chunked`, with S the state before a chunk, dS that of the state behind it, P[i, j] the A[i, j] without
its beta_i, and l(), s() the lower part with and without the diagonal:

    dU = M^T dO + Kr dS^T        Y = T^T dU       dV = diag(beta) Y
    dS <- dS diag(exp(g_1 + ... + g_C)) + dO^T Qd - dU^T W          the chain, from the last chunk to the first

    dM = l(dO U^T)               dP = -s(dV U^T)                    dbeta_i = Y_i (V - Kd S^T - P U)_i
    dq_i = exp(g_1 + ... + g_i) (dO S)_i  + sum_j dM[i, j] E[i, j] k_j
    dk_i = -exp(g_1 + ... + g_i) (dV S)_i + sum_j dP[i, j] E[i, j] k_j
           + E[C, i] (U dS)_i + sum_j E[j, i] (dM[j, i] q_j + dP[j, i] k_j)

The log decay of token t is in all decays from before it to t or later, and its gradient is the sum of what these have,
each times its own gradient. It is never a difference of sums: a decay of exp(-1000) gets the zero that it has, not the
rounding of its neighbours, which the gates would multiply by 1000 and more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .chunked import Plan, pair_decays, prepare
from .transforms import sequence_bounds, transform

KEPT_EVERY = 16  # chunks: the state before is kept, those between are made again
# Elements of E and of states at a time: in fp32 16 MiB on the CPU, where more is slower too, and 128 MiB on a GPU,
# where launches are what costs.
ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}


@torch.no_grad()
def chunked_backward(
    do: torch.Tensor | None,
    d_final_state: torch.Tensor | None,
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
) -> dict[str, torch.Tensor]:
    """The gradients of q, k, v, g, beta, and of initial_state, A_log and dt_bias where they are given, in the shape and
    dtype of each, from do [B, T, HV, V] and d_final_state, of which None is zero. The other arguments are those of
    `chunked`; output_final_state is of no account. Tokens that no sequence covers have the gradient zero. What is not
    finite stays in its sequence and head, and in the parameters of the head.

    Besides the results it keeps a state every KEPT_EVERY chunks of the heads and sequences that are under way: V * K /
    256 numbers of `dtype` a token and head with chunks of 16 tokens, 256 bytes in fp32 with K = V = 128. What it works
    with takes six times ELEMENTS for any number of tokens, heads and sequences; or, if that is more, what one key head
    of one sequence takes, 18 MiB for each of its value heads.
    """
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    rows = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    parameters = {"A_log": A_log, "dt_bias": dt_bias}
    given = {**rows, "initial_state": initial_state, **parameters}
    made = {name: x.new_zeros(x.shape) for name, x in given.items() if x is not None}
    options = dict(
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        dtype=dtype,
    )
    bounds = sequence_bounds(B, T, cu_seqlens)
    longest_first = sorted(range(len(bounds)), key=lambda n: bounds[n][0] - bounds[n][1])
    group = HV // H
    lanes = ELEMENTS.get(q.device.type, 1 << 22) // max(1, KEPT_EVERY * K * (chunk_size**2 + V))
    at_once = max(1, min(H, lanes // group))  # key heads
    sequences = max(1, lanes // (at_once * group))

    for first in range(0, H, at_once):
        key = slice(first, min(first + at_once, H))
        value = slice(key.start * group, key.stop * group)
        # Leaves of autograd, one for all the chunks: summed in `dtype`.
        leaves = {name: x.reshape(HV, -1)[value].to(dtype).clone() for name, x in parameters.items() if x is not None}
        sums = {name: torch.zeros_like(x) for name, x in leaves.items()}
        for begin in range(0, len(bounds), sequences):
            some = longest_first[begin : begin + sequences]
            plan = Plan.make([bounds[n] for n in some], chunk_size, q.device)
            index = torch.tensor(some, dtype=torch.int64, device=q.device)
            states = [
                None if x is None else _v_first(x[:, value].index_select(0, index).to(dtype), state_v_first)
                for x in (initial_state, d_final_state)
            ]
            S, dS = (q.new_zeros(len(some), value.stop - value.start, V, K, dtype=dtype) if x is None else x
                     for x in states)  # fmt: skip
            part = _Part(
                plan, T, {n: x[:, :, key if n in "qk" else value] for n, x in rows.items()},
                None if do is None else do[:, :, value], leaves, options,
            )  # fmt: skip
            of_rows = {n: made[n][:, :, key if n in "qk" else value] for n in rows}
            dS = part.backward(S, dS, of_rows, sums)
            if initial_state is not None:
                made["initial_state"][index, value] = _v_first(dS, state_v_first).to(initial_state.dtype)
        for name, x in sums.items():
            made[name].view(HV, -1)[value] = x.to(made[name].dtype)
    return made


def _v_first(state: torch.Tensor, state_v_first: bool) -> torch.Tensor:
    """[.., V, K] from the caller's layout, or back."""
    return state if state_v_first else state.transpose(-1, -2)


class _Part(NamedTuple):
    """Some heads of some sequences."""

    plan: Plan
    T: int
    rows: dict[str, torch.Tensor]  # q, k, v, g, beta as they are given, [B, T, heads, ...]
    do: torch.Tensor | None
    parameters: dict[str, torch.Tensor]  # A_log [heads, 1], dt_bias [heads, K]
    options: dict[str, Any]

    def backward(
        self, S: torch.Tensor, dS: torch.Tensor, made: dict[str, torch.Tensor], sums: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Writes the gradients of rows to `made`, adds those of parameters to `sums`, and returns that of S, from S and
        that of the last state, both [sequences, HV, V, K], longest sequence first."""
        active = self.plan.active
        firsts = range(0, len(active), KEPT_EVERY)
        kept = []
        for first in firsts:
            S = S[: active[first]]
            kept.append(S)
            if first == firsts[-1]:
                break
            at = self.tokens_of(first)
            chunks = prepare(*(at.chunks(x) for x in self.transformed(at, self.leaves(at))))
            for n, c in self.steps(first):
                S = S[:n]
                U = chunks.U0[c] - chunks.W_Qd[c, :, : self.plan.chunk_size] @ S.mT
                S = S * chunks.decay[c] + U.mT @ chunks.Kr[c]
            del chunks
        whole, dS = dS, dS[:0]
        for first in reversed(firsts):
            dS = self.segment(first, kept.pop(), dS, whole, made, sums)
        return torch.cat((dS, whole[len(dS) :]))

    def segment(
        self,
        first: int,
        S: torch.Tensor,
        dS: torch.Tensor,
        whole: torch.Tensor,
        made: dict[str, torch.Tensor],
        sums: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Of steps first .. first + KEPT_EVERY - 1. S is the state before the first, dS that of the state behind the
        last, of the sequences that go on there; the others have theirs in `whole`."""
        at = self.tokens_of(first)
        leaves = self.leaves(at)
        with torch.enable_grad():
            for x in leaves.values():
                x.requires_grad_()
            outputs = self.transformed(at, leaves)
        *of_outputs, dS = self.chunks(first, at, [x.detach() for x in outputs], S, dS, whole)
        given = [at.tokens(x)[None] for x in of_outputs]
        found = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
        for (name, leaf), x in zip(leaves.items(), found, strict=True):
            if name in sums:
                sums[name] += 0 if x is None else x
            elif x is not None:
                assert x.shape == leaf.shape
                made[name][at.batch, at.token] = x.to(made[name].dtype)
        return dS

    def chunks(
        self,
        first: int,
        at: _Tokens,
        transformed: list[torch.Tensor],
        S: torch.Tensor,
        dS: torch.Tensor,
        whole: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv, dg, dbeta [chunks, HV, C, ...] of the segment's chunks, and dS before the first."""
        q, k, v, g, beta = (at.chunks(x) for x in transformed)
        dO = torch.zeros_like(v) if self.do is None else at.chunks(self.do[at.batch, at.token].to(v.dtype)[None])
        x = _Chunks.make(q, k, v, g, beta)

        steps = self.steps(first)
        before, U_c = [], []
        for n, c in steps:
            S = S[:n]
            before.append(S)
            U_c.append(x.U0[c] - x.W[c] @ S.mT)
            S = S * x.decay[c] + U_c[-1].mT @ x.Kr[c]
        S, U = torch.cat(before), torch.cat(U_c)

        MdO = x.M.mT @ dO
        reads = torch.cat((x.Qd, -x.W), -2)
        behind, dU_c = [], []
        for n, c in reversed(steps):
            dS = torch.cat((dS, whole[len(dS) : n]))
            behind.append(dS)
            dU_c.append(MdO[c] + x.Kr[c] @ dS.mT)
            dS = dS * x.decay[c] + torch.cat((dO[c], dU_c[-1]), -2).mT @ reads[c]
        D, dU = torch.cat(behind[::-1]), torch.cat(dU_c[::-1])
        del before, U_c, behind, dU_c, reads, MdO

        Y = x.T.mT @ dU
        dv = beta[..., None] * Y
        dbeta = (Y * (v - x.Kd @ S.mT - x.P @ U)).sum(-1)
        dM = (dO @ U.mT).tril()
        dP = -(dv @ U.mT).tril(-1)
        of_q, of_k, end = x.G * (dO @ S), -x.G * (dv @ S), x.to_end * (U @ D)
        by_row = torch.stack((dM, dP), -2) @ x.kE  # [chunks, HV, C, 2, K]
        # [.., i, j, K]: what the decay E[i, j] of k_j has, E included
        by_pair = (dM[..., None] * q[..., None, :] + dP[..., None] * k[..., None, :]).mul_(x.E)
        dq = of_q + by_row[..., 0, :]
        dk = of_k + by_row[..., 1, :] + end + by_pair.sum(-3)

        # Of the decays over token t: from the state to tokens from t on, and to the state; from tokens before t to
        # tokens from t on, and to the state, which are in `across` at t - 1.
        dg = (q * of_q + k * of_k).flip(-2).cumsum(-2).flip(-2) + x.decay * (S * D).sum(-2, keepdim=True)
        row = torch.arange(q.shape[-2], device=q.device)
        across = by_pair.mul_(k[..., None, :, :]).cumsum(-2)
        across = torch.where(row[:, None, None] > row[None, :, None], across, 0).sum(-3) + (k * end).cumsum(-2)
        dg[..., 1:, :] += across[..., :-1, :]
        return dq, dk, dv, dg, dbeta, dS

    def steps(self, first: int) -> list[tuple[int, slice]]:
        """Sequences of each step from `first` on, and its chunks among those of the segment."""
        found, at = [], 0
        for n in self.plan.active[first : first + KEPT_EVERY]:
            found.append((n, slice(at, at + n)))
            at += n
        return found

    def tokens_of(self, first: int) -> _Tokens:
        begin, C = self.plan.offset[first], self.plan.chunk_size
        end = begin + sum(self.plan.active[first : first + KEPT_EVERY])
        tokens, valid = self.plan.rows(begin, end)
        row = valid.flatten().nonzero().squeeze(1)
        token = tokens.flatten()[row]
        return _Tokens(token // max(self.T, 1), token % max(self.T, 1), row, end - begin, C)

    def leaves(self, at: _Tokens) -> dict[str, torch.Tensor]:
        """What the transforms take, of the segment's tokens, [tokens, heads, ...]."""
        dtype = self.options["dtype"]
        rows = {name: x[at.batch, at.token].to(dtype) for name, x in self.rows.items()}
        return {**rows, **{name: x.detach() for name, x in self.parameters.items()}}

    def transformed(self, at: _Tokens, leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """q, k, v, g, beta as they enter the recurrence, [1, tokens, HV, ...]."""
        rows = [leaves[name][None] for name in self.rows]
        return transform(*rows, A_log=leaves.get("A_log"), dt_bias=leaves.get("dt_bias"), **self.options)


class _Tokens(NamedTuple):
    """The tokens of some chunks: where they are in the call, and where in the chunks."""

    batch: torch.Tensor
    token: torch.Tensor
    row: torch.Tensor
    number: int  # of chunks
    chunk_size: int

    def chunks(self, x: torch.Tensor) -> torch.Tensor:
        """[1, tokens, HV, ...] as [chunks, HV, C, ...], zero where a chunk has no token."""
        rows = x.new_zeros(self.number * self.chunk_size, *x.shape[2:]).index_copy(0, self.row, x[0])
        return rows.unflatten(0, (self.number, self.chunk_size)).transpose(1, 2).contiguous()

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """And back, [tokens, HV, ...]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.row)


class _Chunks(NamedTuple):
    """What of a chunk needs no state, for n chunks at once."""

    E: torch.Tensor  # [n, HV, C, C, K], 1 above the diagonal
    kE: torch.Tensor  # k_j E[i, j]
    G: torch.Tensor  # [n, HV, C, K], decay from the chunk's beginning to the token
    to_end: torch.Tensor  # and from the token to the chunk's end
    decay: torch.Tensor  # [n, HV, 1, K], of the whole chunk
    P: torch.Tensor  # [n, HV, C, C]
    M: torch.Tensor
    T: torch.Tensor
    Kd: torch.Tensor  # [n, HV, C, K]
    Qd: torch.Tensor
    Kr: torch.Tensor
    W: torch.Tensor
    U0: torch.Tensor  # [n, HV, C, V]

    @staticmethod
    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> _Chunks:
        C = q.shape[-2]
        E = pair_decays(g)
        kE = k[..., None, :, :] * E
        P = (kE @ k[..., :, :, None]).squeeze(-1).tril(-1)
        M = (kE @ q[..., :, :, None]).squeeze(-1).tril()
        identity = torch.eye(C, dtype=q.dtype, device=q.device)
        T = torch.linalg.solve_triangular(identity + beta[..., None] * P, identity, upper=False, unitriangular=True)
        Tb = T * beta[..., None, :]
        G = g.cumsum(-2).exp()
        Kd = k * G
        return _Chunks(
            E=E, kE=kE, G=G, to_end=E[..., -1, :, :], decay=G[..., -1:, :], P=P, M=M, T=T, Kd=Kd, Qd=q * G,
            Kr=kE[..., -1, :, :], W=Tb @ Kd, U0=Tb @ v,
        )  # fmt: skip
