"""KDA by definition, one token after the other. Slow and plain: everything else is measured against it."""

from __future__ import annotations

import torch

from .transforms import sequence_bounds, transform


def recurrence(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The arguments of `kda_cute.chunk_kda`; `dtype` is that of the arithmetic and of both results.

    safe_gate is a promise about g that the definition has no use for. Rows of o that no sequence covers are zero.
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
    bounds = sequence_bounds(B, T, cu_seqlens)
    if initial_state is None:
        S0 = k.new_zeros(len(bounds), HV, V, K)
    else:
        S0 = initial_state.to(dtype) if state_v_first else initial_state.to(dtype).transpose(-1, -2)

    if cu_seqlens is None:
        o, S = token_by_token(q, k, v, g, beta, S0)
    else:
        o, states = v.new_zeros(B, T, HV, V), []
        for n, (begin, end) in enumerate(bounds):
            cut = slice(begin, end)
            o_n, S_n = token_by_token(q[:, cut], k[:, cut], v[:, cut], g[:, cut], beta[:, cut], S0[n : n + 1])
            o = o.slice_scatter(o_n, 1, begin, end) if end > begin else o
            states.append(S_n)
        S = torch.cat(states) if states else S0
    if not output_final_state:
        return o, None
    return o, (S if state_v_first else S.transpose(-1, -2)).contiguous()


def token_by_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, HV, V] and the last state, from q (scaled), k, v, log decay g, beta and the state S [B, HV, V, K]."""
    a = g.exp()
    o = []
    for t in range(q.shape[1]):
        S = S * a[:, t, :, None, :]
        u = beta[:, t, :, None] * (v[:, t] - (S * k[:, t, :, None, :]).sum(-1))
        S = S + u[..., None] * k[:, t, :, None, :]
        o.append((S * q[:, t, :, None, :]).sum(-1))
    return (torch.stack(o, 1) if o else torch.zeros_like(v)), S
