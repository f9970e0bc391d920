"""The plugins beside the servers' own Triton kernels: the same tensors, metadata and pool, over random batches.

Needs a Hopper GPU and the servers' kernels, installed or as `python -m tests.gpu.servers` lays them out. A test fails
where an adapter hands the call back to the server.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
import torch

from bench.serving import tune_quickly
from kda_cute.integrations import sglang as sglang_plugin
from kda_cute.integrations import vllm as vllm_plugin
from tests.gpu.oracle import relative_error
from tests.gpu.servers import missing

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
D = 128
SEEDS = range(8)
K3 = "vllm.models.kimi_k3.nvidia.ops.third_party.kda"
GLM, GLM_LAYER = "vllm.models.glm5next.nvidia.ops.third_party.kda", "vllm.models.glm5next.common.kda"
LING, LING_LAYER = "vllm.third_party.flash_linear_attention.ops.kda", "vllm.model_executor.models.bailing_moe_v3"
STATES = "vllm.model_executor.layers.mamba.ops.gather_initial_states"

# Of the difference, relative to what the server has, for each sequence and each slot of the pool.
CHUNKED = 2e-2  # both multiply in bf16: about 5e-3 each
FEW, OF_FEW = 8, 4  # a sequence of fewer tokens may by chance have a small o, with OF_FEW times the relative error
RECURRENT = 5e-3  # both calculate in fp32, and round o to bf16: 1.7e-3 each
BF16_POOL = 8e-3  # each token's state, or the last one, rounded on both sides


@dataclass
class Batch:
    """Packed tokens of N sequences with a pool of states, as a server's layer has them."""

    seed: int
    lengths: list[int]
    slots: list[int]  # 0 and less: none
    H: int = 4
    lower_bound: float | None = -5.0
    pool_dtype: torch.dtype = torch.float32
    padding: int = 0  # tokens of no sequence at the end, as in a CUDA graph
    pitch: int = 64  # elements from the end of a slot to the next
    P: int = 24
    mixed: torch.Tensor = field(init=False)  # [T, 3 * H * D], rows of a wider tensor
    g: torch.Tensor = field(init=False)  # [1, T, H, D]
    beta: torch.Tensor = field(init=False)  # [1, T, H], rows of a wider tensor
    A_log: torch.Tensor = field(init=False)
    dt_bias: torch.Tensor = field(init=False)
    pool: torch.Tensor = field(init=False)  # [P, H, D, D]
    memory: torch.Tensor = field(init=False)  # the pool and what lies between its slots

    def __post_init__(self) -> None:
        r = torch.Generator(DEVICE).manual_seed(self.seed)
        T, H, bf16 = sum(self.lengths) + self.padding, self.H, torch.bfloat16
        self.mixed = torch.randn(T, 3 * H * D + 128, generator=r, device=DEVICE).to(bf16)[:, : 3 * H * D]
        self.g = torch.randn(1, T, H, D, generator=r, device=DEVICE).to(bf16)
        self.beta = torch.randn(1, T, 2 * H + 8, generator=r, device=DEVICE).to(bf16)[..., H : 2 * H]
        self.A_log = torch.rand(H, generator=r, device=DEVICE)
        self.dt_bias = torch.rand(H * D, generator=r, device=DEVICE)
        slot = H * D * D + self.pitch
        self.memory = torch.randn(self.P * slot, generator=r, device=DEVICE).to(self.pool_dtype)
        self.pool = self.of(self.memory)

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        H = self.H
        return memory.as_strided((self.P, H, D, D), (H * D * D + self.pitch, D * D, D, 1))

    def qkv(self) -> tuple[torch.Tensor, ...]:
        """[1, T, H, D], views."""
        return tuple(x.unflatten(-1, (self.H, D))[None] for x in self.mixed.split(self.H * D, dim=-1))

    @property
    def cu(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths], device=DEVICE).cumsum(0).int()

    @property
    def indices(self) -> torch.Tensor:
        return torch.tensor(self.slots, dtype=torch.int32, device=DEVICE)

    @property
    def kept(self) -> list[int]:
        return [n for n, slot in enumerate(self.slots) if slot > 0]

    def tokens(self, n: int) -> slice:
        return slice(sum(self.lengths[:n]), sum(self.lengths[: n + 1]))

    @property
    def bound_of_pool(self) -> float:
        return BF16_POOL if self.pool_dtype is torch.bfloat16 else 0.0


