"""The input transforms of KDA, one function per formula, and `transform`, which applies those the flags ask for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

L2NORM_EPS = 1e-6


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS)


def safe_gate(
    g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float
) -> torch.Tensor:
    """Log decay lower_bound * sigmoid(exp(A_log[h]) * (g + dt_bias[h, k])), in (lower_bound, 0)."""
    x = _biased(g, dt_bias)
    if A_log is not None:
        x = A_log.exp()[:, None] * x
    return lower_bound * x.sigmoid()


def softplus_gate(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    """Log decay -exp(A_log[h]) * softplus(g + dt_bias[h, k]), unbounded below."""
    # softplus(x) = -logsigmoid(-x), which unlike F.softplus has no threshold: it is the formula for every x.
    return A_log.exp()[:, None] * F.logsigmoid(-_biased(g, dt_bias))


def beta_sigmoid(beta: torch.Tensor, allow_neg_eigval: bool) -> torch.Tensor:
    """sigmoid(beta), or 2 sigmoid(beta), which lets I - beta k k^T have the eigenvalue -1."""
    return 2 * beta.sigmoid() if allow_neg_eigval else beta.sigmoid()


def _biased(g: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    return g if dt_bias is None else g + dt_bias.reshape(g.shape[-2:])


def transform(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the recurrence is made of, in `dtype`: scaled q, k, v, log decay g, beta, all with HV heads."""
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    if use_gate_in_kernel:
        A_log = None if A_log is None else A_log.to(dtype)
        dt_bias = None if dt_bias is None else dt_bias.to(dtype)
        if lower_bound is not None:
            g = safe_gate(g, A_log, dt_bias, lower_bound)
        elif A_log is not None:
            g = softplus_gate(g, A_log, dt_bias)
        else:
            raise ValueError("A_log is None: the softplus gate (use_gate_in_kernel without lower_bound) needs it")
    if use_beta_sigmoid_in_kernel:
        beta = beta_sigmoid(beta, allow_neg_eigval)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    group = v.shape[2] // q.shape[2]
    if group > 1:
        q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)
    return q, k, v, g, beta


def sequence_bounds(batch: int, tokens: int, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int]]:
    """First token and end of every sequence in the flattened [B * T] tokens. Reads cu_seqlens back to the host."""
    if cu_seqlens is None:
        return [(b * tokens, (b + 1) * tokens) for b in range(batch)]
    cuts = cu_seqlens.tolist()
    return list(zip(cuts[:-1], cuts[1:], strict=True))
