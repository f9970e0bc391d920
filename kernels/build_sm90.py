"""The states that segments begin with, where nothing is forgotten: maps of segments, then what they give.

What the chunks of a segment do to a state is S -> S M + C. M is what they make of the identity without values, C what
they make of no state. `build` finds both, in one pass over the chunks: a cluster of two blocks, each with 64 rows of M
and 64 of C, which prepare every other chunk for both, as in the forward kernel with two blocks for a head. `chain` then
goes from segment to segment, S_i = S_(i-1) M_(i-1) + C_(i-1), in fp32. A segment whose gates forget what came before
guesses (see roles_state): for those nothing is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import SmemLayoutAtomKind
from cutlass.memory import SmemAllocator

from . import (
    barriers,
    chain,
    chunk,
    fragments,
    gate,
    pipeline,
    ptx,
    roles_cluster,
    roles_load,
    roles_prepare,
    scalars,
    schedule,
    segments,
    state_io,
    update,
)
from .arguments import by_token, fake_tensors, tiled_mma, tma, zeros
from .barriers import Barriers
from .config import INDEX_INT64, KdaBuildConfig
from .layout import DECAY, NORM, SYSTEM, SYSTEMS, TABLES, C, D, Stage
from .pipeline import Pipeline, Registers, Shared, g_boxes, v_boxes
from .schedule import AT_BEGIN, AT_END, AT_LENGTH, AT_WARM, PLAN, SPAN, Fate


def pipeline_of(config: KdaBuildConfig) -> Pipeline:
    tiles = Stage.of(g_boxes(config), v_boxes(config), queries=False)
    return Pipeline(
        config, tiles, threads=640, prepare_wgs=1, pairs=2, gate_warps=2, state_wgs=2, queries=False, gates_rolled=True,
        whole=True,
        # to share out are the 96 a lane that 640 threads get at their launch
        registers=Registers(load=40, gates=64, prepare=88, state=144),
        lists=False,
    )  # fmt: skip


class Segment(NamedTuple):
    """A piece whose maps are needed."""

    start: Int32  # first token
    tokens: Int32
    h: Int32
    b: Int32
    worker: Int32  # whose it is


@dataclass(frozen=True)
class Chosen:
    """The pieces that `choose` lists, the same in both blocks: up to two, in shared memory."""

    at: Int32

    def count(self) -> Int32:
        return ptx.uniform(ptx.lds_i32(self.at + 128))

    @cute.jit
    def piece(self, nth: Int32) -> Segment:
        at = self.at + nth * 32
        numbers = (*ptx.lds_i32x4(at), *ptx.lds_i32x4(at + 16))
        return Segment(*(ptx.uniform(x) for x in numbers[:5]))


class KdaBuildSm90:
    def __init__(self, config: KdaBuildConfig):
        self.config, self.pipe = config, pipeline_of(config)

    @cute.jit
    def __call__(
        self,
        mK: cute.Tensor,  # [B, T, H, K]
        mV: cute.Tensor,  # [B, T, HV, V]
        mG: cute.Tensor,
        beta: Int64,  # as in arguments.Numbers
        beta_batch: Int64,
        beta_row: Int32,
        A_log: Int64,
        dt_bias: Int64,
        initial_state: Int64,
        initial_pitch: Int64,
        state_indices: Int64,
        P: Int32,
        has_initial_state: Int64,
        cu_seqlens: Int64,
        workspace: Int64,
        items: Int32,
        workers: Int32,
        lower_bound: Float32,
        flags: Int32,
        stream: cuda.CUstream,
    ):
        load, g_cols = cpasync.CopyBulkTensorTileG2SOp(), D // self.pipe.g_boxes
        mK, mV, mG = by_token((mK, mV, mG))
        k_tma, v_tma = [tma(load, m, BFloat16, 64) for m in (mK, mV)]
        g_tma = tma(load, mG, self.pipe.g_type, g_cols)
        self.build(
            k_tma[0], k_tma[1], v_tma[0], v_tma[1], g_tma[0], g_tma[1], mG, scalars.Beta(beta, beta_batch, beta_row),
            A_log, dt_bias, cu_seqlens, workspace, items, workers, lower_bound, flags,
            tiled_mma(C, OperandMajorMode.K), tiled_mma(D, OperandMajorMode.MN),
        ).launch(
            grid=[workers // 2 * 2, 1, 1], block=[self.pipe.threads, 1, 1], cluster=[2, 1, 1], stream=stream,
            min_blocks_per_mp=1,
        )  # fmt: skip
        self.chain(
            initial_state, initial_pitch, state_indices, P, has_initial_state, cu_seqlens, workspace, items,
            cute.size(mG.shape[2]), cute.size(mG.shape[0]), workers, flags,
        ).launch(grid=[workers, D // chain.ROWS, 1], block=[256, 1, 1], stream=stream)  # fmt: skip

    # ------------------------------------------------------------------ the maps

    @cute.kernel
    def build(
        self,
        k_tma: cute.CopyAtom, mK: cute.Tensor,
        v_tma: cute.CopyAtom, mV: cute.Tensor,
        g_tma: cute.CopyAtom, mG: cute.Tensor,
        g: cute.Tensor,
        beta: scalars.Beta, A_log: Int64, dt_bias: Int64, cu_seqlens: Int64, workspace: Int64, items: Int32,
        workers: Int32,
        lower_bound: Float32, flags: Int32, mma_k: cute.TiledMma, mma_s: cute.TiledMma,
    ):  # fmt: skip
        pipe = self.pipe
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()

        def table(size, align=128):
            return smem.allocate_tensor(Uint8, cute.make_layout(size), byte_alignment=align).iterator

        ring = table(pipe.tiles.size * pipe.stages, 1024)
        sTables = table(TABLES * pipe.stages).toint()
        sSystems = table(SYSTEM * SYSTEMS).toint()
        sPlan = table(2 * PLAN).toint()
        sList = table(6 * 32).toint()
        sBias = table(256 * 2 * pipe.pairs).toint()
        triangle = chunk.lower_triangle(table(48, 16).toint(), warp, cute.arch.lane_idx())
        bars = smem.allocate_tensor(Int64, cute.make_layout(barriers.total(pipe)), byte_alignment=8).iterator
        bars = Barriers.at(pipe, bars)
        shared = Shared(ring, sTables, sSystems, sBias, triangle, bars)
        H, T = cute.size(g.shape[2]), cute.size(g.shape[0])
        first = cute.arch.block_idx()[0] // 2 * 2  # of this cluster's two workers
        for i in cutlass.range_constexpr(2):
            schedule.share(sPlan + i * PLAN, items, H, T, cu_seqlens, workspace, flags, first + i, workers)
        cute.arch.sync_threads()
        gate_inputs = gate.Inputs(A_log, dt_bias, lower_bound, flags)
        self.choose(g, sPlan, sList, first, items, H, T, gate_inputs, cu_seqlens, workspace, workers)
        work = Chosen(sList)
        if work.count() > 0:  # the same in both blocks
            if warp == 0:
                with cute.arch.elect_one():
                    bars.init(pipe)
                cute.arch.mbarrier_init_fence()
                for atom in (k_tma, v_tma, g_tma):
                    cpasync.prefetch_descriptor(atom)
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

            if warp < 4:
                cute.arch.setmaxregister_decrease(pipe.registers.load)
                if warp == 0:
                    roles_load.load_all(pipe, (None, (k_tma, mK), (v_tma, mV), (g_tma, mG)), shared, work)
                elif warp == 1:
                    roles_cluster.send(pipe, shared, work)
                elif warp == 2:
                    roles_cluster.fetch(pipe, v_tma, mV, shared, work)
            elif warp < 8:
                cute.arch.setmaxregister_decrease(pipe.registers.gates)
                if warp < 6:
                    self.gates(warp - 4, shared, gate_inputs, work)
                elif warp == 6:
                    roles_prepare.invert(pipe, shared, beta, Float32(1.0), flags, work)
            elif warp < 12:
                cute.arch.setmaxregister_decrease(pipe.registers.prepare)
                roles_prepare.prepare(pipe, warp - 8, shared, gate_inputs, work)
            else:
                cute.arch.setmaxregister_increase(pipe.registers.state)
                self.maps((warp - 12) // 4, shared, mma_k, mma_s, workspace, workers, work)
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def choose(
        self, g: cute.Tensor, sPlan: Int32, sList: Int32, first: Int32, items: Int32, H: Int32, T: Int32,
        inputs: gate.Inputs, cu_seqlens: Int64, workspace: Int64, workers: Int32,
    ):  # fmt: skip
        """Lists the pieces whose maps are needed, of the two workers of this cluster: those before a segment that
        cannot guess, or before one that can but has such a one behind it, which begins with what it comes to. A
        warpgroup looks at the gates before one such border."""
        thread = cute.arch.thread_idx()[0]
        wg, channel = thread // 128, thread % 128
        plan, worker, nth = sPlan + wg // 2 % 2 * PLAN, first + wg // 2, wg % 2
        weak = Int32(0)
        if (wg < 4) & (ptx.lds_i32(plan + AT_BEGIN) < ptx.lds_i32(plan + AT_END)):
            piece = schedule.find_piece(
                ptx.lds_i32(plan + AT_END),
                plan,
                items,
                H,
                T,
                cu_seqlens,
                workspace,
                inputs.flags,
                Int32(1),
                worker,
                workers,
            )
            start, tokens, h, b = piece.start, piece.tokens, piece.h, piece.b
            if (piece.fate & Fate.COMPARED) != 0:
                window = cutlass.min(ptx.lds_i32(plan + AT_WARM) * C, tokens)
                edge = start + tokens + nth * (ptx.lds_i32(plan + AT_LENGTH) * C)
                if worker + 1 + nth <= piece.span // SPAN:
                    slope, shift = gate.slope_of_head(self.pipe.form, inputs, h)
                    bias, total = Float32(0.0), Float32(0.0)
                    if inputs.dt_bias != 0:
                        bias = fragments.global_f32(inputs.dt_bias, Int64(h * D + channel))
                    bias = gate.bias(self.pipe.form, slope, shift, bias)
                    at_once = C // (2 if self.config.g_dtype == "fp32" else 1)  # often this is all there is to do
                    for t in cutlass.range(edge - window, edge, unroll=at_once):
                        total += gate.factor(self.pipe.form, Float32(g[t, channel, h, b]), slope, bias)
                    total = total * gate.log2_of_factor(self.pipe.form, inputs)
                    weak = ptx.uniform(Int32(1) - Int32(total < math.log2(segments.FORGOTTEN)))
                if (channel == 0) & (nth == 0):
                    at = sList + 32 * (2 + wg // 2)
                    ptx.sts_i32x4(at, (start, tokens, h, b))
                    ptx.sts_i32x4(at + 16, (worker, weak, weak, weak))
        if (wg < 4) & (channel % 32 == 0):
            ptx.sts_i32(sList + 128 + thread // 32 * 4, weak)
        cute.arch.sync_threads()
        if thread == 0:
            count = Int32(0)
            for i in cutlass.range_constexpr(2):
                own, then = chain.any_of(sList + 128 + 32 * i), chain.any_of(sList + 144 + 32 * i)
                if (first + i + 1 < workers) & (self.pipe.rank() == 0):
                    ptx.stg_i32(segments.map_word(workspace, workers, first + i + 1), own)
                if (own | then) != 0:
                    for j in cutlass.range_constexpr(2):
                        numbers = ptx.lds_i32x4(sList + 32 * (2 + i) + 16 * j)
                        ptx.sts_i32x4(sList + 32 * count + 16 * j, numbers)
                    count += 1
            ptx.sts_i32(sList + 128, count)
        cute.arch.sync_threads()

    @cute.jit
    def gates(self, half: Int32, shared: Shared, inputs: gate.Inputs, work: Chosen):
        """As roles_prepare.gates, of the block's own chunks, which are all whole. Not the same function: there the
        stage's address is made before the wait, which gives other machine code here."""
        pipe, ring, sTables, bars = self.pipe, shared.ring.toint(), shared.tables, shared.bars
        lane, bias_at, n = cute.arch.lane_idx(), shared.bias + half * 256, Int32(0)
        stage, phase = Int32(0), Int32(0)
        for nth in cutlass.range(work.count(), unroll=1):
            segment = work.piece(nth)
            tokens, h = segment.tokens, segment.h
            slope, end = gate.parameters(pipe.form, inputs, h, half, bias_at, lane), n + tokens // C
            for _ in cutlass.range(pipeline.first_own(n, pipe.rank(), 2), end, 2, unroll=1):
                barriers.wait(bars.raw_full + stage, phase, lane)
                at = ring + stage * pipe.tiles.size
                gate.of_chunk(pipe.form, slope, bias_at, half, at, sTables + stage * TABLES, inputs, Int32(C), lane)
                cute.arch.mbarrier_arrive(bars.gated + stage)
                stage, phase = pipeline.next_stage(pipe, stage, phase)
            n = end

    @cute.jit
    def maps(
        self, wg: Int32, shared: Shared, mma_k: cute.TiledMma, mma_s: cute.TiledMma, workspace: Int64, workers: Int32,
        work: Chosen,
    ):  # fmt: skip
        """A warpgroup for 64 rows of C, one for 64 of M: the recurrence of `state`, without o; for M without v."""
        pipe, ring, sTables, bars = self.pipe, shared.ring, shared.tables, shared.bars
        thread = cute.arch.thread_idx()[0] % 128
        warp, lane = thread // 32, cute.arch.lane_idx()
        col = lane % 4 * 2

        kind = SmemLayoutAtomKind
        bK = fragments.operand_b(mma_k, thread, pipeline.staged(pipe, ring, BFloat16, kind.K_SW128, (C, D), (0, 1)))
        sKr = pipeline.staged(pipe, ring + pipe.tiles.at_g, BFloat16, kind.MN_SW128, (D, pipe.g_boxes // 2 * C), (1, 0))
        bKr = fragments.operand_b(mma_s, thread, cute.local_tile(sKr, (D, C, pipe.stages), (0, 0, 0)))
        bT = fragments.operand_b(
            mma_k, thread, pipeline.staged(pipe, ring + pipe.tiles.at_t, BFloat16, kind.K_SW64, (C, C), (0, 1))
        )
        acc_s, acc_r, acc_u = (
            fragments.accumulators(mma_s, thread, D),
            fragments.accumulators(mma_k, thread, C),
            fragments.accumulators(mma_k, thread, C),
        )
        fS, fU = fragments.operand_a(mma_k, thread, D), fragments.operand_a(mma_k, thread, C)
        t_row = (lane % 8 + lane // 16 * 8) * 128
        t_col = ((2 * warp + lane // 8 % 2) ^ (lane % 8)) * 16
        has_v = Uint32(0) - Uint32(wg == 0)  # all bits or none
        n, rank = Int32(0), pipe.rank()
        for nth in cutlass.range(work.count(), unroll=1):
            segment = work.piece(nth)
            row, channel = rank * 64 + warp * 16 + lane // 4, col
            for i in cutlass.range_constexpr(64):
                one = (wg == 1) & (row + i // 2 % 2 * 8 == channel + i // 4 * 8 + i % 2)
                acc_s[i] = Float32(Int32(one))
            for _ in cutlass.range(segment.tokens // C, unroll=1):
                stage, phase, is_own, prepared, inverted = pipeline.made(pipe, bars, n)
                cute.arch.mbarrier_wait(prepared, phase)
                update.begin_product(mma_k, acc_r, acc_s, fS, bK[None, None, None, stage])
                norm_at = sTables + stage * TABLES + NORM + col * 4
                decay_at = sTables + stage * TABLES + DECAY + col * 4
                cute.arch.mbarrier_wait(inverted, phase)
                warpgroup.wait_group(0)
                v_at = ring.toint() + pipe.tiles.at_v + stage * pipe.tiles.size + t_row + t_col
                fragments.to_operand(update.residual(pipe, acc_r, v_at, norm_at, has_v), fU)
                update.updates(pipe, mma_k, acc_u, fU, bT[None, None, None, stage], acc_s, norm_at, decay_at)
                warpgroup.fence()
                fragments.gemm(mma_s, acc_s, fU, bKr[None, None, None, stage], False)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                pipeline.leave(pipe, bars, n, stage, is_own, lane)
                n += 1
            at = segments.map_at(workspace, workers, segment.worker, wg * 2 + rank) + Int64(thread * 16)
            for i in cutlass.range_constexpr(16):
                ptx.stg_f32x4(at + i * 2048, tuple(acc_s[4 * i + j] for j in range(4)))

    # ------------------------------------------------------------------ the states

    @cute.kernel
    def chain(
        self, initial_state: Int64, initial_pitch: Int64, state_indices: Int64, P: Int32, has_initial_state: Int64,
        cu_seqlens: Int64, workspace: Int64, items: Int32, H: Int32, T: Int32, workers: Int32, flags: Int32,
    ):  # fmt: skip
        """A block for ROWS rows of the states of an item, segment by segment, if it is the worker that has the item's
        first piece. The state that a segment begins with takes the place of the C before it."""
        smem = SmemAllocator()
        sPlan = smem.allocate_tensor(Uint8, cute.make_layout(PLAN), byte_alignment=128).iterator.toint()
        sS, sSums = [
            smem.allocate_tensor(Uint8, cute.make_layout(n * D * chain.ROWS * 4), byte_alignment=128).iterator.toint()
            for n in (1, 4)
        ]
        sExtreme = smem.allocate_tensor(Uint8, cute.make_layout(32), byte_alignment=16).iterator.toint()  # by warp
        thread, worker, part = cute.arch.thread_idx()[0], cute.arch.block_idx()[0], cute.arch.block_idx()[1]
        any_given = Int32(0)
        for i in cutlass.range(1 + cute.arch.lane_idx(), workers, 32, unroll=4):
            any_given |= ptx.ldg_i32(segments.map_word(workspace, workers, i))
        if ptx.uniform(any_given) > 0:  # often there are none
            schedule.share(sPlan, items, H, T, cu_seqlens, workspace, flags, worker, workers)
            if thread < 8:
                ptx.sts_i32(sExtreme + thread * 4, Int32(0))
            cute.arch.sync_threads()
            begin, end = ptx.lds_i32(sPlan + AT_BEGIN), ptx.lds_i32(sPlan + AT_END)
            if begin < end:
                piece = schedule.find_piece(
                    end, sPlan, items, H, T, cu_seqlens, workspace, flags, Int32(1), worker, workers
                )
                fate, last = piece.fate, piece.span // SPAN
                any_given = Int32(0)
                if (fate & (Fate.COMPARED | Fate.SEGMENT)) == Fate.COMPARED:
                    for i in cutlass.range(worker + 1 + cute.arch.lane_idx(), last + 1, 32, unroll=1):
                        any_given |= ptx.ldg_i32(segments.map_word(workspace, workers, i))
                if ptx.uniform(any_given) > 0:
                    slot = state_io.slot_of(piece.n, state_indices, P, flags, INDEX_INT64)
                    if state_io.begins_with_zero(piece.n, has_initial_state):
                        slot = Int32(-1)
                    initial = state_io.State(initial_state, initial_pitch, slot, piece.h)
                    chain.states_of(
                        self.config, initial, workspace, workers, worker, last, part, thread, sS, sSums, sExtreme, flags
                    )


def compile(config: KdaBuildConfig, arch: str = "sm_90a"):  # noqa: A001
    """Compiles a configuration for all shapes; needs no GPU. The result takes torch tensors, on torch's stream."""
    kernel = KdaBuildSm90(config)
    return cute.compile(
        kernel, *fake_tensors(config, "kvg"), *zeros(KdaBuildSm90.__call__),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
