"""The PTX instructions that the kernels use by name: one function each, registers in, registers out.

Fragments of warp-level products (mma.m16n8k16) are plain tuples of registers, so that they never go through local
memory. Lane l of a warp has row = l // 4 and column pair = 2 * (l % 4); a 16 x 16 operand A holds (row, cols),
(row + 8, cols), (row, cols + 8), (row + 8, cols + 8), an accumulator 16 x 8 holds (row, col), (row, col + 1),
(row + 8, col), (row + 8, col + 1).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cutlass import Boolean, Float32, Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

_random = random.Random(0)
_FACTORS = [_random.getrandbits(32) | 1 for _ in range(64)]

F4 = tuple[Float32, Float32, Float32, Float32]
U4 = tuple[Uint32, Uint32, Uint32, Uint32]


def _asm(text: str, results: Sequence, args: Sequence, constraints: str, effects: bool = False, loc=None, ip=None):
    values = [a.ir_value(loc=loc, ip=ip) for a in args]
    types = [t.mlir_type for t in results]
    result_type = None if not types else types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    out = llvm.inline_asm(
        result_type, values, text, constraints, has_side_effects=effects, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    if not types:
        return None
    if len(types) == 1:
        return results[0](out)
    return tuple(
        t(llvm.extractvalue(mt, out, ir.DenseI64ArrayAttr.get([i]), loc=loc, ip=ip))
        for i, (t, mt) in enumerate(zip(results, types, strict=True))
    )


@dsl_user_op
def ldmatrix_x4(address: Int32, *, trans: bool = False, loc=None, ip=None) -> U4:
    """Four 8 x 8 matrices of 16-bit elements; lane l gives the shared-memory address of row l % 8 of matrix l // 8."""
    t = ".trans" if trans else ""
    return _asm(
        f"ldmatrix.sync.aligned.m8n8.x4{t}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
        [Uint32] * 4, [address], "=r,=r,=r,=r,r,~{memory}", True, loc, ip,
    )  # fmt: skip


@dsl_user_op
def stmatrix_x4(address: Int32, r: U4, *, trans: bool = False, loc=None, ip=None) -> None:
    t = ".trans" if trans else ""
    _asm(
        f"stmatrix.sync.aligned.m8n8.x4{t}.shared.b16 [$0], {{$1, $2, $3, $4}};",
        [], [address, *r], "r,r,r,r,r,~{memory}", True, loc, ip,
    )  # fmt: skip


def _mma(dtype: str, a: U4, b0: Uint32, b1: Uint32, c: F4, loc, ip) -> F4:
    return _asm(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        [Float32] * 4, [*a, b0, b1, *c], "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", False, loc, ip,
    )  # fmt: skip


@dsl_user_op
def mma_bf16(a: U4, b0: Uint32, b1: Uint32, c: F4, *, loc=None, ip=None) -> F4:
    """c + a b: 16 x 16 times 16 x 8, bf16 operands, fp32 accumulators."""
    return _mma("bf16", a, b0, b1, c, loc, ip)


@dsl_user_op
def mma_f16(a: U4, b0: Uint32, b1: Uint32, c: F4, *, loc=None, ip=None) -> F4:
    """The same for fp16 operands."""
    return _mma("f16", a, b0, b1, c, loc, ip)


@dsl_user_op
def pack_f16(lo: Float32, hi: Float32, *, loc=None, ip=None) -> Uint32:
    return _asm("cvt.rn.f16x2.f32 $0, $2, $1;", [Uint32], [lo, hi], "=r,f,f", False, loc, ip)


@dsl_user_op
def as_f32(x: Uint32, *, loc=None, ip=None) -> Float32:
    return _asm("mov.b32 $0, $1;", [Float32], [x], "=f,r", False, loc, ip)


@dsl_user_op
def pow2(r: Float32, *, loc=None, ip=None) -> Float32:
    """2^p for r = 1.5 * 2^23 + p, p an integer in [-127, 127]; 2^-127 is taken as 0."""
    return _asm(
        "{ .reg .b32 t; mov.b32 t, $1; shl.b32 t, t, 23; add.s32 t, t, 0x3f800000; mov.b32 $0, t; }",
        [Float32], [r], "=f,f", False, loc, ip,
    )  # fmt: skip


