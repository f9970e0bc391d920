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

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource, SmemLayoutAtomKind
from cutlass.memory import SmemAllocator

from . import chunk, fragments, gate, inverse, ptx, recurrence, scalars, schedule, segments, state_io
from .arguments import fake_tensors
from .config import (
    MAPS_BUILT,
    KdaFwdConfig,
)
from .layout import (
    ANCHORS,
    BOX,
    DECAY,
    NORM,
    PAIR_BAR,
    SQUARES,
    STATE_BAR,
    SYSTEM,
    SYSTEMS,
    TABLES,
    C,
    D,
    Stage,
)
from .pipeline import Pipeline, g_boxes, v_boxes
from .schedule import (
    AT_COUNT,
    AT_END,
    AT_GUESSED,
    AT_PIECES,
    AT_SEGMENT,
    AT_WARM_UP,
    PIECE,
    PIECES,
    PLAN,
    SPAN,
    Entry,
    Fate,
    Piece,
)
from .segments import EXACT, HANDED, NOT_NEEDED

# What the chunks before a segment multiply a state by at most, channel by channel, if it is to begin without it. Only a
# guess, but a wrong one costs a run: what is in one channel moves to others, up to 2^20 times as much was seen.
FORGOTTEN = 2.0**-48


def pipeline_of(config: KdaFwdConfig) -> Pipeline:
    prepare_wgs, state_wgs = 2 if config.v_split == 2 else 1, v_boxes(config)
    gate_warps = 0 if config.v_split == 2 else 2
    return Pipeline(
        config,
        Stage.of(g_boxes(config), v_boxes(config)),
        threads=128 * (1 + prepare_wgs + state_wgs),
        # With fewer stages than pairs a pair would come to a stage two phases early, which parity cannot tell apart.
        pairs=min(2 * prepare_wgs, config.stages - (config.v_split - 1)),
        gate_warps=gate_warps,
        state_wgs=state_wgs,
        queries=True,
        # Four times the same code where `prepare` has it is more than the instruction cache has room for.
        gates_rolled=gate_warps == 0,
    )


