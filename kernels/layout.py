"""Where things lie in shared memory: tiles, the tables of a stage, the linear systems. Sizes that all kernels share."""

from __future__ import annotations

from typing import NamedTuple

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
# The anchors of 64 channels, where T and M will be: four tables, 16 bytes for each pair of channels. See gate.anchors.
ANCHOR_TABLE = 32 * 16
ANCHORS = 4 * ANCHOR_TABLE
OFFSETS = 0, ANCHOR_TABLE  # fp32 [2, 2], by frame and channel: of frames 0 and 1, of frames 2 and 3
TO_END = 2 * ANCHOR_TABLE  # fp32 [2]
SHIFTS = 2 * ANCHOR_TABLE + 8, 3 * ANCHOR_TABLE  # bf16 [2, 2]: of frames 0 and 1, of frames 2 and 3


class Stage(NamedTuple):
    """A stage of the ring, in bytes from its start. What lies there first: k and q (later Kd and Qd), g (later Kr), T,
    M, v."""

    k_half: int  # from k's channels 0-63 to its channels 64-127; q lies behind k
    kr_half: int  # the same for g and Kr
    at_g: int
    at_t: int
    at_m: int
    at_v: int
    size: int
    sent: int  # what the other block of a cluster gets of it

    @staticmethod
    def of(g_boxes: int, v_boxes: int, queries: bool = True) -> Stage:
        """g_boxes, v_boxes: TMA boxes of g and v. Without queries there is neither q nor M."""
        k_half, kr_half = (2 if queries else 1) * BOX, g_boxes // 2 * BOX
        at_g = 2 * k_half
        at_t = at_g + 2 * kr_half
        at_m = at_t + C * C * 2
        at_v = at_m + C * C * 2
        return Stage(k_half, kr_half, at_g, at_t, at_m, at_v, at_v + v_boxes * BOX, at_v if queries else at_m)


def slot_of(nth, count: int):
    """Which of `count` places, taken in turn, is for the nth."""
    return nth % count


def phase_of(nth, count: int):
    """The parity of the phase in which that place's mbarriers complete for the nth; that of the one before is the
    other."""
    return nth // count & 1