def drawn(seed: int, lengths: Callable[[Random], int], nulls: tuple[int, ...] = (), padding: bool = True) -> Batch:
    r = Random(seed)
    N = r.randint(1, 12)
    slots = r.sample(range(1, 24), N)
    for n in range(N):
        if nulls and r.random() < 0.25:
            slots[n] = r.choice(nulls)
    slots[0] = slots[0] if slots[0] > 0 else 23 if 23 not in slots else slots[0]
    return Batch(
        seed, [lengths(r) for _ in range(N)], slots, r.choice((2, 4)), r.choice((-5.0, -5.0, None)),
        r.choice((torch.float32, torch.float32, torch.bfloat16)), r.choice((0, 0, 37)) if padding else 0,
        r.choice((0, 64, 4096)),
    )  # fmt: skip


def chunk_lengths(r: Random) -> int:
    """Prefill and, in the same batch, decoding sequences."""
    return r.choice((1, 1, r.randint(2, 70), 64, 128, r.randint(65, 700)))


Call = Callable[[torch.Tensor], torch.Tensor]  # of the pool, which it changes; returns o


def both(batch: Batch, ours: Call, theirs: Call, at_most: float, pool_at_most: float | None = None) -> None:
    """Each on its own copy of the pool. o of each sequence, each slot, and what neither may touch."""
    memories = [batch.memory.clone() for _ in range(2)]
    with torch.no_grad():
        o, want = (f(batch.of(memory)) for f, memory in zip((ours, theirs), memories, strict=True))
    torch.cuda.synchronize()
    T = batch.mixed.shape[0]
    o, want = o.reshape(T, batch.H, D), want.reshape(T, batch.H, D)
    for n in batch.kept:
        if batch.lengths[n]:
            error = relative_error(o[batch.tokens(n)], want[batch.tokens(n)])
            bound = at_most * (OF_FEW if at_most == CHUNKED and batch.lengths[n] < FEW else 1)
            assert error <= bound, f"o of sequence {n}, {batch.lengths[n]} tokens: {error:.1e}"
    for n in set(range(len(batch.slots))) - set(batch.kept):
        assert not o[batch.tokens(n)].any(), f"o of sequence {n}, which has no slot"
    pool_at_most = max(at_most if pool_at_most is None else pool_at_most, batch.bound_of_pool)
    pools = [batch.of(memory) for memory in memories]
    written = {batch.slots[n] for n in batch.kept}
    for slot in range(1, batch.P):  # slot 0 is the servers' to spoil
        if slot in written:
            error = relative_error(pools[0][slot], pools[1][slot])
            assert error <= pool_at_most, f"slot {slot}: {error:.1e}"
        else:
            assert torch.equal(pools[0][slot], batch.pool[slot]), f"slot {slot} was written"
    for slot in {0} | written:
        pools[0][slot].copy_(batch.pool[slot])
    assert torch.equal(memories[0], batch.memory), "something between the slots was written"


# ---- SGLang


@pytest.fixture
def sglang() -> Any:
    """SGLang's own kernel class."""
    if why := missing("sglang"):
        pytest.skip(why)
    tune_quickly()
    return importlib.import_module("sglang.srt.layers.attention.linear.kernels.kda_triton").TritonKDAKernel()


def sglang_kernels(theirs: Any) -> tuple[Any, Any]:
    return sglang_plugin.Kernel(None), theirs


