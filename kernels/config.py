"""Compile-time choices of the KDA forward kernel. Plain Python: importing this costs nothing and needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

MAX_SMEM_BYTES = 232_448  # what one thread block can have on sm_90


# Flags that cost nothing at run time, so that they cost no binary: bits of the kernel's argument `flags`.
L2NORM, BETA_SIGMOID, NEG_EIGVAL, BETA_BF16, BETA_FP16, STATE_V_FIRST = (1 << i for i in range(6))
CU_INT64, MAPS_BUILT = 1 << 9, 1 << 10
# Of state_indices; of checkpoint_offsets or num_accepted_tokens; of checkpoint_indices or token_state_indices. Whether
# index 0 is null too.
INDEX_INT64, OFFSET_INT64, KEPT_INT64, NULL_ZERO = (1 << i for i in range(12, 16))
# What states may be in memory, and the bits in which each kind of state says what it is: see state_io.in_dtype.
STATE_DTYPES = ("fp32", "bf16")
INITIAL, FINAL, CHECKPOINTS, TOKEN_STATES = 6, 7, 8, 11
# Of the fused decode kernel: fp32 weights, z sigmoid(z) for sigmoid(z), programmatic dependent launch.
CONV_FP32, NORM_FP32, SWISH, PDL = (1 << i for i in range(20, 24))


# Microseconds that a block, or the two that share a head, take for a chunk of 32 tokens, by v_split: side by side on
# an H200, before there were segments, 503 and 322 us for T = 8192 (256 chunks) and H = 64.
CHUNK_US = {1: 1.96, 2: 1.26}
LISTED = 128  # of more packed sequences the lengths are not looked at before: each is a small part of the work
ITEM_COST = 3  # in chunks: what a (sequence, head) takes besides its chunks, to load and store its state
MIN_PART = 8  # chunks that a worker has at least, before an item is cut only to be done sooner
MIN_BUILT = 128  # chunks that a sequence has at least for maps of its segments to be worth two more kernels
MAX_WARM = 16  # chunks at most by which a segment begins early
STATE_BYTES = 64 * 128 * 4  # a slice of a state: 64 value rows, fp32


def _suffix(dtype: str) -> str:
    return "" if dtype == "bf16" else f"_{dtype}"


@dataclass(frozen=True)
class KdaFwdConfig:
    """One compiled binary. All else (shapes, strides, cu_seqlens, l2norm, sigmoid, states, their dtypes) is run time.

    g_dtype: how the gate arrives in memory; it fixes the TMA descriptor and the shared-memory tile.
    gate: "safe" computes lower_bound * sigmoid(exp(A_log) * (g + dt_bias)) in the kernel, "softplus"
        -exp(A_log) * softplus(g + dt_bias), "log" takes g as log decay.
    v_split: blocks that share a head, each with a slice of V. Two are a cluster, prepare every other chunk each and
        send it to one another.
    dtype: of q, k, v and o. What the tensor cores multiply is bf16 all the same, which has the range for it.
    neg_eigval: for beta up to 2: the inverse of the chunk's linear system keeps its diagonal of ones, the factors beta
        and 1 / |k| stay in fp32 outside of it. Where updates do not forget, rounding them to bf16 shows.
    """

    g_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    gate: Literal["safe", "softplus", "log"] = "safe"
    v_split: Literal[1, 2] = 1
    neg_eigval: bool = False
    dtype: Literal["bf16", "fp16"] = "bf16"
    K: int = 128  # or 64
    V: int = 128  # or 64, with v_split = 1 only
    checkpoints: Literal["", "every", "offsets"] = ""  # states that are kept on the way: see checkpoints

    @property
    def name(self) -> str:
        rest = f"_{self.K}x{self.V}" * ((self.K, self.V) != (128, 128)) + f"_{self.checkpoints}" * bool(
            self.checkpoints
        )
        return (
            f"kda_fwd_g{self.g_dtype}_{self.gate}_v{self.v_split}"
            + "_neg" * self.neg_eigval
            + _suffix(self.dtype)
            + rest
        )

    @property
    def stages(self) -> int:
        """Chunks in flight between the loads and the state, with v_split = 2 one of them from the other block: as many
        as shared memory holds, of 36 KiB each (4 KiB less with half of V, 8 KiB more with an fp32 gate)."""
        fp32 = self.g_dtype == "fp32"
        return (4 if fp32 else 5) if self.v_split == 1 else (5 if fp32 else 6)


@dataclass(frozen=True)
class KdaBuildConfig:
    """The kernels that find the states that segments begin with where gates are too weak to forget: of what a segment
    does to a state, S -> S M + C, M and C, and the states that follow. Fields as in KdaFwdConfig."""

    g_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    gate: Literal["safe", "softplus", "log"] = "safe"
    neg_eigval: bool = False
    dtype: Literal["bf16", "fp16"] = "bf16"
    v_split: Literal[2] = 2  # two blocks prepare chunks for one another, as there
    K: int = 128  # nothing else
    V: int = 128

    @property
    def name(self) -> str:
        return f"kda_build_g{self.g_dtype}_{self.gate}" + "_neg" * self.neg_eigval + _suffix(self.dtype)

    @property
    def stages(self) -> int:
        """Of 24 KiB each, 8 more with an fp32 gate."""
        return 6 if self.g_dtype == "fp32" else 8


@dataclass(frozen=True)
class KdaDecodeConfig:
    """The kernel that goes token by token. Fields as in KdaFwdConfig."""

    g_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    gate: Literal["safe", "softplus", "log"] = "safe"
    state_v_first: bool = False
    dtype: Literal["bf16", "fp16"] = "bf16"
    K: int = 128  # or 64
    V: int = 128  # or 64
    by_token: bool = False  # whether more is kept of single tokens than their states in order: for speculative decoding

    @property
    def name(self) -> str:
        rest = f"_{self.K}x{self.V}" * ((self.K, self.V) != (128, 128)) + "_by_token" * self.by_token
        return f"kda_decode_g{self.g_dtype}_{self.gate}" + "_vk" * self.state_v_first + _suffix(self.dtype) + rest


@dataclass(frozen=True)
class KdaFusedDecodeConfig:
    """The kernel for one token a sequence with what stands around KDA in a layer. States are [.., V, K]. Fields as in
    KdaFwdConfig.

    conv: a causal convolution of width 4 and SiLU come before.
    norm: a gated RMSNorm comes after.
    """

    g_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    gate: Literal["safe", "softplus"] = "safe"
    conv: bool = True
    norm: bool = True
    dtype: Literal["bf16", "fp16"] = "bf16"
    K: Literal[128] = 128  # nothing else
    V: Literal[128] = 128

    @property
    def name(self) -> str:
        around = "_conv" * self.conv + "_norm" * self.norm
        return f"kda_decode_fused_g{self.g_dtype}_{self.gate}{around}" + _suffix(self.dtype)

    @property
    def state_v_first(self) -> bool:
        return True


def v_split(T: int, N: int, H: int, sms: int) -> Literal[1, 2]:
    """Whether two blocks share a head, for N sequences of T tokens in all (the single ones are not known on the host),
    H heads and a GPU with `sms` multiprocessors: what takes less time if all sequences are equally long.

    There is one block a multiprocessor. A head that does not fit into the time of its block goes on in another, so that
    all take equally long. If heads are few, segments of one run at the same time where gates forget, but one behind the
    other where they do not: it is for those that two blocks share a head then.
    """

    def us(split: Literal[1, 2]) -> float:
        return max(N * H * split / sms, 1) * CHUNK_US[split]

    if builds_maps(T // max(N, 1), H, N, False, 1, sms):
        return 1
    return 2 if us(2) < us(1) else 1


def part(
    total: Any,
    longest: Any,
    workers: Any,
    most: Callable[[Any, Any], Any] = max,
    choose: Callable[[Any, Any, Any], Any] = lambda condition, a, b: a if condition else b,
) -> tuple[Any, Any]:
    """(length, warm) of the parts into which the line of all work is cut, for so many workers, in chunks. `total` is
    the line's length and `longest` that of its longest item. The kernel evaluates this too, with its own integers.

    warm = 0: no part is shorter than an item, so that an item is cut once at most, and its state is there when it goes
    on. Otherwise parts are shorter, pieces of an item run at the same time, as segments, and a segment begins `warm`
    chunks early: see roles_state.state.
    """
    even = (total + workers - 1) // workers
    short = most(even, MIN_PART)
    segments = 5 * short <= 4 * longest  # what warming up and comparing costs has to be worth it
    warm = MAX_WARM - most(MAX_WARM - most(short // 32, 1), 0)
    return choose(segments, short, most(even, longest)), choose(segments, warm, 0)


def words_bytes(workers: Any, blocks: Any) -> Any:
    """Of a workspace: a word of 8 bytes for each slice of a state, three from each block to each other one."""
    return ((2 * workers + 3 * (workers * blocks) * (workers * blocks)) * 8 + 127) // 128 * 128


def workspace_bytes(T: int, N: int, H: int, packed: bool, split: Literal[1, 2], sms: int) -> int:
    """Bytes of global memory by which a head goes on in another block; 0 if none does, because all find a place and
    none is long enough to be cut even so, or because there are too many packed sequences. T: tokens of a sequence at
    most."""
    workers = sms // split
    short = 4 * (-(-T // 32) + ITEM_COST) < 5 * MIN_PART
    if (packed and N > LISTED) or (N * H <= workers and short):
        return 0
    return words_bytes(workers, split) + 2 * workers * STATE_BYTES


def maps_at(workers: Any, blocks: Any) -> Any:
    """Where in a workspace the maps of segments begin: C, where later the state behind the segment is, and M, two
    slices each, of each worker; behind them a word for each, whether its segment begins with such a state."""
    return words_bytes(workers, blocks) + 2 * workers * STATE_BYTES


def maps_bytes(workers: Any) -> Any:
    return workers * (4 * STATE_BYTES + 4)


def builds_maps(T: int, H: int, N: int, packed: bool, split: Literal[1, 2], sms: int) -> bool:
    """Whether maps of segments are worth building where gates are weak: it costs more than a pass, shared by all."""
    chunks = -(-T // 32)
    if split == 2 or (packed and N > LISTED) or chunks < MIN_BUILT:
        return False
    longest = chunks + ITEM_COST
    even = -(-(longest * H * (1 if packed else N) + packed * N * H * ITEM_COST) // sms)
    return part(even * sms, longest, sms)[1] > 0 and 7 * max(even, MIN_PART) < 2 * longest


GATES: tuple[Literal["safe", "softplus", "log"], ...] = ("safe", "softplus", "log")
Config: TypeAlias = KdaFwdConfig | KdaBuildConfig | KdaDecodeConfig | KdaFusedDecodeConfig


def all_configs(dtype: Literal["bf16", "fp16"] = "bf16") -> list[Config]:
    """Those for q, k and v in a dtype, with g in the same or in fp32. Of those for servers only what they use: g in
    the same dtype, a gate in the kernel, states with V first."""
    kinds = [(g_dtype, gate, neg) for neg in (False, True) for gate in GATES for g_dtype in (dtype, "fp32")]
    build: list[Config] = [KdaBuildConfig(g_dtype, gate, neg, dtype) for g_dtype, gate, neg in kinds]
    decode = [
        KdaDecodeConfig(g_dtype, gate, v_first, dtype)
        for g_dtype, gate, neg in kinds
        if not neg
        for v_first in (False, True)
    ]
    forward = [KdaFwdConfig(g_dtype, gate, split, neg, dtype) for g_dtype, gate, neg in kinds for split in (1, 2)]
    served = [(dtype, gate) for gate in GATES if gate != "log"]
    offsets = [KdaFwdConfig(*x, split, dtype=dtype, checkpoints="offsets") for x in served for split in (1, 2)]
    by_token = [KdaDecodeConfig(*x, True, dtype, by_token=True) for x in served]
    fused = [
        KdaFusedDecodeConfig(*x, conv, norm, dtype) for x in served for conv in (True, False) for norm in (True, False)
    ]
    return [*build, *forward, *decode, *offsets, *by_token, *fused]
