"""The arguments of a call, once: what torch's operators take, what known calls are told apart by and what a backend is
given all follow from the fields of `Call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Checkpoints(NamedTuple):
    """Where the states on the way of `chunk_kda` go."""

    states: Tensor  # [rows, HV, ...]: before every `every`-th chunk of each sequence
    first: Tensor  # [N], int32: the row of a sequence's first one
    every: int  # chunks of 32 tokens


class Call(NamedTuple):
    """A call of `chunk_kda`, or of `fused_recurrent_kda` if `recurrent`. What stands before `out` is what the operators
    take, in their order; `ops` says what each one means."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float | None
    initial_state: Tensor | None
    output_final_state: bool
    use_qk_l2norm_in_kernel: bool
    use_gate_in_kernel: bool
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    safe_gate: bool
    lower_bound: float | None
    state_v_first: bool
    cu_seqlens: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    state_indices: Tensor | None
    null_index: int
    has_initial_state: Tensor | None
    batch_invariant: bool  # only if not `recurrent`
    backend: str | None
    out: Tensor | None
    final_state: Tensor | None
    token_states: Tensor | None  # only if `recurrent`, as are the next three
    replay: Tensor | None
    token_state_indices: Tensor | None
    num_accepted_tokens: Tensor | None
    checkpoint_state: Tensor | None  # only if not, as are the next three
    checkpoint_offsets: Tensor | None
    checkpoint_indices: Tensor | None
    checkpoints: Checkpoints | None
    recurrent: bool


ARGUMENTS = Call._fields[: Call._fields.index("out")]
WRITTEN = ("out", "final_state", "token_states", "replay", "checkpoint_state")
STATES = ("initial_state", "final_state", "checkpoint_state")  # which may all be one pool
DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")
NUMBERS = tuple(name for name, kind in Call.__annotations__.items() if "float" in str(kind))
TENSORS = tuple(name for name, kind in Call.__annotations__.items() if "Tensor" in str(kind))

# Scalar: a float would have to be known when a call is compiled, which that of .item() is not.
_KINDS = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "float | None": "Scalar?", "bool": "bool", "int": "int",
    "str | None": "str?",
}  # fmt: skip


def _kind(name: str) -> str:
    kind = Call.__annotations__[name]
    return kind if isinstance(kind, str) else kind.__forward_arg__


SCHEMA = ", ".join(f"{_KINDS[_kind(name)]} {name}" for name in ARGUMENTS)


def _key() -> Callable[[tuple[Any, ...], int], tuple[Any, ...]]:
    """Written as one expression, like the methods of a NamedTuple: loops over the fields take twice as long, in every
    call."""
    terms = ["mode", "q.shape", "cu_seqlens is not None and cu_seqlens.shape", "final_state is initial_state"]
    terms += ["checkpoint_state is initial_state", "checkpoint_state is final_state"]
    for name in Call._fields:
        kind = _kind(name)
        if kind == "bool":
            terms.append(f"not {name}")
        elif kind not in ("Tensor", "Tensor | None", "Checkpoints | None"):
            terms.append(name)
        elif kind != "Tensor":
            terms.append(f"{name} is None")
    fields = ", ".join(Call._fields)
    made: dict[str, Any] = {}
    exec(f"def key(call, mode):\n    {fields} = call\n    return {', '.join(terms)}", made)
    return made["key"]


key = _key()  # key(call, mode): all that decides about a call except its tensors; `mode` is autograd's