@dsl_user_op
def maximum(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    return _asm("max.f32 $0, $1, $2;", [Float32], [x, y], "=f,f,f", False, loc, ip)


@dsl_user_op
def minimum(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """NaN if one of them is."""
    return _asm("min.NaN.f32 $0, $1, $2;", [Float32], [x, y], "=f,f,f", False, loc, ip)


@dsl_user_op
def absolute(x: Float32, *, loc=None, ip=None) -> Float32:
    return _asm("abs.f32 $0, $1;", [Float32], [x], "=f,f", False, loc, ip)


@dsl_user_op
def pack_bf16(lo: Float32, hi: Float32, *, loc=None, ip=None) -> Uint32:
    return _asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [Uint32], [lo, hi], "=r,f,f", False, loc, ip)


@dsl_user_op
def bf16_lo(x: Uint32, *, loc=None, ip=None) -> Float32:
    return _asm("shl.b32 $0, $1, 16;", [Float32], [x], "=f,r", False, loc, ip)


@dsl_user_op
def bf16_hi(x: Uint32, *, loc=None, ip=None) -> Float32:
    return _asm("and.b32 $0, $1, 0xffff0000;", [Float32], [x], "=f,r", False, loc, ip)


@dsl_user_op
def f16_lo(x: Uint32, *, loc=None, ip=None) -> Float32:
    text = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }"
    return _asm(text, [Float32], [x], "=f,r", False, loc, ip)


@dsl_user_op
def f16_hi(x: Uint32, *, loc=None, ip=None) -> Float32:
    text = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }"
    return _asm(text, [Float32], [x], "=f,r", False, loc, ip)


@dsl_user_op
def mul_bf16x2(a: Uint32, b: Uint32, *, loc=None, ip=None) -> Uint32:
    return _asm("mul.rn.bf16x2 $0, $1, $2;", [Uint32], [a, b], "=r,r,r", False, loc, ip)


@dsl_user_op
def ex2(x: Float32, *, loc=None, ip=None) -> Float32:
    return _asm("ex2.approx.ftz.f32 $0, $1;", [Float32], [x], "=f,f", False, loc, ip)


@dsl_user_op
def rcp(x: Float32, *, loc=None, ip=None) -> Float32:
    return _asm("rcp.approx.ftz.f32 $0, $1;", [Float32], [x], "=f,f", False, loc, ip)


@dsl_user_op
def rsqrt(x: Float32, *, loc=None, ip=None) -> Float32:
    return _asm("rsqrt.approx.ftz.f32 $0, $1;", [Float32], [x], "=f,f", False, loc, ip)


