"""How far the kernel's result is from fp64, and how far it may be.

The oracle gets the tensors that the kernel gets, upcast: rounding of the inputs is not an error, all else is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kda_cute import chunk_kda
from kda_cute.reference import chunked
from tests.strategies import Call

# Rounding of o to bf16 alone is 1.7e-3; operands of the tensor cores in bf16 with fp32 sums make it 4.1e-3 with strong
# gates and 4.8e-3 with weak ones (test_accuracy). A wrong mask, decay or row shows as 1e-1 and more.
BOUND = 6e-3
# Rounding to bf16 is off by so much at most. A token's T and each channel of its Kr, operands of S, are rounded once.
DRAW = 2.0**-8
# From so many (token, head) pairs on, the error of all of o is a mean that chance moves by a few per cent.
ENOUGH = 64
DIRECTIONS = 8
# The exponent range of fp32 and bf16 ends at 2^-126. A product of two factors that decays cut to 2^-116 each is lost.
TINY = 1e-30
# Without a lower bound a token keeps 2^-24 at least: of what should be forgotten a rounding error remains.
FORGOTTEN = 4 * 2.0**-24


@dataclass
class Truth:
    o: torch.Tensor  # [B, T, HV, V]
    typical: torch.Tensor  # [B, T, HV], what |o| is for a q of that length and any direction
    S: torch.Tensor


def truth(call: Call) -> Truth:
    """fp64 results, and the size that o has when q is not by chance nearly orthogonal to all that S holds.

    Errors of S q scale with |S| |q| and not with |S q|. For a single token o = scale * beta * (k q) v, and k q is ten
    times smaller than usual for one q in twelve: the relative error is then ten times larger, for every bf16 kernel
    there can be. So S is read out with DIRECTIONS random q of the same length too, as more heads of the same call.
    """
    kwargs = call.oracle_kwargs
    case = call.case
    q = kwargs["q"].double()
    generator = torch.Generator(q.device).manual_seed(case.seed + 1)
    other = torch.randn(*q.shape[:2], DIRECTIONS * case.H, case.K, generator=generator, device=q.device).double()
    length = q.norm(dim=-1, keepdim=True).repeat(1, 1, DIRECTIONS, 1)
    kwargs["q"] = torch.cat((q, other / other.norm(dim=-1, keepdim=True) * length), 2)
    copies = DIRECTIONS + 1
    for name in ("k", "v", "g"):
        kwargs[name] = kwargs[name].repeat(1, 1, copies, 1)
    kwargs["beta"] = kwargs["beta"].repeat(1, 1, copies)
    if "A_log" in kwargs:
        kwargs["A_log"] = kwargs["A_log"].repeat(copies)
    if "dt_bias" in kwargs:
        kwargs["dt_bias"] = kwargs["dt_bias"].flatten().repeat(copies)
    if "initial_state" in kwargs:
        kwargs["initial_state"] = kwargs["initial_state"].repeat(1, copies, 1, 1)
    o, S = chunked(**kwargs)
    assert S is not None
    typical = o[:, :, case.HV :].square().sum(-1).unflatten(2, (DIRECTIONS, case.HV)).mean(2).sqrt()
    for n in call.null.nonzero().flatten().tolist():
        at = (n, slice(None)) if case.cu_seqlens is None else (0, slice(case.cuts[n], case.cuts[n + 1]))
        o[at], typical[at] = 0, 0
    return Truth(o[:, :, : case.HV], typical, S[:, : case.HV])


def give_memory_back(keep: int = 1 << 30) -> None:
    """What torch's allocator holds for later, if it is more than `keep` bytes: other processes may want it."""
    if torch.cuda.memory_reserved() > keep:
        torch.cuda.empty_cache()


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """||x - y||_F / ||y||_F."""
    return ((x.double() - y).norm() / y.double().norm()).item()


def check_o(call: Call, o: torch.Tensor, expected: Truth, at_most: float = BOUND) -> None:
    """Per sequence and head, and all together. NaN compares as too far."""
    case = call.case
    covered = case.B * case.T if case.cu_seqlens is None else case.cuts[-1]
    if not covered:
        return
    lengths = torch.tensor(case.lengths)
    sequence = torch.repeat_interleave(torch.arange(case.N), lengths).to(o.device)

    def per_pair(squares: torch.Tensor) -> torch.Tensor:
        rows = squares.flatten(0, 1)[:covered]
        return rows.new_zeros(case.N, case.HV).index_add(0, sequence, rows).cpu()

    error2 = per_pair((o.double() - expected.o).square().sum(-1))
    size2 = per_pair(expected.o.square().sum(-1))
    typical2 = per_pair(expected.typical.square())
    # The error of a token is one draw or a few (of the rounding of k q): 3 times the usual for one token is chance, and
    # 1 + 2 / sqrt(n) is five standard deviations of the mean over n.
    bound = at_most * (1 + 2 / lengths.clamp(min=1).double().sqrt())[:, None]
    allowed = bound * torch.maximum(size2, typical2).sqrt() + _nothing(call)
    worst = (error2.sqrt() / allowed).nan_to_num(torch.inf)
    assert (error2.sqrt() <= allowed).all(), (
        f"o: sequence, head {divmod(int(worst.argmax()), case.HV)} is {worst.max():.2f} times as far off as allowed"
    )
    if covered * case.HV >= ENOUGH:
        error, size = error2.sum().sqrt().item(), size2.sum().sqrt().item()
        assert error <= at_most * size + _nothing(call), f"o: relative error {error / size:.2e} of at most {at_most}"