class KdaFwdSm90:
    def __init__(self, config: KdaFwdConfig):
        self.config, self.pipe = config, pipeline_of(config)
        self.prepare_wgs = 2 if config.v_split == 2 else 1
        self.sets_registers = self.pipe.threads == 512  # with fewer warps all have enough
        # registers a lane: those that ptxas spills least with; the sum over warpgroups is at most 512, what an SM has
        registers = (64, 128, 160) if config.v_split == 1 else (72, 136, 168)
        self.regs_load, self.regs_prepare, self.regs_state = registers

    # ------------------------------------------------------------------ host side

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # [B, T, H, K]
        mK: cute.Tensor,
        mV: cute.Tensor,  # [B, T, HV, V]; from here on heads are those of values, and H is HV
        mG: cute.Tensor,
        mO: cute.Tensor,
        beta: Int64,  # addresses: [B, T, H] bf16 or fp32
        A_log: Int64,  # [H] fp32 or 0
        dt_bias: Int64,  # [H, K] fp32 or 0
        initial_state: Int64,  # [N, H, V, K] or [N, H, K, V], bf16 or fp32, or 0
        final_state: Int64,
        state_indices: Int64,  # [N] int32: states are those of a pool, [P, H, ...], a negative one is none; or 0
        checkpoints: Int64,  # [R, H, ...] bf16 or fp32: states every so many chunks, if the configuration keeps them
        first_checkpoints: Int64,  # [N] int32: the number of a sequence's first
        cu_seqlens: Int64,  # [N + 1] int32 or int64, or 0
        workspace: Int64,  # workspace_bytes of memory, or 0: no item is cut
        N: Int32,
        P: Int32,
        every: Int32,
        scale: Float32,
        lower_bound: Float32,
        flags: Int32,
        max_blocks: Int32,
        stream: cuda.CUstream,
    ):
        box = cute.tile_to_shape(warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, BFloat16), (C, 64), (0, 1))
        g_atom = warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, self.pipe.g_type)
        g_box = cute.tile_to_shape(g_atom, (C, D // self.pipe.g_boxes), (0, 1))
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        by_token = [1, 3, 2, 0]  # [B, T, H, D] -> (T, D, H, B)
        mQ, mK, mV, mG, mO = [
            cute.make_tensor(m.iterator, cute.select(m.layout, mode=by_token)) for m in (mQ, mK, mV, mG, mO)
        ]
        q_tma, k_tma, v_tma = [cpasync.make_tiled_tma_atom(load, m, box, (C, 64)) for m in (mQ, mK, mV)]
        g_tma = cpasync.make_tiled_tma_atom(load, mG, g_box, (C, D // self.pipe.g_boxes))
        o_tma = cpasync.make_tiled_tma_atom(store, mO, box, (C, 64))

        def mma(n, b_major):
            op = warpgroup.MmaF16BF16Op(
                BFloat16, Float32, (64, n, 16), OperandSource.RMEM, OperandMajorMode.K, b_major
            )  # fmt: skip
            return cute.make_tiled_mma(op)

        items = N * cute.size(mO.shape[2])
        workers = max_blocks // self.pipe.blocks
        grid = workers * self.pipe.blocks
        if workspace == 0:
            grid = cutlass.min(items, workers) * self.pipe.blocks
        self.kernel(
            q_tma[0], q_tma[1], k_tma[0], k_tma[1], v_tma[0], v_tma[1], g_tma[0], g_tma[1], o_tma[0], o_tma[1],
            mQ, mK, mV, mG, mO, beta, A_log, dt_bias, initial_state, final_state, state_indices, P, checkpoints,
            first_checkpoints, every, cu_seqlens, workspace, items, workers, scale, lower_bound, flags,
            mma(2 * C, OperandMajorMode.K), mma(C, OperandMajorMode.K), mma(D, OperandMajorMode.MN),
        ).launch(
            grid=[grid, 1, 1], block=[self.pipe.threads, 1, 1], cluster=[self.pipe.blocks, 1, 1], stream=stream,
            min_blocks_per_mp=1,
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
        beta: Int64, A_log: Int64, dt_bias: Int64, initial_state: Int64, final_state: Int64, state_indices: Int64,
        P: Int32, checkpoints: Int64, first_checkpoints: Int64, every: Int32, cu_seqlens: Int64, workspace: Int64,
        items: Int32, most_workers: Int32, scale: Float32, lower_bound: Float32, flags: Int32,
        mma_ks: cute.TiledMma, mma_tm: cute.TiledMma, mma_s: cute.TiledMma,
    ):  # fmt: skip
        S = self.pipe.stages
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()

        def table(size, align=128):
            return smem.allocate_tensor(Uint8, cute.make_layout(size), byte_alignment=align).iterator

        ring = table(self.pipe.tiles.size * S, 1024)
        out = table(2 * self.pipe.state_wgs * BOX, 1024)  # o on its way out: [state warpgroup, buffer]
        sTables = table(TABLES * S).toint()
        sSystems = table(SYSTEM * SYSTEMS).toint()
        sPlan = table(PLAN).toint()
        sBias = table(256 * (self.pipe.gate_warps or 2 * self.pipe.pairs), 16).toint()  # of each warp that makes gates
        sLower = chunk.lower_triangle(table(48, 16).toint(), warp, cute.arch.lane_idx())
        barriers = cute.make_layout(5 * S + 2 * SYSTEMS + 2 * PIECES + 3)
        bars = smem.allocate_tensor(Int64, barriers, byte_alignment=8).iterator
        raw_full, gated, ready, solved, empty = (bars + i * S for i in range(5))
        a_full, a_empty = bars + 5 * S, bars + 5 * S + SYSTEMS
        listed, taken = a_empty + SYSTEMS, a_empty + SYSTEMS + PIECES
        left = taken + PIECES  # the other block has left what it was sent
        settled = left + 1, left + 2  # a segment is done; a state has been handed on

        if warp == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(S):
                    cute.arch.mbarrier_init(raw_full + s, 1)
                    cute.arch.mbarrier_init(gated + s, 32 * (self.pipe.gate_warps or 1))  # or `fetch`
                    cute.arch.mbarrier_init(ready + s, 64)  # a pair of `prepare`
                    cute.arch.mbarrier_init(solved + s, 32)
                    sent = self.pipe.blocks == 2 and s < self.pipe.own_stages
                    readers = (128 + 4 * sent) * self.pipe.state_wgs
                    cute.arch.mbarrier_init(empty + s, readers)
                cute.arch.mbarrier_init(left, 4 * self.pipe.state_wgs)
                cute.arch.mbarrier_init(settled[0], 4 * self.pipe.state_wgs)
                cute.arch.mbarrier_init(settled[1], 128 * self.pipe.state_wgs)
                for i in cutlass.range_constexpr(SYSTEMS):
                    cute.arch.mbarrier_init(a_full + i, 64)
                    cute.arch.mbarrier_init(a_empty + i, 32)
                for i in cutlass.range_constexpr(PIECES):
                    cute.arch.mbarrier_init(listed + i, 1)
                    # all but `load`, which lists them, and idle pairs
                    cute.arch.mbarrier_init(
                        taken + i, self.pipe.threads - 32 - 64 * (2 * self.prepare_wgs - self.pipe.pairs)
                    )
            cute.arch.mbarrier_init_fence()
            for atom in (q_tma, k_tma, v_tma, g_tma, o_tma):
                cpasync.prefetch_descriptor(atom)

        if const_expr(self.pipe.k_boxes == 1):
            for s in cutlass.range_constexpr(S):
                for offset, size in (
                    (self.pipe.tiles.k_half, 2 * BOX),
                    (self.pipe.tiles.at_g + self.pipe.tiles.kr_half, self.pipe.tiles.kr_half),
                ):
                    at = ring.toint() + s * self.pipe.tiles.size + offset + cute.arch.thread_idx()[0] * 16
                    for i in cutlass.range_constexpr(size // 16 // self.pipe.threads + 1):
                        if cute.arch.thread_idx()[0] + i * self.pipe.threads < size // 16:
                            ptx.sts_16(at + i * self.pipe.threads * 16, Uint32(0))

        H = cute.size(mO.shape[2])
        T = cute.size(mO.shape[0])
        schedule.share(sPlan, items, H, T, cu_seqlens, workspace, flags, *self.pipe.worker())
        work = (sPlan, listed, taken)  # what all roles walk through, see `piece`
        cute.arch.sync_threads()
        if const_expr(self.pipe.blocks == 2):  # the barriers are there
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

        if warp < 4:
            if const_expr(self.sets_registers):
                cute.arch.setmaxregister_decrease(self.regs_load)
            if warp == 0:
                self.load(
                    q_tma, tQ, k_tma, tK, v_tma, tV, g_tma, tG, ring, raw_full, empty,
                    work, settled, items, H, T, state_indices, P, first_checkpoints, cu_seqlens, workspace,
                    most_workers, flags,
                )  # fmt: skip
                if cu_seqlens != 0:
                    schedule.clear_rest(self.clear, (mO, H), cu_seqlens, items // H, T, flags, *ptx.block())
            elif warp == 1:
                self.invert(
                    ring.toint(), sTables, sSystems, raw_full, solved, a_full, a_empty,
                    beta, scale, flags, H, T, work,
                )  # fmt: skip
            else:
                if const_expr(self.pipe.blocks == 1):
                    self.gates(
                        warp - 2, ring.toint(), sTables, sBias, raw_full, gated, A_log, dt_bias, lower_bound, work
                    )  # fmt: skip
                elif warp == 2:
                    self.send(ring.toint(), sTables, ready, solved, raw_full, left, work)
                else:
                    self.fetch(v_tma, tV, ring, raw_full, gated, empty, work)
        elif warp < 4 + 4 * self.prepare_wgs:
            if const_expr(self.sets_registers):
                cute.arch.setmaxregister_increase(self.regs_prepare)
            if warp < 4 + 2 * self.pipe.pairs:
                self.prepare(
                    warp - 4, ring.toint(), sTables, sSystems, sBias, sLower, raw_full, gated, ready, solved, a_full,
                    a_empty, A_log, dt_bias, lower_bound, work,
                )  # fmt: skip
        else:
            if const_expr(self.sets_registers):
                cute.arch.setmaxregister_increase(self.regs_state)
            self.state(
                (warp - 4 - 4 * self.prepare_wgs) // 4, ring, out, sTables, raw_full, gated, ready, solved, empty, left,
                mma_ks, mma_tm, mma_s, o_tma, tO, mO, initial_state, final_state, checkpoints, every, H, workspace,
                most_workers, flags, work, settled,
                (mQ, mK, mG, mV, beta, A_log, dt_bias, scale, lower_bound),
            )  # fmt: skip
        if const_expr(self.pipe.blocks == 2):  # the other block may have something to send or to release here still
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    # ------------------------------------------------------------------ who does what

    def first_own(self, n: Int32, phase: Int32, period: int):
        """Of the chunks from the n-th on the first that is the phase-th of its period."""
        return n + (phase - n % period + period) % period

    def count(self, work) -> Int32:
        """Of a worker's pieces."""
        return ptx.uniform(ptx.lds_i32(work[0] + AT_COUNT))

    @cute.jit
    def piece(self, nth: Int32, work):
        """A piece as `load` lists it."""
        sPlan, listed, taken = work
        at = sPlan + AT_PIECES + nth % PIECES * PIECE
        cute.arch.mbarrier_wait(listed + nth % PIECES, nth // PIECES & 1)
        numbers = (*ptx.lds_i32x4(at), *ptx.lds_i32x4(at + 16))
        if const_expr(self.config.checkpoints):
            numbers += ptx.lds_i32x4(at + 32)[:2]
        cute.arch.mbarrier_arrive(taken + nth % PIECES)
        return Entry(*(ptx.uniform(x) for x in numbers))

    @cute.jit
    def clear(self, target, t: Int32):
        """o of a token becomes zero, in all heads: 16 bytes a lane."""
        mO, H = target
        lanes, lane = self.config.V // 8, cute.arch.lane_idx()
        for h in cutlass.range(lane // lanes, H, 32 // lanes, unroll=1):
            row = mO[t, None, h, 0]
            ptx.stg_u32x4((row.iterator + lane % lanes * 8).toint(), (Uint32(0),) * 4)

    @cute.jit
    def wait(self, barrier, phase: Int32, lane: Int32):
        """mbarrier_wait before a named barrier. The test always holds, which ptxas cannot see: it makes the lanes of a
        warp leave the spinning together. They do on the machine, but not under compute-sanitizer, and a warp that comes
        to a named barrier in parts counts as several: racecheck then reports hazards that are none."""
        if lane + cute.arch.grid_dim()[0] != 0:
            cute.arch.mbarrier_wait(barrier, phase)

    def staged(self, base, dtype, kind, shape, order, stride=None):
        """Swizzled tiles at `base` in shared memory, one a stage of the ring (or every `stride` bytes)."""
        layout = cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, dtype), shape, order)
        stages = cute.make_layout(self.pipe.stages, stride=(stride or self.pipe.tiles.size) * 8 // dtype.width)
        return cute.make_tensor(cute.recast_ptr(base, layout.inner, dtype), cute.append(layout.outer, stages))

    def boxes_of(self, tma, m, start: Int32, cols: int, s_boxes):
        """TMA views of a head [T, D] from token `start` on: shared boxes, and [box, chunk, column box] of the head."""
        g = cute.local_tile(cute.domain_offset((start, 0), m), (C, cols), (None, None))
        return cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(s_boxes, 0, 2), cute.group_modes(g, 0, 2)
        )

    # ------------------------------------------------------------------ load

    @cute.jit
    def load(
        self, q_tma, mQ, k_tma, mK, v_tma, mV, g_tma, mG, ring, raw_full, empty,
        work, settled, items: Int32, H: Int32, T: Int32, state_indices: Int64, P: Int32, first_checkpoints: Int64,
        cu_seqlens: Int64, workspace: Int64, most_workers: Int32, flags: Int32,
    ):  # fmt: skip
        """One warp: lists the pieces of work; TMA of q, k, v, g for each own chunk. Boxes past the last token of
        the tensor arrive as zeros."""

        def boxes(offset, dtype, cols, count):  # TMA boxes of a stage, one behind the other
            return self.staged(ring + offset, dtype, SmemLayoutAtomKind.K_SW128, (C, cols, count), (0, 1, 2))

        bKQ = boxes(0, self.pipe.dtype, 64, 4)  # k, q of channels 0-63, k, q of channels 64-127
        bG = boxes(self.pipe.tiles.at_g, self.pipe.g_type, D // self.pipe.g_boxes, self.pipe.g_boxes)
        bV = boxes(self.pipe.tiles.at_v, self.pipe.dtype, 64, self.pipe.v_boxes)
        tiles = (q_tma, mQ, bKQ), (k_tma, mK, bKQ), (v_tma, mV, bV), (g_tma, mG, bG)
        stage, phase, n = Int32(0), Int32(1), Int32(0)
        sPlan = work[0]
        segment, built = ptx.lds_i32(sPlan + AT_SEGMENT), Int32(0)
        if const_expr(self.pipe.blocks == 1):
            if (segment != 0) & ((flags & MAPS_BUILT) != 0):
                built = ptx.uniform(ptx.ldg_i32(segments.map_word(workspace, most_workers, self.pipe.worker()[0])))
        count = self.count(work) - segment
        piece = Piece(ptx.lds_i32(sPlan + AT_END), *(Int32(0) for _ in range(8)))  # there is none before the first
        checkpoint = Int32(0)  # the first one of the sequence
        readers_end = Int32(0)  # of what there is to tell about the first piece of an item
        for nth in cutlass.range(count + 1, unroll=1):
            # finds a piece; lists the one before, with what `state` can prefetch for this one, and loads it
            found = Piece.none(piece.next_at)
            next_checkpoint = Int32(0)
            if nth < count:
                last = segment - (count - 1 - nth)  # 1 for a segment, 0 for its warm-up
                found = schedule.find_piece(
                    piece.next_at, sPlan, items, H, T, cu_seqlens, workspace, flags, last, *self.pipe.worker()
                )
                if const_expr(self.pipe.blocks == 1):
                    found = self.with_map(found, built)
                if const_expr(self.config.checkpoints):
                    next_checkpoint = ptx.ldg_i32(first_checkpoints + Int64(found.nh // H) * 4)
                found = found._replace(nh=state_io.pooled(found.nh, H, state_indices, P))
            if nth > 0:
                next_nh = found.nh
                if (found.fate & ~(Fate.FINAL | Fate.HANDED_ON | Fate.COMPARED)) != 0:
                    next_nh = Int32(-1)
                if (piece.fate & (Fate.COMPARED | Fate.SEGMENT)) == Fate.COMPARED:
                    readers_end = piece.span // SPAN + 1
                entry = Entry(*piece[1:7], next_nh, *piece[7:], checkpoint)
                self.list_piece(nth - 1, entry, work)
            stage, phase, n = self.load_piece(tiles, raw_full, empty, piece, stage, phase, n)
            piece, checkpoint = found, next_checkpoint
        self.finish(
            count, segment, readers_end, tiles, raw_full, empty, stage, phase, n, work, settled, workspace, most_workers
        )

    @cute.jit
    def with_map(self, found: Piece, built: Int32) -> Piece:
        """A segment that begins with the state that its item's maps give does not warm up."""
        tokens, fate = found.tokens, found.fate
        if built == 1:
            if (fate & Fate.WARM_UP) != 0:
                tokens = Int32(0)
            if (fate & Fate.SEGMENT) != 0:
                fate |= Fate.BUILT
        return found._replace(tokens=tokens, fate=fate)

    @cute.jit
    def list_piece(self, nth: Int32, entry: Entry, work):
        sPlan, listed, taken = work
        slot = nth % PIECES
        cute.arch.mbarrier_wait(taken + slot, nth // PIECES & 1 ^ 1)
        with cute.arch.elect_one():
            to = sPlan + AT_PIECES + slot * PIECE
            ptx.sts_i32x4(to, entry[:4])
            ptx.sts_i32x4(to + 16, entry[4:8])
            if const_expr(self.config.checkpoints):
                ptx.sts_i32x4(to + 32, entry[8:] * 2)
            cute.arch.mbarrier_arrive(listed + slot)

    @cute.jit
    def load_piece(
        self, tiles, raw_full, empty, piece: Piece | Entry, stage: Int32, phase: Int32, n: Int32
    ):  # fmt: skip
        start, h, b = piece.start, piece.h, piece.b
        (q_tma, mQ, bKQ), (k_tma, mK, _), (v_tma, mV, bV), (g_tma, mG, bG) = tiles
        vs, h_qk = self.pipe.rank(), h // (cute.size(mV.shape[2]) // cute.size(mK.shape[2]))
        sK_, gK = self.boxes_of(k_tma, mK[None, None, h_qk, b], start, 64, bKQ)
        sQ_, gQ = self.boxes_of(q_tma, mQ[None, None, h_qk, b], start, 64, bKQ)
        sV_, gV = self.boxes_of(v_tma, mV[None, None, h, b], start, 64, bV)
        sG_, gG = self.boxes_of(g_tma, mG[None, None, h, b], start, D // self.pipe.g_boxes, bG)
        chunks = cute.ceil_div(piece.tokens, C)
        for c in cutlass.range(self.first_own(n, vs, self.pipe.blocks) - n, chunks, self.pipe.blocks, unroll=1):
            cute.arch.mbarrier_wait(empty + stage, phase)
            bar, g_boxes = raw_full + stage, self.pipe.g_boxes * self.pipe.k_boxes // 2
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(
                    bar, (2 * self.pipe.k_boxes + self.pipe.v_boxes + g_boxes) * BOX
                )
            for i in cutlass.range_constexpr(g_boxes):
                cute.copy(g_tma, gG[None, c, i], sG_[None, i, stage], tma_bar_ptr=bar)
            for i in cutlass.range_constexpr(self.pipe.k_boxes):
                cute.copy(k_tma, gK[None, c, i], sK_[None, 2 * i, stage], tma_bar_ptr=bar)
                cute.copy(q_tma, gQ[None, c, i], sQ_[None, 2 * i + 1, stage], tma_bar_ptr=bar)
            for i in cutlass.range_constexpr(self.pipe.v_boxes):
                cute.copy(v_tma, gV[None, c, vs + i], sV_[None, i, stage], tma_bar_ptr=bar)
            stage += 1
            if stage == self.pipe.own_stages:
                stage = Int32(0)
                phase ^= 1
        return stage, phase, n + chunks

    @cute.jit
    def finish(
        self, count: Int32, segment: Int32, readers_end: Int32, tiles, raw_full, empty, stage: Int32, phase: Int32,
        n: Int32, work, settled, workspace: Int64, most_workers: Int32,
    ):  # fmt: skip
        """What blocks tell one another, and the last piece if there is a segment: it again, or nothing but to store its
        state. Not in the loop over pieces, where lanes that part ways would cost ptxas its uniform registers."""
        sPlan, lane = work[0], cute.arch.lane_idx()
        if readers_end > 0:
            cute.arch.mbarrier_wait(settled[1], 0)
            hashes = (segments.noted(self.pipe.team, sPlan, 0),) * 2  # nobody asks what it began with
            segments.tell(
                self.pipe.team, workspace, most_workers, Int64(EXACT), hashes, self.pipe.worker()[0] + 1, readers_end
            )
        if segment > 0:
            cute.arch.sync_warp()
            at = sPlan + AT_PIECES + (count - 1) % PIECES * PIECE
            start, tokens, h, b = ptx.lds_i32x4(at)
            checkpoint = ptx.lds_i32x4(at + 32)[:2]
            nh, fate, next_nh, span = ptx.lds_i32x4(at + 16)
            again, not_needed = segments.judge(self.pipe.team, workspace, most_workers, sPlan, settled[0], span, fate)
            handed_on = (fate & Fate.HANDED_ON) != 0
            fate = fate & (Fate.HANDED_ON | Fate.COMPARED)
            if not handed_on:
                fate = Int32(Fate.FINAL)
            if again != 0:
                fate |= Fate.AGAIN
            else:
                fate, tokens = Fate.KEPT | (fate & Fate.FINAL), Int32(0)
            entry = Entry(start, tokens, h, b, nh, fate, next_nh, span, *checkpoint)
            self.list_piece(count, entry, work)
            self.load_piece(tiles, raw_full, empty, entry, stage, phase, n)
            if not_needed != 0:
                if handed_on:
                    cute.arch.mbarrier_wait(settled[1], 0)
                # a lane for each state handed on, which is the right one now, and for each of the worker before
                slice, mine, theirs = segments.slice_of(self.pipe.team, lane), Int64(HANDED), Int64(NOT_NEEDED)
                if lane >= self.pipe.state_wgs:
                    slice, mine, theirs = slice - self.pipe.state_wgs - 2, theirs, mine
                if (lane < 2 * self.pipe.state_wgs) & (handed_on | (lane >= self.pipe.state_wgs)):
                    segments.settle(workspace, slice, mine, theirs)

    # ------------------------------------------------------------------ between the blocks of a cluster

    @cute.jit
    def send(self, ring: Int32, sTables: Int32, ready, solved, raw_full, left, work):
        """One warp: each chunk that this block has prepared, all but v, to the other block."""
        S, other, n = self.pipe.own_stages, self.pipe.rank() ^ 1, Int32(0)
        for nth in cutlass.range(self.count(work), unroll=1):
            tokens = self.piece(nth, work)[1]
            end = n + cute.ceil_div(tokens, C)
            for c in cutlass.range(self.first_own(n, self.pipe.rank(), 2), end, 2, unroll=1):
                own = c // 2
                stage = own % S
                cute.arch.mbarrier_wait(ready + stage, own // S & 1)
                cute.arch.mbarrier_wait(solved + stage, own // S & 1)
                cute.arch.mbarrier_wait(left, own & 1 ^ 1)
                bar = (raw_full + S).toint()
                with cute.arch.elect_one():
                    for base, step, size in (
                        (ring, self.pipe.tiles.size, self.pipe.tiles.sent),
                        (sTables, TABLES, TABLES),
                    ):
                        ptx.send(base + S * step, base + stage * step, size, bar, other)
            n = end

    @cute.jit
    def fetch(self, v_tma, mV, ring, raw_full, gated, empty, work):
        """One warp: v for the chunks that the other block prepares. `gated` says that rows behind the end are zero."""
        bV = self.staged(
            ring + self.pipe.tiles.at_v, self.pipe.dtype, SmemLayoutAtomKind.K_SW128, (C, 64, 1), (0, 1, 2)
        )
        lane, rank, stage, n = cute.arch.lane_idx(), self.pipe.rank(), self.pipe.own_stages, Int32(0)
        for nth in cutlass.range(self.count(work), unroll=1):
            start, tokens, h, b = self.piece(nth, work)[:4]
            sV_, gV = self.boxes_of(v_tma, mV[None, None, h, b], start, 64, bV)
            end = n + cute.ceil_div(tokens, C)
            for c in cutlass.range(self.first_own(n, rank ^ 1, 2), end, 2, unroll=1):
                phase = c // 2 & 1
                cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                bar = raw_full + stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(bar, BOX + self.pipe.tiles.sent + TABLES)
                cute.copy(v_tma, gV[None, c - n, rank], sV_[None, 0, stage], tma_bar_ptr=bar)
                valid = tokens - (c - n) * C
                if valid < C:
                    cute.arch.mbarrier_wait(bar, phase)
                    chunk.clear_rows((ring + self.pipe.tiles.at_v).toint() + stage * self.pipe.tiles.size, valid, lane)
                cute.arch.mbarrier_arrive(gated + stage)
            n = end

    # ------------------------------------------------------------------ gate

    @cute.jit
    def gates(
        self, half: Int32, ring: Int32, sTables: Int32, sBias: Int32, raw_full, gated,
        A_log: Int64, dt_bias: Int64, lower_bound: Float32, work,
    ):  # fmt: skip
        """Two warps, 64 channels each: g -> the gate's positive factor in fp16, where g was; anchors of each channel.

        The log2 decay is lam times the factor, whose relative error in fp16 is 2^-11 at most: 2^G errs by 2^-11 / e.
        """
        S = self.pipe.stages
        lane = cute.arch.lane_idx()
        bias_at = sBias + half * 256
        stage, phase = Int32(0), Int32(0)
        for nth in cutlass.range(self.count(work), unroll=1):
            tokens, h = self.piece(nth, work)[1:3]
            slope = gate.parameters(self.pipe.form, A_log, dt_bias, h, half, bias_at, lane)
            for c in cutlass.range(cute.ceil_div(tokens, C), unroll=1):
                sStage = ring + stage * self.pipe.tiles.size
                self.wait(raw_full + stage, phase, lane)
                gate.of_chunk(
                    self.pipe.form,
                    slope,
                    bias_at,
                    half,
                    sStage,
                    sTables + stage * TABLES,
                    lower_bound,
                    tokens - c * C,
                    lane,
                )
                cute.arch.mbarrier_arrive(gated + stage)
                stage += 1
                if stage == S:
                    stage = Int32(0)
                    phase ^= 1

    # ------------------------------------------------------------------ prepare

    @cute.jit
    def prepare(
        self, warp: Int32, ring: Int32, sTables: Int32, sSystems: Int32, sBias: Int32, sLower: Int32,
        raw_full, gated, ready, solved, a_full, a_empty, A_log: Int64, dt_bias: Int64, lower_bound: Float32, work,
    ):  # fmt: skip
        """Pairs of warps, each every `pairs`-th chunk: q, k -> Qd, Kd in place; Kr where g was; M; A for `invert`.

        Warp h of a pair has channels 64 h .. of all 32 tokens, and so half sums of A and M, which the two exchange at
        the chunk's end.
        """
        S, P, blocks, rank = self.pipe.own_stages, self.pipe.pairs, self.pipe.blocks, self.pipe.rank()
        pair, half, bias_at = warp // 2, warp % 2, sBias + warp * 256
        lane = cute.arch.lane_idx()
        row = lane // 4
        lam = gate.log2_of_factor(self.pipe.form, lower_bound)
        lower = sLower + (Int32(lane % 4 * 2 <= row) + Int32(lane % 4 * 2 < row)) * 16
        tile = fragments.tile_at(Int32(0), lane)

        n = Int32(0)  # chunks of the pieces before
        for nth in cutlass.range(self.count(work), unroll=1):
            tokens, h = self.piece(nth, work)[1:3]
            first, end = self.first_own(n, blocks * pair + rank, blocks * P), n + cute.ceil_div(tokens, C)
            slope = Float32(0.0)
            if const_expr(self.pipe.gate_warps == 0):
                if first < end:
                    slope = gate.parameters(self.pipe.form, A_log, dt_bias, h, half, bias_at, lane)
            tokens += n * C  # from the block's first chunk on, as c
            for c in cutlass.range(first, end, blocks * P, unroll=1):
                own = c // blocks
                stage, slot = own % S, own % SYSTEMS
                left = tokens - c * C
                sStage = ring + stage * self.pipe.tiles.size
                system = sSystems + slot * SYSTEM
                self.wait(raw_full + stage, own // S & 1, lane)
                if left < C:
                    chunk.clear_tail(self.pipe, lane, half, left, sStage)
                if const_expr(self.pipe.gate_warps == 0):
                    gate.of_chunk(
                        self.pipe.form, slope, bias_at, half, sStage, sTables + stage * TABLES, lower_bound, left, lane
                    )
                else:
                    self.wait(gated + stage, own // S & 1, lane)
                cute.arch.sync_warp()
                tile_kq = sStage + half * self.pipe.tiles.k_half + tile
                tile_kr = sStage + self.pipe.tiles.at_g + half * self.pipe.tiles.kr_half + tile
                table = sStage + self.pipe.tiles.at_t + half * ANCHORS + lane % 4 * 16
                # of Kd Ki^T and Qd Ki^T the blocks on and below the diagonal, and |q|^2: sums over the warp's channels
                acc = cute.make_rmem_tensor((chunk.SUMS + 4,), Float32)
                for i in cutlass.range_constexpr(chunk.SUMS + 4):
                    acc[i] = Float32(0.0)
                triangle = ptx.lds_u32x4(lower)
                for kk in cutlass.range(4, unroll=1):
                    chunk.decay(
                        self.pipe, acc, tile_kq ^ (kk * 32), tile_kr ^ (kk * 32), table + kk * 128, triangle, lam
                    )
                A, M, q2 = chunk.accumulators(self.pipe, acc)

                # `invert` takes A and the squares from one of its buffers
                if const_expr(P > SYSTEMS):
                    # other pairs use it too: a phase says whose turn it is only to who is not late
                    if own >= P:
                        self.wait(solved + (own - P) % S, (own - P) // S & 1, lane)
                self.wait(a_empty + slot, own // SYSTEMS & 1 ^ 1, lane)
                for i in cutlass.range_constexpr(4 if self.pipe.queries else 0):
                    q_sum = fragments.quad_sum(q2[i])
                    if lane % 4 == 0:
                        ptx.sts_f32(system + SQUARES + ((1 + half) * C + 8 * i + row) * 4, q_sum)
                # Of the half sums, the second warp leaves A's to the first in the system's place, the first M's to the
                # second in that of T and M, when both need the anchors there no more.
                cute.arch.barrier(barrier_id=PAIR_BAR + pair, number_of_threads=64)
                a_at, m_at = system + lane * 16, sStage + self.pipe.tiles.at_t + lane * 16
                chunk.give(self.pipe, a_at, m_at, A, M, half)
                cute.arch.barrier(barrier_id=PAIR_BAR + pair, number_of_threads=64)
                if half == 0:
                    chunk.store_a(chunk.take(a_at, A), system, lane)
                else:
                    if const_expr(self.pipe.queries):
                        chunk.store_m(chunk.take(m_at, M), sStage + self.pipe.tiles.at_m, lane)
                cute.arch.fence_view_async_shared()
                cute.arch.mbarrier_arrive(a_full + slot)
                cute.arch.mbarrier_arrive(ready + stage)
            n = end

    # ------------------------------------------------------------------ invert

    @cute.jit
    def invert(
        self, ring: Int32, sTables: Int32, sSystems: Int32, raw_full, solved, a_full, a_empty,
        beta: Int64, scale: Float32, flags: Int32, H: Int32, T: Int32, work,
    ):  # fmt: skip
        """One warp: T of each own chunk, and what else rows and columns of the chunk are multiplied with."""
        lane = cute.arch.lane_idx()
        n = Int32(0)
        for nth in cutlass.range(self.count(work), unroll=1):
            start, tokens, h, b = self.piece(nth, work)[:4]
            first, end = self.first_own(n, self.pipe.rank(), self.pipe.blocks), n + cute.ceil_div(tokens, C)
            beta_at = (Int64(b) * T + start - n * C) * H + h
            tokens += n * C  # from the block's first chunk on, as c
            next_beta = scalars.load_beta(beta, beta_at, H, first * C + lane, tokens, flags)
            for c in cutlass.range(first, end, self.pipe.blocks, unroll=1):
                own = c // self.pipe.blocks
                stage, slot = own % self.pipe.own_stages, own % SYSTEMS
                system = sSystems + slot * SYSTEM
                norm_at = sTables + stage * TABLES + NORM
                raw_beta = next_beta
                next_beta = scalars.load_beta(beta, beta_at, H, (c + self.pipe.blocks) * C + lane, tokens, flags)
                # what makes the stage's tables ours: `state` has left them, the loads have come
                cute.arch.mbarrier_wait(raw_full + stage, own // self.pipe.own_stages & 1)
                cute.arch.mbarrier_wait(a_full + slot, own // SYSTEMS & 1)
                exists = c * C + lane < tokens
                b_i = inverse.scalars_of(self.pipe, system, norm_at, raw_beta, exists, scale, flags, lane)
                cute.arch.sync_warp()
                inverse.of_chunk(self.pipe, system, norm_at, ring, stage, b_i, lane)
                cute.arch.fence_view_async_shared()
                cute.arch.mbarrier_arrive(a_empty + slot)
                cute.arch.mbarrier_arrive(solved + stage)
            n = end

    # ------------------------------------------------------------------ state

    @cute.jit
    def state(
        self, wg: Int32, ring, out, sTables: Int32, raw_full, gated, ready, solved, empty, left,
        mma_ks: cute.TiledMma, mma_tm: cute.TiledMma, mma_s: cute.TiledMma,
        o_tma, tO, mO, initial_state: Int64, final_state: Int64, checkpoints: Int64, every: Int32, H: Int32,
        workspace: Int64, most_workers: Int32, flags: Int32, work, settled, inputs,
    ):  # fmt: skip
        """A warpgroup holds 64 value rows of S as accumulators; products are transposed, value rows by tokens.

        In a product 0 times NaN is NaN, so a token that is not finite spoils those before it in its chunk. It leaves a
        state that is not finite, and so do numbers whose squares might overflow, see `invert`: then the piece goes
        token by token, once more.

        A segment does not wait for the state before it. It warms up on the chunks before its own, from a zero state,
        and goes on with what comes out if these chunks' decays say that the true state is forgotten by then; else it
        waits for that. Its state's hash at both ends is for `load`, which finds out whether the guess was right (see
        `judge`). If not, the segment runs again from the state handed on: what comes out are the bits of one segment
        after the other, for any input.
        """
        thread = cute.arch.thread_idx()[0] % 128
        warp, lane = thread // 32, cute.arch.lane_idx()
        col = lane % 4 * 2

        def operand_a(mma, k):
            return mma.get_slice(thread).make_fragment_A(mma.get_slice(thread).partition_shape_A((64, k)))

        def operand_b(mma, t):
            return mma.get_slice(thread).make_fragment_B(mma.get_slice(thread).partition_B(t))

        def fragment(mma, n):
            return mma.get_slice(thread).make_fragment_C(mma.get_slice(thread).partition_shape_C((64, n)))

        kind = SmemLayoutAtomKind
        bKQ = operand_b(mma_ks, self.staged(ring, BFloat16, kind.K_SW128, (2 * C, D), (0, 1)))
        sKr = self.staged(ring + self.pipe.tiles.at_g, BFloat16, kind.MN_SW128, (D, self.pipe.g_boxes // 2 * C), (1, 0))
        bKr = operand_b(mma_s, cute.local_tile(sKr, (D, C, self.pipe.stages), (0, 0, 0)))
        bT = operand_b(mma_tm, self.staged(ring + self.pipe.tiles.at_t, BFloat16, kind.K_SW64, (C, C), (0, 1)))
        bM = operand_b(mma_tm, self.staged(ring + self.pipe.tiles.at_m, BFloat16, kind.K_SW64, (C, C), (0, 1)))
        acc_s = fragment(mma_s, D)
        acc_ro = fragment(mma_ks, 2 * C)  # tokens 0-31: Kd S^T, 32-63: Qd S^T
        acc_u, acc_o = fragment(mma_tm, C), fragment(mma_tm, C)
        fS, fU = operand_a(mma_ks, D), operand_a(mma_tm, C)

        sO = self.staged(out, self.pipe.dtype, kind.K_SW128, (C, 64), (0, 1), stride=BOX)  # [state warpgroup, buffer]
        o_row = out.toint() + wg * (2 * BOX)
        # ldmatrix / stmatrix with a transposition: lane l serves token l % 8 + 8 (l // 16), 16-byte column of v
        t_row = (lane % 8 + lane // 16 * 8) * 128
        t_col = ((2 * warp + lane // 8 % 2) ^ (lane % 8)) * 16
        n, buf, forget = Int32(0), Int32(0), Float32(1.0)

        vs = self.pipe.rank() + wg  # of 64 value rows
        for nth in cutlass.range(self.count(work), unroll=1):
            piece = self.piece(nth, work)
            start, tokens, h, b, nh, fate = piece[:6]
            kept = piece.skipped, piece.checkpoint, every, checkpoints
            chunks = cute.ceil_div(tokens, C)
            place = workspace, most_workers, wg, thread
            guessed, source = Boolean(False), fate & (Fate.TAKEN_OVER | Fate.AGAIN)
            if (fate & Fate.SEGMENT) != 0:
                guessed = ptx.all_of(forget < FORGOTTEN, STATE_BAR + wg)
                source = Int32(Fate.TAKEN_OVER)
                if guessed:
                    source = Int32(0)
                    segments.note(acc_s, work[0], 1, wg * 4 + warp, lane)
                if const_expr(self.pipe.blocks == 1):
                    if (fate & Fate.BUILT) != 0:
                        guessed, source = Boolean(True), Int32(Fate.BUILT)
            if source != 0:
                if (warp == 0) & ((fate & Fate.AGAIN) != 0):
                    cute.arch.cp_async_bulk_wait_group(0)  # o of the first time has been written
                segments.take(self.pipe.team, acc_s, place, source)
            elif (fate & (Fate.SEGMENT | Fate.KEPT)) == 0:
                whence = initial_state
                if ((fate & Fate.WARM_UP) != 0) | (nh < 0):
                    whence = Int64(0)
                state_io.load(acc_s, self.config, whence, nh, vs, flags)
            state_io.prefetch(self.config, initial_state, piece.next_nh, vs, flags)
            forget = Float32(1.0)  # the decay of all chunks of the piece, of channel `thread`
            written = tokens  # of o
            if (fate & Fate.WARM_UP) != 0:
                written = Int32(0)
            sO_, gO_ = self.boxes_of(o_tma, tO[None, None, h, b], start, 64, sO)
            for c in cutlass.range(chunks, unroll=1):
                if const_expr(self.config.checkpoints):
                    before, first = piece.skipped + c, piece.checkpoint
                    if (before % every == 0) & ((fate & Fate.WARM_UP) == 0):
                        state_io.store_checkpoint(
                            acc_s, self.config, checkpoints, (first + before // every) * H + h, vs, flags
                        )
                stage, phase, is_own = self.stage_of(n)
                prepared, inverted = ready + stage, solved + stage
                if const_expr(self.pipe.blocks == 2):
                    if not is_own:
                        prepared, inverted = raw_full + stage, gated + stage
                cute.arch.mbarrier_wait(prepared, phase)
                fragments.to_operand(acc_s, fS)
                # [Kd S^T | Qd S^T]^T
                warpgroup.fence()
                fragments.gemm(mma_ks, acc_ro, fS, bKQ[None, None, None, stage], True)
                warpgroup.commit_group()
                norm_at = sTables + stage * TABLES + NORM + col * 4
                decay_at = sTables + stage * TABLES + DECAY + col * 4
                if (fate & Fate.WARM_UP) != 0:
                    forget = forget * ptx.lds_f32(sTables + stage * TABLES + DECAY + thread * 4)
                cute.arch.mbarrier_wait(inverted, phase)
                warpgroup.wait_group(0)
                v_at = ring.toint() + self.pipe.tiles.at_v + stage * self.pipe.tiles.size + wg * BOX + t_row + t_col
                v = ptx.ldmatrix_x4(v_at, trans=True) + ptx.ldmatrix_x4(v_at + 2048, trans=True)
                # R = V - diag(1/|k|) Kd S^T, times beta if T is bare
                r = cute.make_rmem_tensor((C // 2,), Float32)
                for n8 in cutlass.range_constexpr(C // 8):
                    rk = ptx.lds_f32x2(norm_at + n8 * 32)
                    for half in cutlass.range_constexpr(2):
                        w, e = fragments.pair(v[2 * n8 + half], self.config.dtype), 4 * n8 + 2 * half
                        r[e] = ptx.fma(-acc_ro[e], rk[0], w[0])
                        r[e + 1] = ptx.fma(-acc_ro[e + 1], rk[1], w[1])
                if const_expr(self.config.neg_eigval):
                    fragments.scale_columns(r, norm_at + 2 * C * 4)
                # registers of their own: ptxas serializes every WGMMA when accumulators of two shapes overlap (C7511)
                for e in cutlass.range_constexpr(C // 2):
                    acc_o[e] = acc_ro[C // 2 + e]
                fragments.to_operand(r, fU)
                # U = T R
                warpgroup.fence()
                fragments.gemm(mma_tm, acc_u, fU, bT[None, None, None, stage], True)
                warpgroup.commit_group()
                fragments.scale_columns(acc_s, decay_at)
                warpgroup.wait_group(0)
                if const_expr(self.config.neg_eigval):
                    fragments.scale_columns(acc_u, norm_at)
                fragments.to_operand(acc_u, fU)
                # O += M U, then S += U^T Kr behind it
                warpgroup.fence()
                fragments.gemm(mma_tm, acc_o, fU, bM[None, None, None, stage], False)
                warpgroup.commit_group()
                fragments.gemm(mma_s, acc_s, fU, bKr[None, None, None, stage], False)
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                o, pack = [], ptx.pack_bf16 if self.pipe.dtype is BFloat16 else ptx.pack_f16
                for n8 in cutlass.range_constexpr(C // 8):
                    rq = ptx.lds_f32x2(norm_at + (C + n8 * 8) * 4)
                    for half in cutlass.range_constexpr(2):
                        o.append(pack(acc_o[4 * n8 + 2 * half] * rq[0], acc_o[4 * n8 + 2 * half + 1] * rq[1]))
                o_at = o_row + buf * BOX + t_row + t_col
                ptx.stmatrix_x4(o_at, tuple(o[:4]), trans=True)
                ptx.stmatrix_x4(o_at + 2048, tuple(o[4:]), trans=True)
                warpgroup.wait_group(0)
                cute.arch.mbarrier_arrive(empty + stage)  # as early as can be: the ring is what limits
                if const_expr(self.pipe.blocks == 2):
                    cute.arch.sync_warp()
                    for bar in (empty + n // 2 % self.pipe.own_stages, left):
                        ptx.remote_arrive(bar.toint(), self.pipe.rank() ^ 1, (lane == 0) & (not is_own))
                cute.arch.fence_view_async_shared()
                if warp == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)  # the store before has left the other buffer
                cute.arch.barrier(barrier_id=STATE_BAR + wg, number_of_threads=128)
                if written - c * C >= C:
                    if warp == 0:
                        cute.copy(o_tma, sO_[None, wg * 2 + buf], gO_[None, c, vs])
                        cute.arch.cp_async_bulk_commit_group()
                else:
                    self.store_tail(o_row + buf * BOX, mO, start + c * C, written - c * C, h, b, vs, thread)
                buf ^= 1
                n += 1
            if (fate & Fate.WARM_UP) != 0:
                ptx.sts_i32(work[0] + AT_WARM_UP, start)
            elif not ptx.all_of(recurrence.is_finite(acc_s), STATE_BAR + wg):
                if (fate & Fate.KEPT) == 0:
                    if warp == 0:
                        cute.arch.cp_async_bulk_wait_group(0)  # o of the first time has been written
                    begin = start
                    if source != 0:
                        segments.read(self.pipe.team, acc_s, place, source)
                    elif (fate & Fate.SEGMENT) != 0:  # which has guessed
                        begin = ptx.lds_i32(work[0] + AT_WARM_UP)
                        state_io.load(acc_s, self.config, Int64(0), nh, vs, flags)
                    else:
                        whence = initial_state
                        if nh < 0:
                            whence = Int64(0)
                        state_io.load(acc_s, self.config, whence, nh, vs, flags)
                    recurrence.token_by_token(
                        self.pipe, acc_s, inputs, mO, begin, start, tokens, h, b, wg, o_row, flags, kept
                    )
            if (fate & (Fate.COMPARED | Fate.AGAIN)) == Fate.COMPARED:
                segments.note(acc_s, work[0], 0, wg * 4 + warp, lane)
            if (fate & Fate.SEGMENT) != 0:
                if lane == 0:
                    if (wg == 0) & (warp == 0):
                        ptx.sts_i32(work[0] + AT_GUESSED, Int32(guessed))
                    cute.arch.mbarrier_arrive(settled[0])
            if (fate & Fate.HANDED_ON) != 0:
                segments.hand_on(self.pipe.team, acc_s, place, fate, guessed, settled[1])
            if ((fate & Fate.FINAL) != 0) & (nh >= 0):
                state_io.store(acc_s, self.config, final_state, nh, vs, flags)
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def stage_of(self, n: Int32):
        """(stage, phase, whether this block prepares it) of the n-th chunk."""
        S, m = self.pipe.own_stages, n // self.pipe.blocks
        stage, phase, is_own = m % S, m // S & 1, Boolean(True)
        if const_expr(self.pipe.blocks == 2):
            is_own = n % 2 == self.pipe.rank()
            if not is_own:
                stage, phase = Int32(S), m & 1
        return stage, phase, is_own

    @cute.jit
    def store_tail(
        self, sO: Int32, mO: cute.Tensor, token: Int32, valid: Int32, h: Int32, b: Int32, vs: Int32, thread: Int32
    ):
        """The last, partial chunk: a TMA box would overwrite the next sequence."""
        for i in cutlass.range_constexpr(2):
            r, piece = thread // 8 + 16 * i, thread % 8
            if r < valid:
                words = ptx.lds_u32x4(sO + r * 128 + ((piece ^ (r % 8)) * 16))
                row = mO[token + r, None, h, b]
                ptx.stg_u32x4((row.iterator + (vs * 64 + piece * 8)).toint(), words)


def compile(config: KdaFwdConfig, arch: str = "sm_90a"):  # noqa: A001
    """Compiles a configuration for all shapes; needs no GPU. The result takes torch tensors, on torch's stream."""
    kernel = KdaFwdSm90(config)
    return cute.compile(
        kernel, *fake_tensors(config, "qkvgo"),
        *([Int64(0)] * 10), *([Int32(0)] * 3), Float32(0.0), Float32(0.0), Int32(0), Int32(0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