@dsl_user_op
def fma(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    return _asm("fma.rn.f32 $0, $1, $2, $3;", [Float32], [a, b, c], "=f,f,f,f", False, loc, ip)


@dsl_user_op
def address(base: Int64, index: Int32, size: int, *, loc=None, ip=None) -> Int64:
    """base + index * size, computed here and nowhere earlier."""
    return _asm(f"mad.wide.s32 $0, $2, {size}, $1;", [Int64], [base, index], "=l,l,r", True, loc, ip)


@dsl_user_op
def at_slot(base: Int64, slot: Int32, pitch: Int64, *, loc=None, ip=None) -> Int64:
    """base + slot * pitch, computed here and nowhere earlier."""
    text = "{ .reg .b64 t; cvt.s64.s32 t, $2; mad.lo.s64 $0, t, $3, $1; }"
    return _asm(text, [Int64], [base, slot, pitch], "=l,l,r,l", True, loc, ip)


@dsl_user_op
def here(x: Int32, *, loc=None, ip=None) -> Int32:
    """x: what is computed from it is computed here and nowhere earlier."""
    return _asm("mov.b32 $0, $1;", [Int32], [x], "=r,r", True, loc, ip)


@dsl_user_op
def thread(*, loc=None, ip=None) -> Int32:
    """The thread's index, read here and nowhere earlier."""
    return _asm("mov.u32 $0, %tid.x;", [Int32], [], "=r", True, loc, ip)


@dsl_user_op
def block(*, loc=None, ip=None) -> tuple[Int32, Int32]:
    """The block's index, and how many there are, read here and nowhere earlier."""
    return _asm("mov.u32 $0, %ctaid.x; mov.u32 $1, %nctaid.x;", [Int32, Int32], [], "=r,=r", True, loc, ip)


@dsl_user_op
def ldg_u8(at: Int64, *, loc=None, ip=None) -> Uint32:
    return _asm("ld.global.u8 $0, [$1];", [Uint32], [at], "=r,l", True, loc, ip)


@dsl_user_op
def ldg_u16(at: Int64, *, loc=None, ip=None) -> Uint32:
    return _asm("ld.global.u16 $0, [$1];", [Uint32], [at], "=r,l", True, loc, ip)


@dsl_user_op
def ldg_u32(at: Int64, *, loc=None, ip=None) -> Uint32:
    return _asm("ld.global.b32 $0, [$1];", [Uint32], [at], "=r,l", True, loc, ip)


@dsl_user_op
def ldg_u32x2(at: Int64, *, loc=None, ip=None) -> tuple[Uint32, Uint32]:
    return _asm("ld.global.v2.b32 {$0, $1}, [$2];", [Uint32] * 2, [at], "=r,=r,l", True, loc, ip)


@dsl_user_op
def ldg_u32x4(at: Int64, *, loc=None, ip=None) -> U4:
    return _asm("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", [Uint32] * 4, [at], "=r,=r,=r,=r,l", True, loc, ip)


@dsl_user_op
def ldg_i32(at: Int64, *, loc=None, ip=None) -> Int32:
    return _asm("ld.global.b32 $0, [$1];", [Int32], [at], "=r,l,~{memory}", True, loc, ip)


@dsl_user_op
def ldg_i64(at: Int64, *, loc=None, ip=None) -> Int64:
    return _asm("ld.global.b64 $0, [$1];", [Int64], [at], "=l,l,~{memory}", True, loc, ip)


@dsl_user_op
def stg_u16(at: Int64, x: Uint32, *, loc=None, ip=None) -> None:
    """The low half of x."""
    text = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; st.global.b16 [$0], l; }"
    _asm(text, [], [at, x], "l,r,~{memory}", True, loc, ip)


@dsl_user_op
def stg_i32(at: Int64, x: Int32, *, loc=None, ip=None) -> None:
    _asm("st.global.b32 [$0], $1;", [], [at, x], "l,r,~{memory}", True, loc, ip)


def _halves(x: Uint32, dtype, loc, ip) -> tuple[Float32, Float32]:
    """Two numbers of a 16-bit dtype, of bf16 so far."""
    return bf16_lo(x, loc=loc, ip=ip), bf16_hi(x, loc=loc, ip=ip)


def _packed(x: Float32, y: Float32, dtype, loc, ip) -> Uint32:
    return pack_bf16(x, y, loc=loc, ip=ip)


@dsl_user_op
def ldg_pair(at: Int64, stride: int, dtype, *, loc=None, ip=None) -> tuple[Float32, Float32]:
    """Two elements of fp32 or a 16-bit dtype from global memory, `stride` bytes apart."""
    if dtype is Float32 and stride == 4:
        return _asm("ld.global.v2.f32 {$0, $1}, [$2];", [Float32] * 2, [at], "=f,=f,l", True, loc, ip)
    if dtype is not Float32 and stride == 2:
        x = _asm("ld.global.b32 $0, [$1];", [Uint32], [at], "=r,l", True, loc, ip)
        return _halves(x, dtype, loc, ip)
    if dtype is Float32:
        text = f"ld.global.f32 $0, [$2]; ld.global.f32 $1, [$2 + {stride}];"
    else:  # bf16
        text = (
            f"{{ .reg .b16 x, y, z; mov.b16 z, 0; ld.global.b16 x, [$2]; ld.global.b16 y, [$2 + {stride}]; "
            "mov.b32 $0, {z, x}; mov.b32 $1, {z, y}; }"
        )
    return _asm(text, [Float32] * 2, [at], "=&f,=f,l", True, loc, ip)


