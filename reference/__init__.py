"""What is true: KDA written down twice in plain torch, sharing nothing with the kernels.

`recurrence` is the definition, token by token, the oracle. `chunked` is the algebra that the kernels implement.
"""

from .chunked import chunked
from .recurrence import recurrence

__all__ = ["chunked", "recurrence"]
