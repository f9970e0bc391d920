"""What is true: KDA written down twice in plain torch, sharing nothing with the kernels.

`recurrence` is the definition, token by token, the oracle. `chunked` is the algebra that the kernels implement,
`chunked_backward` that of its gradients.
"""

from .backward import chunked_backward
from .chunked import chunked
from .recurrence import recurrence

__all__ = ["chunked", "chunked_backward", "recurrence"]