@dsl_user_op
def ldg_state(at: Int64, n: int, dtype, *, loc=None, ip=None) -> tuple[Float32, ...]:
    """2 or 4 neighbours of a state, fp32 or a 16-bit dtype, that are not needed again."""
    words = n * dtype.width // 32
    vector, names = (f".v{words}", "{" + ", ".join(f"${i}" for i in range(words)) + "}") if words > 1 else ("", "$0")
    kind, register, as_read = ("f32", "f", Float32) if dtype is Float32 else ("b32", "r", Uint32)
    x = _asm(
        f"ld.global.L1::no_allocate{vector}.{kind} {names}, [${words}];",
        [as_read] * words, [at], ",".join([f"={register}"] * words) + ",l", True, loc, ip,
    )  # fmt: skip
    if dtype is Float32:
        return tuple(x)
    return tuple(y for word in ([x] if words == 1 else x) for y in _halves(word, dtype, loc, ip))


@dsl_user_op
def copy_async(to: Int32, at: Int64, size: int = 16, *, loc=None, ip=None) -> None:
    """4, 8 or 16 bytes from global to shared memory."""
    through = "cg" if size == 16 else "ca"  # cg: past L1
    _asm(f"cp.async.{through}.shared.global [$0], [$1], {size};", [], [to, at], "r,l,~{memory}", True, loc, ip)


@dsl_user_op
def stg_state(at: Int64, x: Sequence, dtype, *, loc=None, ip=None) -> None:
    """The same, written."""
    words = list(x) if dtype is Float32 else [
        _packed(x[i], x[i + 1], dtype, loc, ip) for i in range(0, len(x), 2)
    ]  # fmt: skip
    n, kind, register = len(words), "f32" if dtype is Float32 else "b32", "f" if dtype is Float32 else "r"
    names = "{" + ", ".join(f"${i + 1}" for i in range(n)) + "}" if n > 1 else "$1"
    vector = f".v{n}" if n > 1 else ""
    _asm(f"st.global{vector}.{kind} [$0], {names};", [], [at, *words], "l," + ",".join([register] * n) + ",~{memory}",
         True, loc, ip)  # fmt: skip


@dsl_user_op
def stg_u32x4(at: Int64, x: U4, *, loc=None, ip=None) -> None:
    _asm("st.global.v4.b32 [$0], {$1, $2, $3, $4};", [], [at, *x], "l,r,r,r,r,~{memory}", True, loc, ip)


@dsl_user_op
def ldg_f32x4(at: Int64, *, loc=None, ip=None) -> F4:
    """From L2: what another block wrote may be older in L1."""
    return _asm(
        "ld.global.cg.v4.f32 {$0, $1, $2, $3}, [$4];", [Float32] * 4, [at], "=f,=f,=f,=f,l,~{memory}", True, loc, ip
    )


@dsl_user_op
def stg_f32x4(at: Int64, x: F4, *, loc=None, ip=None) -> None:
    _asm("st.global.v4.f32 [$0], {$1, $2, $3, $4};", [], [at, *x], "l,f,f,f,f,~{memory}", True, loc, ip)


@dsl_user_op
def stg_f32(at: Int64, x: Float32, *, loc=None, ip=None) -> None:
    _asm("st.global.f32 [$0], $1;", [], [at, x], "l,f,~{memory}", True, loc, ip)


