"""KDA forward for Hopper: one fused, persistent, warp-specialised kernel.

A thread block takes a (sequence, head) at a time, or a piece of one, and walks it in chunks of C = 32 tokens through a
ring of stages in shared memory. Or two blocks do, a cluster, with half of V each: then each prepares every other chunk,
for both. docs/kernel/overview.md says why it is as it is.

    load      one warp            finds the work and lists it for all; TMA: q, k, v, g of a chunk -> stage
    gates     two warps           g -> gate, fp16, in place; anchors of each channel (in a cluster `prepare` does it)
    prepare   pairs of warps,     q, k, gate -> Qd, Kd, Kr in place; M; A -> `invert`
              a chunk each
    invert    one warp            T = (I + A)^-1
    state     a warpgroup for     S in registers: WGMMA; o -> TMA store
              each 64 rows of V
    send,     one warp each,      a prepared chunk -> the other block's stage; v of the other's chunks
    fetch     in a cluster

With S [V, K] the state before the chunk and G_i the log2 decay summed over tokens 0..i of it, the chunk is

    Kd_i = k_i 2^G_i     Qd_i = q_i 2^G_i     Kr_j = k_j 2^(G_C - G_j)     Ki_j = k_j 2^-G_j
    A = strict_lower(diag(beta) Kd Ki^T)      M = lower(Qd Ki^T)
    U = (I + A)^-1 diag(beta) (V - Kd S^T)    O = Qd S^T + M U             S <- S diag(2^G_C) + U^T Kr

2^-G_j would overflow, so exponents are taken relative to an integer anchor p in the middle of each 8 tokens, and moving
from one anchor to another is an exact multiplication by a power of two, or makes what would be below 2^-30 zero. A gate
without a lower bound counts as 2^-24 at most a token, which is 0 to fp32: so no exponent is above 97.

The norms of q and k never touch the tiles: 1 / |k_i| multiplies rows and columns of A, the product Kd S^T and U,
scale / |q_i| multiplies o_i.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync
from cutlass.memory import SmemAllocator

from . import barriers, chunk, gate, ptx, roles_cluster, roles_load, roles_prepare, roles_state, scalars, schedule
from .arguments import Kept, Numbers, by_token, fake_tensors, tiled_mma, tma, zeros
from .barriers import Barriers
from .config import KdaFwdConfig
from .layout import BOX, SYSTEM, SYSTEMS, TABLES, C, D, Stage
from .pipeline import Pipeline, Registers, Shared, g_boxes, v_boxes
from .schedule import PLAN, Listed


def pipeline_of(config: KdaFwdConfig) -> Pipeline:
    prepare_wgs, state_wgs = 2 if config.v_split == 2 else 1, v_boxes(config)
    gate_warps = 0 if config.v_split == 2 else 2
    threads = 128 * (1 + prepare_wgs + state_wgs)
    # Those that ptxas spills least with; the sum over warpgroups is at most 512, what an SM has.
    registers = Registers(64, 128, 160) if config.v_split == 1 else Registers(72, 136, 168)
    return Pipeline(
        config,
        Stage.of(g_boxes(config), v_boxes(config)),
        threads=threads,
        prepare_wgs=prepare_wgs,
        # With fewer stages than pairs a pair would come to a stage two phases early, which parity cannot tell apart.
        pairs=min(2 * prepare_wgs, config.stages - (config.v_split - 1)),
        gate_warps=gate_warps,
        state_wgs=state_wgs,
        queries=True,
        # Four times the same code where `prepare` has it is more than the instruction cache has room for.
        gates_rolled=gate_warps == 0,
        whole=False,
        registers=registers if threads == 512 else None,  # with fewer warps all have enough
        lists=True,
    )


class KdaFwdSm90:
    def __init__(self, config: KdaFwdConfig):
        self.config, self.pipe = config, pipeline_of(config)

    # ------------------------------------------------------------------ host side

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # [B, T, H, K]
        mK: cute.Tensor,
        mV: cute.Tensor,  # [B, T, HV, V]; from here on heads are those of values, and H is HV
        mG: cute.Tensor,
        mO: cute.Tensor,
        *rest: Any,  # Numbers, and Kept with checkpoints, one by one, and the stream
    ):
        count, stream = len(Numbers._fields), rest[-1]
        numbers, kept = Numbers(*rest[:count]), Kept(*rest[count:-1]) if self.config.checkpoints else None
        load, store, g_cols = (
            cpasync.CopyBulkTensorTileG2SOp(),
            cpasync.CopyBulkTensorTileS2GOp(),
            D // self.pipe.g_boxes,
        )
        mQ, mK, mV, mG, mO = by_token((mQ, mK, mV, mG, mO))
        q_tma, k_tma, v_tma = [tma(load, m, BFloat16, 64) for m in (mQ, mK, mV)]
        g_tma, o_tma = tma(load, mG, self.pipe.g_type, g_cols), tma(store, mO, BFloat16, 64)
        blocks = numbers.workers
        if numbers.workspace == 0:
            blocks = cutlass.min(numbers.items, blocks)
        self.kernel(
            q_tma[0], q_tma[1], k_tma[0], k_tma[1], v_tma[0], v_tma[1], g_tma[0], g_tma[1], o_tma[0], o_tma[1],
            mQ, mK, mV, mG, mO,
            numbers, kept,
            tiled_mma(2 * C, OperandMajorMode.K), tiled_mma(C, OperandMajorMode.K), tiled_mma(D, OperandMajorMode.MN),
        ).launch(
            grid=[blocks * self.pipe.blocks, 1, 1], block=[self.pipe.threads, 1, 1], cluster=[self.pipe.blocks, 1, 1],
            stream=stream, min_blocks_per_mp=1,
        )  # fmt: skip

    # ------------------------------------------------------------------ device side

    @cute.kernel
    def kernel(
        self,
        q_tma: cute.CopyAtom, tQ: cute.Tensor,
        k_tma: cute.CopyAtom, tK: cute.Tensor,
        v_tma: cute.CopyAtom, tV: cute.Tensor,
        g_tma: cute.CopyAtom, tG: cute.Tensor,
        o_tma: cute.CopyAtom, tO: cute.Tensor,
        mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, mG: cute.Tensor, mO: cute.Tensor,
        numbers: Numbers, kept: Kept | None, mma_ks: cute.TiledMma, mma_tm: cute.TiledMma, mma_s: cute.TiledMma,
    ):  # fmt: skip
        pipe = self.pipe
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()

        def table(size, align=128):
            return smem.allocate_tensor(Uint8, cute.make_layout(size), byte_alignment=align).iterator

        ring = table(pipe.tiles.size * pipe.stages, 1024)
        out = table(2 * pipe.state_wgs * BOX, 1024)  # o on its way out: [state warpgroup, buffer]
        sTables = table(TABLES * pipe.stages).toint()
        sSystems = table(SYSTEM * SYSTEMS).toint()
        sPlan = table(PLAN).toint()
        sBias = table(256 * (pipe.gate_warps or 2 * pipe.pairs), 16).toint()
        triangle = chunk.lower_triangle(table(48, 16).toint(), warp, cute.arch.lane_idx())
        bars = smem.allocate_tensor(Int64, cute.make_layout(barriers.total(pipe)), byte_alignment=8).iterator
        bars = Barriers.at(pipe, bars)
        shared = Shared(ring, sTables, sSystems, sBias, triangle, bars)

        if warp == 0:
            with cute.arch.elect_one():
                bars.init(pipe)
            cute.arch.mbarrier_init_fence()
            for atom in (q_tma, k_tma, v_tma, g_tma, o_tma):
                cpasync.prefetch_descriptor(atom)

        if const_expr(pipe.k_boxes == 1):
            for s in cutlass.range_constexpr(pipe.stages):
                for offset, size in (
                    (pipe.tiles.k_half, 2 * BOX),
                    (pipe.tiles.at_g + pipe.tiles.kr_half, pipe.tiles.kr_half),
                ):
                    at = ring.toint() + s * pipe.tiles.size + offset + cute.arch.thread_idx()[0] * 16
                    for i in cutlass.range_constexpr(size // 16 // pipe.threads + 1):
                        if cute.arch.thread_idx()[0] + i * pipe.threads < size // 16:
                            ptx.sts_16(at + i * pipe.threads * 16, Uint32(0))

        H = cute.size(mO.shape[2])
        T = cute.size(mO.shape[0])
        items, cu_seqlens, flags = numbers.items, numbers.cu_seqlens, numbers.flags
        schedule.share(sPlan, items, H, T, cu_seqlens, numbers.workspace, flags, *pipe.worker())
        work = Listed(bool(self.config.checkpoints), sPlan, bars.listed, bars.taken)
        gate_inputs = gate.Inputs.of(numbers)
        cute.arch.sync_threads()
        if const_expr(pipe.blocks == 2):  # the barriers are there
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

        if warp < 4:
            if const_expr(pipe.registers is not None):
                cute.arch.setmaxregister_decrease(pipe.registers.load)
            if warp == 0:
                roles_load.load(pipe, ((q_tma, tQ), (k_tma, tK), (v_tma, tV), (g_tma, tG)), shared, work, numbers, H, T)
                if cu_seqlens != 0:
                    schedule.clear_rest(self.clear, (mO, H), cu_seqlens, items // H, T, flags, *ptx.block())
            elif warp == 1:
                beta = scalars.Beta(numbers.beta, numbers.beta_batch, numbers.beta_row)
                roles_prepare.invert(pipe, shared, beta, numbers.scale, flags, work)
            else:
                if const_expr(pipe.blocks == 1):
                    roles_prepare.gates(pipe, warp - 2, shared, gate_inputs, work)
                elif warp == 2:
                    roles_cluster.send(pipe, shared, work)
                else:
                    roles_cluster.fetch(pipe, v_tma, tV, shared, work)
        elif warp < 4 + 4 * pipe.prepare_wgs:
            if const_expr(pipe.registers is not None):
                cute.arch.setmaxregister_increase(pipe.registers.prepare)
            if warp < 4 + 2 * pipe.pairs:
                roles_prepare.prepare(pipe, warp - 4, shared, gate_inputs, work)
        else:
            if const_expr(pipe.registers is not None):
                cute.arch.setmaxregister_increase(pipe.registers.state)
            roles_state.state(
                pipe, (warp - 4 - 4 * pipe.prepare_wgs) // 4, shared, out, (mma_ks, mma_tm, mma_s), o_tma, tO, mO,
                numbers, kept, work, (mQ, mK, mG, mV),
            )  # fmt: skip
        if const_expr(pipe.blocks == 2):  # the other block may have something to send or to release here still
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def clear(self, target, t: Int32):
        """o of a token becomes zero, in all heads: 16 bytes a lane."""
        mO, H = target
        lanes, lane = self.config.V // 8, cute.arch.lane_idx()
        for h in cutlass.range(lane // lanes, H, 32 // lanes, unroll=1):
            row = mO[t, None, h, 0]
            ptx.stg_u32x4((row.iterator + lane % lanes * 8).toint(), (Uint32(0),) * 4)


def compile(config: KdaFwdConfig, arch: str = "sm_90a"):  # noqa: A001
    """Compiles a configuration for all shapes; needs no GPU. The result takes torch tensors, on torch's stream."""
    kernel = KdaFwdSm90(config)
    return cute.compile(
        kernel, *fake_tensors(config, "qkvgo"), *zeros(Numbers), *(zeros(Kept) if config.checkpoints else ()),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
