"""Where things lie in shared memory: tiles, the tables of a stage, the linear systems. Sizes that all kernels share."""

from __future__ import annotations

C = 32  # tokens in a chunk
SUB = 16  # tokens of a block of the warps' products
QUAD = 8  # and of a block of what they make
D = 128  # channels of keys and of values at most; of 64 keys' channels the others are zero
BOX = 4096  # bytes of a TMA box: 32 tokens of 128 bytes
# Named barriers: one for each pair of `prepare`'s warps, one for each state warpgroup.
PAIR_BAR, STATE_BAR = 1, 5

# Tables of a stage, in bytes from its start.
DECAY = 0  # fp32 [128]: 2^G_C
NORM = D * 4  # fp32 [3, 32]: 1 / |k_i|, scale / |q_i|, beta_i (with neg_eigval)
TABLES = NORM + 3 * C * 4
# The linear systems on their way from `prepare` to `invert`.
SYSTEMS = 2  # places, which chunks take in turn
A_ROW = (C + 4) * 4  # fp32 [32, 32 + 4], A transposed: a row is a column of A; 4 words against bank conflicts
SQUARES = C * A_ROW  # fp32 [3, 32]: |k_i|^2, half sums of |q_i|^2
SYSTEM = SQUARES + 3 * C * 4
ANCHORS = 4 * 512  # of 64 channels, where T and M will be: see `anchors`