@dsl_user_op
def hash_of(x: Sequence, *, loc=None, ip=None) -> tuple[Int32, Int32]:
    """64 bits of the bits of all x of all lanes of a warp. Of different bits in one lane it is always different."""
    h = Int64(0)
    for value, factor in zip(x, _FACTORS, strict=True):
        text = f"{{ .reg .b32 t; mov.b32 t, $1; mad.wide.u32 $0, t, {factor}, $2; }}"
        h = _asm(text, [Int64], [value, h], "=l,f,l", False, loc, ip)
    # one to one, and another function of h in each thread: a finalizer of MurmurHash3's kind
    text = (
        "{ .reg .b64 h, t; .reg .b32 n; mov.u32 n, %tid.x; mad.wide.u32 h, n, 0x9e3779b1, $2; "
        "shr.u64 t, h, 33; xor.b64 h, h, t; mul.lo.u64 h, h, 0xff51afd7ed558ccd; "
        "shr.u64 t, h, 33; xor.b64 h, h, t; mul.lo.u64 h, h, 0xc4ceb9fe1a85ec53; "
        "shr.u64 t, h, 33; xor.b64 h, h, t; mov.b64 {$0, $1}, h; "
        "redux.sync.add.s32 $0, $0, 0xffffffff; redux.sync.add.s32 $1, $1, 0xffffffff; }"
    )
    return _asm(text, [Int32] * 2, [h], "=r,=r,l", True, loc, ip)


@dsl_user_op
def all_of(condition: Boolean, barrier: Int32, *, loc=None, ip=None) -> Boolean:
    """Whether it holds for all 128 threads that meet at a named barrier."""
    x = _asm(
        "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; barrier.cta.red.and.pred q, $2, 128, p; selp.b32 $0, 1, 0, q; "
        "redux.sync.max.s32 $0, $0, 0xffffffff; }",
        [Int32], [Int32(condition), barrier], "=r,r,r,~{memory}", True, loc, ip,
    )  # fmt: skip
    return x != 0


@dsl_user_op
def ldg_acquire(at: Int64, *, loc=None, ip=None) -> Int64:
    return _asm("ld.acquire.gpu.global.b64 $0, [$1];", [Int64], [at], "=l,l,~{memory}", True, loc, ip)


@dsl_user_op
def stg_release(at: Int64, x: Int64, *, loc=None, ip=None) -> None:
    _asm("st.release.gpu.global.b64 [$0], $1;", [], [at, x], "l,l,~{memory}", True, loc, ip)


@dsl_user_op
def exchange(at: Int64, x: Int64, *, loc=None, ip=None) -> Int64:
    """What was there; acquire and release."""
    return _asm("atom.acq_rel.gpu.global.exch.b64 $0, [$1], $2;", [Int64], [at, x], "=l,l,l,~{memory}", True, loc, ip)


@dsl_user_op
def ldg_relaxed(at: Int64, *, loc=None, ip=None) -> Int64:
    return _asm("ld.relaxed.gpu.global.b64 $0, [$1];", [Int64], [at], "=l,l,~{memory}", True, loc, ip)


@dsl_user_op
def stg_relaxed(at: Int64, x: Int64, *, loc=None, ip=None) -> None:
    """For a word that says nothing of other memory: it need not wait for what was written before."""
    _asm("st.relaxed.gpu.global.b64 [$0], $1;", [], [at, x], "l,l,~{memory}", True, loc, ip)


@dsl_user_op
def stg_pair(at: Int64, x: Float32, y: Float32, stride: int, dtype, *, loc=None, ip=None) -> None:
    if dtype is Float32 and stride == 4:
        _asm("st.global.v2.f32 [$0], {$1, $2};", [], [at, x, y], "l,f,f,~{memory}", True, loc, ip)
    elif dtype is Float32:
        text = f"st.global.f32 [$0], $1; st.global.f32 [$0 + {stride}], $2;"
        _asm(text, [], [at, x, y], "l,f,f,~{memory}", True, loc, ip)
    elif stride == 2:
        _asm("st.global.b32 [$0], $1;", [], [at, _packed(x, y, dtype, loc, ip)], "l,r,~{memory}", True, loc, ip)
    else:
        text = f"{{ .reg .b16 x, y; mov.b32 {{x, y}}, $1; st.global.b16 [$0], x; st.global.b16 [$0 + {stride}], y; }}"
        _asm(text, [], [at, _packed(x, y, dtype, loc, ip)], "l,r,~{memory}", True, loc, ip)


