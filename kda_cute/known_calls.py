"""Calls that were right and needed no copy: the third one of its kind is not checked but launched.

A kind is told apart by `call.key`, which has all that decides about a call except its tensors, and by torch's guards,
which compare the tensors in type, device, dtype, shape, strides and requires_grad. For ten tensors they take 1 us;
reading as much from Python takes 4 us, comparing not counted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import contract, memory
from .call import STATES, TENSORS, WRITTEN, Call, key

try:
    TensorGuards: Any = torch._C._dynamo.guards.TensorGuards  # by attribute: torch 2.4 does not import it from there
except AttributeError:  # a torch that has them no more: every call is checked in full
    TensorGuards = None

KNOWN_MAX = 256  # kinds of calls that are remembered

Launch = Callable[[Any, torch.Tensor, torch.Tensor | None], bool]  # of a Call, o and the final state


class Known(NamedTuple):
    alike: Callable[..., bool]  # torch's guards
    present: Callable[[Any], tuple[torch.Tensor, ...]]  # the tensors that they compare
    written: Callable[[Any], tuple[torch.Tensor, ...]] | None  # those that the caller gave to be written
    launch: Launch
    state_shape: tuple[int, ...] | None  # of a final state to be made
    empty_like: Callable[..., torch.Tensor]


known: dict[tuple[Any, ...], Known | None] = {}  # None after one such call: one that is never repeated needs no guards

# By names of one part: each further one is a look-up in every call.
_grad, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_increment_version, _empty, _fp32 = memory.increment_version, torch.empty, torch.float32
_V, _OUT, _FINAL_STATE = (Call._fields.index(name) for name in ("v", "out", "final_state"))


def mode() -> int:
    return _grad() or -_inference()  # torch's guards take one tensor for another, across the modes


def run(call: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """o and the final state of a call whose kind is known, else None. call: the fields of a Call."""
    try:
        found = known.get(key(call, _grad() or -_inference()))
    except Exception:  # q is no tensor, scale has no hash ...: the checks say what is wrong
        return None
    if found is None or contract.CHECK_VALUES or forward_ad._current_level >= 0:
        return None
    alike, present, written, launch, state_shape, empty_like = found
    if not alike(*present(call)):
        return None
    o, S = call[_OUT], call[_FINAL_STATE]
    if o is None:
        o = empty_like(call[_V], memory_format=torch.contiguous_format)
    if written is not None:
        _increment_version(written(call))
    if state_shape is not None:
        S = _empty(state_shape, dtype=_fp32, device=call[0].device)
    return (o, S) if launch(call, o, S) else None


def remember(kind: tuple[Any, ...] | None, call: Call, launch: Launch, state_shape: tuple[int, ...]) -> None:
    """A call that was right. kind: its key as it was made, None if it has none."""
    if kind is None or call.checkpoints is not None:
        return
    if kind not in known:
        if len(known) == KNOWN_MAX:
            known.clear()
        known[kind] = None
    elif TensorGuards is not None:
        given = [name for name in TENSORS if getattr(call, name) is not None]
        # torch's guards refuse a tensor that comes twice. Of states, which may, the key says which ones are one.
        for name in STATES[1:]:
            x = getattr(call, name)
            if x is not None and any(x is getattr(call, first) for first in STATES[: STATES.index(name)]):
                given.remove(name)
        present = _pick(given)
        try:
            guards = TensorGuards(*present(call), dynamic_dims_sizes=None, dynamic_dims_strides=None)
        except TypeError:  # a torch that makes them otherwise: every call is checked in full
            return
        makes_state = call.output_final_state and call.final_state is None
        known[kind] = Known(
            guards.check, present, _pick([name for name in WRITTEN if getattr(call, name) is not None]), launch,
            state_shape if makes_state else None, memory.empty_like_for(call.v),
        )  # fmt: skip


def kind_of(call: tuple[Any, ...]) -> tuple[Any, ...] | None:
    try:
        kind = key(call, mode())
        hash(kind)
    except Exception:
        return None
    return kind


def _pick(names: list[str]) -> Any:
    places = [Call._fields.index(name) for name in names]
    if len(places) == 1:
        return lambda call: (call[places[0]],)
    return operator.itemgetter(*places) if places else None