def sglang_gate(batch: Batch) -> dict[str, Any]:
    return {"A_log": batch.A_log.view(1, 1, -1, 1), "dt_bias": batch.dt_bias, "lower_bound": batch.lower_bound}


def sglang_kwargs(batch: Batch, pool: torch.Tensor) -> dict[str, Any]:
    return {
        **sglang_gate(batch), "ssm_states": pool, "cache_indices": batch.indices, "query_start_loc": batch.cu,
    }  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_sglang_extend(sglang: Any, seed: int) -> None:
    batch = drawn(seed, chunk_lengths, (-1,))
    batch.pool[::2] *= seed % 2  # what a new request begins with is zero
    calls = [
        lambda pool, kernel=kernel: kernel.extend(
            *batch.qkv(), batch.g, batch.beta, beta_is_raw=True, **sglang_kwargs(batch, pool)
        )
        for kernel in sglang_kernels(sglang)
    ]
    both(batch, *calls, CHUNKED)


@pytest.mark.parametrize("seed", SEEDS)
def test_sglang_prefix_cache(sglang: Any, seed: int) -> None:
    """The state before a chunk of each sequence, or none of it."""
    batch = drawn(100 + seed, chunk_lengths)
    r = Random(seed)
    chunks = [r.choice((-1, r.randrange(-(-n // 64)))) for n in batch.lengths]
    index = torch.tensor(chunks, dtype=torch.int32, device=DEVICE)
    tracked = [torch.zeros(len(chunks), batch.H, D, D, device=DEVICE) for _ in range(2)]
    calls = [
        lambda pool, kernel=kernel, into=into: kernel.extend(
            *batch.qkv(), batch.g, batch.beta, beta_is_raw=True, track_state=into, track_chunk_idx=index,
            **sglang_kwargs(batch, pool),
        )
        for kernel, into in zip(sglang_kernels(sglang), tracked, strict=True)
    ]  # fmt: skip
    both(batch, *calls, CHUNKED)
    for n, chunk in enumerate(chunks):
        if chunk >= 0:
            error = relative_error(tracked[0][n], tracked[1][n])
            assert error <= max(CHUNKED, batch.bound_of_pool), f"before chunk {chunk} of sequence {n}: {error:.1e}"


@pytest.mark.parametrize("seed", SEEDS)
def test_sglang_packed_decode(sglang: Any, seed: int) -> None:
    batch = drawn(200 + seed, lambda r: 1, (-1,), padding=False)
    N = len(batch.slots)
    calls = [
        lambda pool, kernel=kernel: kernel.packed_decode(
            batch.mixed, batch.g.view(N, -1), batch.beta[0], scale=D**-0.5, ssm_states=pool,
            cache_indices=batch.indices, num_v_heads=batch.H, head_v_dim=D, **sglang_gate(batch),
        )
        for kernel in sglang_kernels(sglang)
    ]  # fmt: skip
    both(batch, *calls, RECURRENT, 1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_sglang_decode(sglang: Any, seed: int) -> None:
    batch = drawn(300 + seed, lambda r: 1, (-1,), padding=False)
    calls = [
        lambda pool, kernel=kernel: kernel.decode(*batch.qkv(), batch.g, batch.beta, **sglang_kwargs(batch, pool))
        for kernel in sglang_kernels(sglang)
    ]
    both(batch, *calls, RECURRENT, 1e-4)


@pytest.mark.parametrize("tokens", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_sglang_verify(sglang: Any, seed: int, tokens: int) -> None:
    """The pool stays as it is, states of tokens go to rows of a buffer."""
    batch = drawn(400 + 10 * seed + tokens, lambda r: tokens, padding=False)
    N = len(batch.slots)
    rows = Random(seed).sample(range(N + 3), N)
    buffers = [torch.zeros(N + 3, tokens, batch.H, D, D, device=DEVICE, dtype=batch.pool_dtype) for _ in range(2)]
    calls = [
        lambda pool, kernel=kernel, buffer=buffer: kernel.target_verify(
            batch.A_log.view(1, 1, -1, 1), batch.dt_bias, *batch.qkv(), batch.g, batch.beta, ssm_states=pool,
            cache_indices=batch.indices, query_start_loc=batch.cu, intermediate_states_buffer=buffer,
            intermediate_state_indices=torch.tensor(rows, dtype=torch.int32, device=DEVICE), cache_steps=tokens,
            retrieve_parent_token=None, lower_bound=batch.lower_bound,
        )
        for kernel, buffer in zip(sglang_kernels(sglang), buffers, strict=True)
    ]  # fmt: skip
    both(batch, *calls, RECURRENT, 0.0 if batch.pool_dtype is torch.float32 else None)
    for row in range(N + 3):
        for t in range(tokens if row in rows else 0):
            error = relative_error(buffers[0][row, t], buffers[1][row, t])
            assert error <= max(1e-4, batch.bound_of_pool), f"after token {t} of row {row}: {error:.1e}"
        assert row in rows or not buffers[0][row].any()


def test_sglang_decode_in_a_graph(sglang: Any) -> None:
    """Captured for 16 sequences, replayed for fewer: what is left has no slot."""
    ours = sglang_plugin.Kernel(None)
    graph_batch = Batch(500, [1] * 16, [-1] * 16)
    pool, indices = graph_batch.pool.clone(memory_format=torch.contiguous_format), graph_batch.indices
    kwargs: dict[str, Any] = {"scale": D**-0.5, "num_v_heads": 4, "head_v_dim": D, **sglang_gate(graph_batch)}
    inputs = graph_batch.mixed, graph_batch.g.view(16, -1), graph_batch.beta[0]

    def call() -> torch.Tensor:
        return ours.packed_decode(*inputs, ssm_states=pool, cache_indices=indices, **kwargs)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()
    for N in (16, 11, 1):
        batch = replace(graph_batch, seed=500 + N, slots=[*range(1, N + 1), *([-1] * (16 - N))])
        for x, y in zip(inputs, (batch.mixed, batch.g.view(16, -1), batch.beta[0]), strict=True):
            x.copy_(y)
        pool.copy_(batch.pool)
        indices.copy_(batch.indices)
        graph.replay()
        theirs = batch.pool.clone(memory_format=torch.contiguous_format)
        want = sglang.packed_decode(*inputs, ssm_states=theirs, cache_indices=batch.indices, **kwargs)
        assert relative_error(o[0, :N], want[0, :N]) <= RECURRENT and not o[0, N:].any()
        assert relative_error(pool[1:], theirs[1:]) <= 1e-4


# ---- vLLM


@pytest.fixture
def vllm() -> None:
    if why := missing("vllm"):
        pytest.skip(why)
    tune_quickly()


def vllm_pair(module: str, name: str, layer: str = "") -> tuple[Any, Any]:
    """Our function and vLLM's of that name; `layer` is the module where ours takes its place."""
    (make,) = (group[name] for group in vllm_plugin.CHANGES[layer or module] if name in group)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{name} went to vLLM's kernel")

    return make(never), getattr(importlib.import_module(module), name)


def fresh(batch: Batch) -> torch.Tensor:
    """has_initial_state: False for the first chunk of a request."""
    return torch.tensor([Random(batch.seed + n).random() < 0.6 for n in range(len(batch.slots))], device=DEVICE)


def gather(pool: torch.Tensor, indices: torch.Tensor, has_initial_state: torch.Tensor) -> torch.Tensor:
    return importlib.import_module(STATES).gather_initial_states(pool, indices, has_initial_state)


@pytest.mark.parametrize("seed", SEEDS)
def test_vllm_prefill(vllm: None, seed: int) -> None:
    """Kimi K3: states gathered and scattered by the layer, o into a part of the layer's."""
    batch = drawn(600 + seed, chunk_lengths)
    flags, indices = fresh(batch), batch.indices

    def with_states(function: Any) -> Call:
        def call(pool: torch.Tensor) -> torch.Tensor:
            q, k, v = batch.qkv()
            out = q.new_zeros(q.shape)
            _, last = function(
                q=q, k=k, v=v, raw_g=batch.g, raw_beta=batch.beta, A_log=batch.A_log, g_bias=batch.dt_bias,
                lower_bound=batch.lower_bound, initial_state=gather(pool, indices, flags), output_final_state=True,
                use_qk_l2norm_in_kernel=True, cu_seqlens=batch.cu, out=out,
            )  # fmt: skip
            pool[indices] = last.to(pool.dtype)
            return out

        return call

    both(batch, *map(with_states, vllm_pair(K3, "chunk_kda_with_fused_gate")), CHUNKED)


@pytest.mark.parametrize("seed", SEEDS)
def test_vllm_glm_prefill(vllm: None, seed: int) -> None:
    """GLM: ours reads and writes the pool in place of vLLM's gather and scatter."""
    batch = drawn(700 + seed, chunk_lengths)
    flags, indices = fresh(batch), batch.indices
    ours, theirs = vllm_pair(GLM, "chunk_kda_with_fused_gate", GLM_LAYER)
    (group,) = (x for x in vllm_plugin.CHANGES[GLM_LAYER] if "gather_initial_states" in x)

    def call(function: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = batch.qkv()
        gate: dict[str, Any] = {"safe_gate": True, "lower_bound": -5.0} if batch.lower_bound else {}
        return function(
            q=q, k=k, v=v, raw_g=batch.g, beta=batch.beta, A_log=batch.A_log.view(1, 1, -1, 1),
            g_bias=batch.dt_bias, initial_state=states, output_final_state=True, use_qk_l2norm_in_kernel=True,
            cu_seqlens=batch.cu, **gate,
        )  # fmt: skip

    def scatter(pool: torch.Tensor, states: torch.Tensor, indices: torch.Tensor) -> None:
        pool[indices] = states.to(pool.dtype)

    def with_states(function: Any, gather: Any, scatter: Any) -> Call:
        def whole(pool: torch.Tensor) -> torch.Tensor:
            o, last = call(function, gather(pool, indices, flags))
            scatter(pool, last, indices)
            return o

        return whole

    in_place = (group["gather_initial_states"](gather), group["scatter_states"](scatter))
    both(batch, with_states(ours, *in_place), with_states(theirs, gather, scatter), CHUNKED)


@pytest.mark.parametrize("seed", SEEDS)
def test_vllm_ling_prefill(vllm: None, seed: int) -> None:
    """Ling: gate and beta computed by the layer."""
    batch = drawn(800 + seed, chunk_lengths)
    flags, indices = fresh(batch), batch.indices
    g = -5 * torch.sigmoid(batch.A_log.exp()[:, None] * (batch.g.float() + batch.dt_bias.view(batch.H, D)))

    def with_states(function: Any) -> Call:
        def call(pool: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.contiguous() for x in batch.qkv())
            o, last = function(
                q=q, k=k, v=v, g=g, beta=batch.beta.float().sigmoid(), initial_state=gather(pool, indices, flags),
                output_final_state=True, use_qk_l2norm_in_kernel=True, safe_gate=True, lower_bound=-5.0,
                cu_seqlens=batch.cu,
            )  # fmt: skip
            pool[indices] = last.to(pool.dtype)
            return o

        return call

    both(batch, *map(with_states, vllm_pair(LING, "chunk_kda", LING_LAYER)), CHUNKED)


@pytest.mark.parametrize("seed", SEEDS)
def test_vllm_packed_decode(vllm: None, seed: int) -> None:
    batch = drawn(900 + seed, lambda r: 1, (0, -1), padding=False)

    def call_of(function: Any) -> Call:
        def call(pool: torch.Tensor) -> torch.Tensor:
            o, _ = function(
                mixed_qkv=batch.mixed, raw_g=batch.g, raw_beta=batch.beta, A_log=batch.A_log, dt_bias=batch.dt_bias,
                lower_bound=batch.lower_bound, initial_state=pool, state_indices=batch.indices,
            )  # fmt: skip
            return o

        return call

    both(batch, *map(call_of, vllm_pair(K3, "fused_recurrent_kda_packed_decode")), RECURRENT, 1e-4)


@pytest.mark.parametrize("tokens", [2, 4, 8])
@pytest.mark.parametrize("server", ["k3", "glm"])
@pytest.mark.parametrize("seed", range(4))
def test_vllm_speculative_steps(vllm: None, seed: int, server: str, tokens: int) -> None:
    """Each token's state in a slot of its own, from the last accepted one on. Rows of a captured graph without a
    sequence have null slots and no tokens."""
    r = Random(1000 + 10 * seed + tokens)
    N = r.randint(1, 5)
    P = tokens * N + 3
    table = torch.tensor(r.sample(range(1, P), tokens * N), dtype=torch.int32, device=DEVICE).view(N, tokens)
    padded = torch.cat([table, torch.zeros_like(table[:1])])
    accepted = torch.tensor([r.randint(1, tokens) for _ in range(N)] + [1], dtype=torch.int32, device=DEVICE)
    batch = Batch(1000 + seed, [tokens] * N + [0], [*range(1, N + 1), 0], r.choice((2, 4)), P=P)
    if server == "k3":
        pair = vllm_pair(K3, "fused_recurrent_kda")
    else:
        pair = vllm_pair(GLM, "fused_recurrent_kda", GLM_LAYER)
    memories = [batch.memory.clone() for _ in range(2)]
    outs = [torch.zeros(1, tokens * N, batch.H, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    q, k, v = batch.qkv()
    for function, memory, out in zip(pair, memories, outs, strict=True):
        common = {
            "q": q, "k": k, "v": v, "initial_state": batch.of(memory), "cu_seqlens": batch.cu, "out": out,
            "ssm_state_indices": padded, "num_accepted_tokens": accepted,
        }  # fmt: skip
        if server == "k3":
            function(
                raw_g=batch.g, raw_beta=batch.beta, A_log=batch.A_log, dt_bias=batch.dt_bias, lower_bound=-5.0, **common
            )
        else:
            function(
                g=batch.g, beta=batch.beta, a_log=batch.A_log, g_bias=batch.dt_bias, compute_gate=True,
                sigmoid_beta=True, lower_bound=-5.0, use_qk_l2norm_in_kernel=True, **common,
            )  # fmt: skip
    assert relative_error(outs[0], outs[1]) <= RECURRENT
    ours, theirs = (batch.of(memory) for memory in memories)
    for slot in range(1, P):
        assert relative_error(ours[slot], theirs[slot]) <= 1e-4, f"slot {slot}"


@pytest.mark.parametrize("seed", range(4))
def test_vllm_ling_decode(vllm: None, seed: int) -> None:
    batch = drawn(1100 + seed, lambda r: 1, padding=False)
    g = -5 * torch.sigmoid(batch.A_log.exp()[:, None] * (batch.g.float() + batch.dt_bias.view(batch.H, D)))

    def call_of(function: Any) -> Call:
        def call(pool: torch.Tensor) -> torch.Tensor:
            q, k, v = batch.qkv()
            o, _ = function(
                q=q, k=k, v=v, g=g, beta=batch.beta.float().sigmoid(), initial_state=pool,
                use_qk_l2norm_in_kernel=True, safe_gate=True, lower_bound=-5.0, cu_seqlens=batch.cu,
                ssm_state_indices=batch.indices,
            )  # fmt: skip
            return o

        return call

    both(batch, *map(call_of, vllm_pair(LING, "fused_recurrent_kda", LING_LAYER)), RECURRENT, 1e-4)