def _lds(types: Sequence, address: Int32, loc, ip):
    """One, two or four 32-bit words of shared memory."""
    n = len(types)
    kind, letter = ("f32", "f") if types[0] is Float32 else ("b32", "r")
    vector, registers = (f".v{n}", "{" + ", ".join(f"${i}" for i in range(n)) + "}") if n > 1 else ("", "$0")
    text = f"ld.shared{vector}.{kind} {registers}, [${n}];"
    return _asm(text, types, [address], ",".join([f"={letter}"] * n) + ",r,~{memory}", True, loc, ip)


@dsl_user_op
def lds_f32(address: Int32, *, loc=None, ip=None) -> Float32:
    return _lds([Float32], address, loc, ip)


@dsl_user_op
def lds_f32x2(address: Int32, *, loc=None, ip=None) -> tuple[Float32, Float32]:
    return _lds([Float32] * 2, address, loc, ip)


@dsl_user_op
def lds_f32x4(address: Int32, *, loc=None, ip=None) -> F4:
    return _lds([Float32] * 4, address, loc, ip)


@dsl_user_op
def lds_i32(address: Int32, *, loc=None, ip=None) -> Int32:
    return _lds([Int32], address, loc, ip)


@dsl_user_op
def lds_i32x4(address: Int32, *, loc=None, ip=None) -> tuple[Int32, Int32, Int32, Int32]:
    return _lds([Int32] * 4, address, loc, ip)


@dsl_user_op
def uniform(x: Int32, *, loc=None, ip=None) -> Int32:
    """x, the same in all lanes of a warp, in a uniform register."""
    return _asm("redux.sync.max.s32 $0, $1, 0xffffffff;", [Int32], [x], "=r,r", True, loc, ip)


@dsl_user_op
def shuffle(x: Int64, lane: Int32, *, loc=None, ip=None) -> Int64:
    """x of another lane."""
    return _asm(
        "{ .reg .b32 a, b; mov.b64 {a, b}, $1; shfl.sync.idx.b32 a, a, $2, 31, 0xffffffff; "
        "shfl.sync.idx.b32 b, b, $2, 31, 0xffffffff; mov.b64 $0, {a, b}; }",
        [Int64], [x, lane], "=l,l,r", True, loc, ip,
    )  # fmt: skip


@dsl_user_op
def pair(lo: Int32, hi: Int32, *, loc=None, ip=None) -> Int64:
    return _asm("mov.b64 $0, {$1, $2};", [Int64], [lo, hi], "=l,r,r", False, loc, ip)


@dsl_user_op
def least(x: Int32, *, loc=None, ip=None) -> Int32:
    """Of a warp."""
    return _asm("redux.sync.min.s32 $0, $1, 0xffffffff;", [Int32], [x], "=r,r", True, loc, ip)


@dsl_user_op
def sum(x: Int32, *, loc=None, ip=None) -> Int32:  # noqa: A001
    """Over the lanes of a warp."""
    return _asm("redux.sync.add.s32 $0, $1, 0xffffffff;", [Int32], [x], "=r,r", True, loc, ip)


@dsl_user_op
def lds_u32(address: Int32, *, loc=None, ip=None) -> Uint32:
    return _lds([Uint32], address, loc, ip)


@dsl_user_op
def lds_u32x2(address: Int32, *, loc=None, ip=None) -> tuple[Uint32, Uint32]:
    return _lds([Uint32] * 2, address, loc, ip)


@dsl_user_op
def lds_u32x4(address: Int32, *, loc=None, ip=None) -> U4:
    return _lds([Uint32] * 4, address, loc, ip)


@dsl_user_op
def sts_f32(address: Int32, x: Float32, *, loc=None, ip=None) -> None:
    _asm("st.shared.f32 [$0], $1;", [], [address, x], "r,f,~{memory}", True, loc, ip)


@dsl_user_op
def sts_f32x2(address: Int32, x: Float32, y: Float32, *, loc=None, ip=None) -> None:
    _asm("st.shared.v2.f32 [$0], {$1, $2};", [], [address, x, y], "r,f,f,~{memory}", True, loc, ip)


