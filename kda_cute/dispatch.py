"""A call from its arguments to its backend: what is done for the first calls of each kind, see `known_calls`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import contract, devices, known_calls, memory, transforms
from .call import TENSORS, Call

Results = tuple[Tensor, Tensor | None]


def run(call: Call, as_operator: Callable[[Call], Results] | None = None) -> Results:
    """o and the final state of a call for tensors that hold numbers.

    as_operator: runs a call as one of torch's operators, for autograd, torch.func and torch.jit.trace. None inside of
    an operator, which those have left behind.
    """
    # The guards of known calls refuse what torch.jit.trace or torch.func sees: the dispatch keys are others.
    if as_operator is not None and torch._C._get_tracing_state() is not None:
        return as_operator(call)
    kind = known_calls.kind_of(call)
    if call.state_indices is not None and call.final_state is None and (call.output_final_state or not call.recurrent):
        raise ValueError("final_state is None: must be a pool of states with state_indices")
    named = call._asdict()
    plain, ranges = memory.plain(named)
    if plain is not None:
        call = Call(**plain)
        with torch._C.DisableTorchFunctionSubclass():
            return known_calls.run(call) or run(call, as_operator)
    q, k, v = autocast(call.q, call.k, call.v)
    sizes = contract.check_named({**named, "q": q, "k": k, "v": v})
    call = call._replace(q=q, k=k, v=v, scale=contract.check_scale(call.scale, sizes.K))
    fields = call._asdict()
    if call.recurrent:
        if not (call.token_states is call.replay is call.token_state_indices is call.num_accepted_tokens is None):
            contract.check_by_token(call, sizes)
    elif not (call.checkpoint_offsets is call.checkpoint_state is call.checkpoint_indices is None):
        contract.check_checkpoints(call, sizes)
    backend = devices.backend_of(q, call.backend)
    if (why_not := backend.why_not(call, sizes)) is not None:
        raise NotImplementedError(f'{why_not} on the GPU; backend="reference" serves it, slowly')
    if not backend.OF_TORCH:
        transforms.refuse(fields)
        if as_operator is not None and any(transforms.is_of_functorch(fields[name]) for name in TENSORS):
            kept = call.checkpoints, call.checkpoint_state
            if call.recurrent or any(x is not None for x in (call.out, call.final_state, *kept)):
                raise NotImplementedError(
                    "out, final_state, state_indices and checkpoints must be None under torch.vmap, which does not "
                    'serve fused_recurrent_kda: B is for many sequences, backend="reference" works here, slowly'
                )
            return as_operator(call)  # torch calls it for one after the other
    if transforms.wants_grad(fields):
        if call.out is not None or call.final_state is not None:
            transforms.refuse_outputs(fields)
        if call.recurrent:
            transforms.refuse_grad(fields, transforms.NO_GRADIENT)
        if call.checkpoints is not None or call.checkpoint_state is not None:
            transforms.refuse_grad(fields, "must not with checkpoints, which have no gradient; torch.no_grad() says so")
        if not backend.OF_TORCH and as_operator is not None:
            return as_operator(call)

    memory.check_written(named, ranges)
    if backend.OF_TORCH or (contract.CHECK_VALUES and not torch.cuda.is_current_stream_capturing()):
        contract.check_values(call, sizes)
    o, S, launch = backend.run(call, sizes)
    if launch is not None:
        state_shape = contract.state_shape(sizes.N, sizes.HV, sizes.K, sizes.V, call.state_v_first)
        known_calls.remember(kind, call, launch, state_shape)
    return o, S


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast fp32 queries, keys and values are taken in its dtype, as those of attention are."""
    if isinstance(q, Tensor) and (q.is_cuda or q.is_cpu) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in (q, k, v))
    return q, k, v
