"""What serves a call: torch on any device (`reference`), or kernels. `devices.backend_of` chooses.

Each module has

    OF_TORCH               whether it is made of torch's functions: autograd and torch.func see inside, and it may wait
                           for the device
    why_not(call, sizes)   why a valid call is not served, or None
    run(call, sizes)       (o, final state, launch) of a call that has been checked, its scale a number; launch does the
                           same for calls of this kind, see `known_calls`, or is None if it cannot be used again
"""