@dsl_user_op
def sts_f32x4(address: Int32, x: F4, *, loc=None, ip=None) -> None:
    _asm("st.shared.v4.f32 [$0], {$1, $2, $3, $4};", [], [address, *x], "r,f,f,f,f,~{memory}", True, loc, ip)


@dsl_user_op
def sts_i32(address: Int32, x: Int32, *, loc=None, ip=None) -> None:
    _asm("st.shared.b32 [$0], $1;", [], [address, x], "r,r,~{memory}", True, loc, ip)


@dsl_user_op
def sts_i32x4(address: Int32, x: tuple[Int32, Int32, Int32, Int32], *, loc=None, ip=None) -> None:
    _asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", [], [address, *x], "r,r,r,r,r,~{memory}", True, loc, ip)


@dsl_user_op
def sts_u32x4(address: Int32, x: U4, *, loc=None, ip=None) -> None:
    _asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", [], [address, *x], "r,r,r,r,r,~{memory}", True, loc, ip)


@dsl_user_op
def sts_16(address: Int32, x: Uint32, *, loc=None, ip=None) -> None:
    """x four times."""
    _asm("st.shared.v4.b32 [$0], {$1, $1, $1, $1};", [], [address, x], "r,r,~{memory}", True, loc, ip)


@dsl_user_op
def sts_high(address: Int32, x: Float32, *, loc=None, ip=None) -> None:
    """The upper 16 bits of x: x in bf16, if the rest is zero."""
    text = "{ .reg .b16 h, g; mov.b32 {g, h}, $1; st.shared.b16 [$0], h; }"
    _asm(text, [], [address, x], "r,f,~{memory}", True, loc, ip)


@dsl_user_op
def prefetch_l2(at: Int64, exists: Boolean, *, loc=None, ip=None) -> None:
    """A line of 128 bytes."""
    _asm(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p prefetch.global.L2 [$0]; }",
        [], [at, Int32(exists)], "l,r,~{memory}", True, loc, ip,
    )  # fmt: skip


@dsl_user_op
def remote_arrive(bar: Int32, rank: Int32, condition: Boolean, *, loc=None, ip=None) -> None:
    """At the mbarrier of another block of the cluster that is where `bar` is in this one."""
    _asm(
        "{ .reg .pred p; .reg .b32 t; setp.ne.s32 p, $2, 0; mapa.shared::cluster.u32 t, $0, $1; "
        "@p mbarrier.arrive.shared::cluster.b64 _, [t]; }",
        [], [bar, rank, Int32(condition)], "r,r,r,~{memory}", True, loc, ip,
    )  # fmt: skip


@dsl_user_op
def send(to: Int32, at: Int32, size: int, bar: Int32, rank: Int32, *, loc=None, ip=None) -> None:
    """Shared memory to another block of the cluster; `to` and `bar`, which counts the bytes, are what they are here."""
    _asm(
        "{ .reg .b32 t, u; mapa.shared::cluster.u32 t, $0, $4; mapa.shared::cluster.u32 u, $3, $4; "
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [t], [$1], $2, [u]; }",
        [], [to, at, Int32(size), bar, rank], "r,r,r,r,r,~{memory}", True, loc, ip,
    )  # fmt: skip


@dsl_user_op
def send_word(to: Int32, x: Float32, bar: Int32, rank: Int32, *, loc=None, ip=None) -> None:
    """x to another block of the cluster, or to this one; `to` and `bar`, which counts its 4 bytes, as in `send`."""
    _asm(
        "{ .reg .b32 t, u; mapa.shared::cluster.u32 t, $0, $3; mapa.shared::cluster.u32 u, $2, $3; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [t], $1, [u]; }",
        [], [to, x, bar, rank], "r,f,r,r,~{memory}", True, loc, ip,
    )  # fmt: skip


@dsl_user_op
def load_bulk(to: Int32, at: Int64, size: Int32, bar: Int32, *, loc=None, ip=None) -> None:
    """A multiple of 16 bytes from global to shared memory, which an mbarrier counts; by one thread."""
    _asm(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        [], [to, at, size, bar], "r,l,r,r,~{memory}", True, loc, ip,
    )  # fmt: skip