def state_bound(S: torch.Tensor, v_first: bool, at_most: float = BOUND, draw: float = DRAW) -> torch.Tensor:
    """How far states [..., V, K] or [..., K, V] may be off.

    The rounding errors of Kr are one draw a channel, averaged over many. Under strong gates a state may be what one
    token left in one channel: then that channel's error and that token's, of T, are the error of it all. n: so many
    channels of equal size would be spread as those of S are.
    """
    channels = S.double().square().sum(-2 if v_first else -1)
    size2 = channels.sum(-1)
    n = (size2.square() / channels.square().sum(-1)).nan_to_num(1.0)
    return ((at_most**2 + (2 * draw) ** 2 / n) * size2).sqrt()


def check_state(call: Call, S: torch.Tensor, expected: Truth, at_most: float = BOUND, draw: float = DRAW) -> None:
    """Per sequence and head. A sequence of no tokens passes its state on to the bit."""
    case = call.case
    if not case.N:
        return
    error = (S.double() - expected.S).flatten(2).norm(dim=-1).cpu()
    allowed = state_bound(expected.S, case.state_v_first, at_most, draw).cpu() + _nothing(call)
    worst = (error / allowed).nan_to_num(torch.inf)
    assert (error <= allowed).all(), (
        f"final_state: sequence, head {divmod(int(worst.argmax()), case.HV)} is {worst.max():.2f} times as far off "
        f"as allowed"
    )
    empty = torch.tensor(case.lengths) == 0
    if empty.any():
        empty = empty.to(S.device)
        assert torch.equal(S[empty], expected.S[empty].to(S.dtype)), "final_state of an empty sequence changed"


def check_offsets(call: Call, before: torch.Tensor) -> None:
    """Per checkpoint and head: what is kept is right, and the rest of checkpoint_state is what it was before."""
    states = call.tensors["checkpoint_state"]
    want = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in call.kwargs.items()}
    want["initial_state"] = call.oracle_kwargs.get("initial_state")
    for name in ("state_indices", "has_initial_state"):
        want.pop(name, None)
    want["checkpoint_state"] = before.clone()
    if call.null.any():
        want["checkpoint_offsets"][call.null] = 0
    chunk_kda(**want, backend="reference")
    kept = want["checkpoint_state"]
    error = (states.double() - kept.double()).flatten(-2).norm(dim=-1)
    rounding = 2.0**-9 * kept.double().flatten(-2).norm(dim=-1)
    allowed = state_bound(kept, call.case.state_v_first) + rounding + _nothing(call)
    assert (error <= allowed).all(), f"checkpoints: {(error / allowed).max():.2f} times as far off as allowed"
    untouched = (kept == before).flatten(-2).all(-1)
    assert torch.equal(states[untouched], before[untouched]), "a checkpoint where none is asked for"


def check_checkpoints(call: Call, states: torch.Tensor) -> None:
    """Per checkpoint and head."""
    case, kwargs = call.case, call.kwargs
    interval = case.checkpoint_interval
    assert interval is not None
    want = chunk_kda(**kwargs, checkpoint_interval=interval, backend="reference")[2]
    assert states.shape == want.shape and states.dtype == torch.float32
    count = states.shape[1] if case.cu_seqlens is None else sum(-(-n // interval) for n in case.lengths)
    error = (states - want)[:, :count].flatten(3).norm(dim=-1)
    allowed = state_bound(want[:, :count], case.state_v_first) + _nothing(call)
    assert (error <= allowed).all(), f"checkpoints: {(error / allowed).max():.2f} times as far off as allowed"


def _nothing(call: Call) -> float:
    """What may be left where nothing should be, of the largest magnitude that goes into o and S."""
    names = [name for name in ("v", "initial_state") if name in call.inputs and call.tensors[name].numel()]
    largest = 1 + max((call.tensors[name].nan_to_num(0.0).abs().max().item() for name in names), default=0.0)
    return (TINY if call.case.gate == "safe" else FORGOTTEN) * largest
