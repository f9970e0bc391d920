"""The input transforms of KDA, one function per formula, and `transform`, which applies those the flags ask for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

L2NORM_EPS = 1e-6


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension."""
    # Squares of the largest numbers overflow. Such rows are scaled first, by a power of two, which rounds nothing.
    exponent = math.frexp(torch.finfo(x.dtype).max)[1]
    large = x.detach().abs().amax(-1, keepdim=True) > 2.0 ** (exponent * 3 // 8)
    factor = torch.where(large, 2.0 ** -(exponent * 3 // 4), torch.ones_like(large, dtype=x.dtype))
    x = x * factor
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS * factor.square())


def safe_gate(
    g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float
) -> torch.Tensor:
    """Log decay lower_bound * sigmoid(exp(A_log[h]) * (g + dt_bias[h, k])), in (lower_bound, 0)."""
    x = _biased(g, dt_bias)
    if A_log is not None:
        x = _exp_times(_by_head(A_log), x)
    return lower_bound * x.sigmoid()


def softplus_gate(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    """Log decay -exp(A_log[h]) * softplus(g + dt_bias[h, k]), unbounded below."""
    x = _biased(g, dt_bias)
    # For x far below 0 softplus(x) is exp(x), to the last bit. It may underflow where exp(A_log + x) does not.
    deep = x < math.log(torch.finfo(x.dtype).eps)
    exponent = _by_head(A_log) + torch.where(deep, x, 0)
    # softplus(x) = -logsigmoid(-x), which unlike F.softplus has no threshold: it is the formula for every x.
    return _exp_times(exponent, torch.where(deep, -1, F.logsigmoid(torch.where(deep, 0, -x))))


def _exp_times(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """exp(a) * x, for an exp(a) that overflows too. Infinite only where the product is too large, with the gradient 0
    there: a sigmoid or an exponential follows, which is flat."""
    largest = math.log(torch.finfo(x.dtype).max)
    over = (a + x.abs().log()).detach() >= largest
    # Both factors are made harmless where they are not used, or 0 * inf would make their gradients NaN. Where x is 0
    # any a is allowed; beyond 1.9 * largest the product with the least x that there is overflows.
    half = (torch.where(over, 0, a).clamp(max=1.9 * largest) / 2).exp()
    return torch.where(over, x.detach() * math.inf, half * (half * torch.where(over, 0, x)))


def _by_head(A_log: torch.Tensor) -> torch.Tensor:
    return A_log.reshape(-1, 1)  # from [HV] or [1, 1, HV, 1]


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
    if cu_seqlens.is_meta:  # has no values: shapes are those of any
        return [(0 if n == 0 else tokens, tokens) for n in range(len(cu_seqlens) - 1)]
    cuts = cu_seqlens.tolist()
    if min(cuts) < 0 or max(cuts) > tokens or cuts != sorted(cuts):  # rows outside would lose a CUDA context
        raise ValueError(f"cu_seqlens is {cuts}: must be within 0 and T = {tokens}, and never decrease")
    return list(zip(cuts[:-1], cuts[1:], strict=True))
