"""A small Kimi Linear (arXiv 2510.26692): blocks of Kimi Delta Attention, every fourth one of softmax attention without
positions, on kda_cute's public functions and torch alone.

Parameters of the KDA layers have the names and shapes of fla's KimiDeltaAttention, so that weights move across. One
forward pass serves training, prefill in chunks and decoding: with a `Cache` it goes on where the last call ended.
Packed batches are [1, T] with cu_seqlens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kda_cute import chunk_kda, fused_recurrent_kda

FEW = 16  # tokens that are taken one by one if there is a state to go on from
# Not cuDNN's attention, which plans anew for every number of keys: decoding 24 tokens took 1 to 3 s on an H200.
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int = 128
    num_heads: int = 1
    head_dim: int = 128
    num_layers: int = 4
    attention_every: int = 4  # the last of so many layers is softmax attention
    mlp_size: int = 256
    conv_size: int = 4
    lower_bound: float = -5.0  # of the log decay a token
    norm_eps: float = 1e-5
    trained_tokens: int = 0


@dataclass
class Cache:
    """What layers remember of the tokens so far: of KDA a state and the last inputs of its convolutions, whatever the
    length; of attention all keys and values."""

    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers.values() for x in layer)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate.sigmoid()


class ShortConvolution(nn.Module):
    """silu of a causal convolution over time, a filter a channel. [B, T, D] or, packed, [1, T, D]."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, width).uniform_(-1, 1) / math.sqrt(width))

    def forward(self, x: Tensor, before: Tensor | None, place: Place) -> tuple[Tensor, Tensor]:
        """before: the last width - 1 inputs of every sequence, [N, width - 1, D]. Returns the next ones too."""
        width = self.weight.shape[-1]
        if before is None:
            before = x.new_zeros(place.N, width - 1, x.shape[-1])
        out, last = [], []
        for n, y in enumerate(place.split(x)):
            rows = torch.cat([before if place.cuts is None else before[n : n + 1], y], 1)
            out.append(F.conv1d(rows.transpose(1, 2), self.weight, groups=rows.shape[-1]).transpose(1, 2))
            last.append(rows[:, rows.shape[1] - (width - 1) :])
        return F.silu(torch.cat(out, 1)), torch.cat(last)


@dataclass
class Place:
    """Where sequences are in a batch: packed ones have tokens cuts[n] to cuts[n + 1] of its one entry."""

    N: int
    longest: int
    cu_seqlens: Tensor | None = None
    cuts: list[int] | None = None

    @staticmethod
    def of(tokens: Tensor, cu_seqlens: Tensor | None) -> Place:
        if cu_seqlens is None:
            return Place(*tokens.shape)
        cuts = cu_seqlens.tolist()
        return Place(len(cuts) - 1, max(b - a for a, b in pairwise(cuts)), cu_seqlens, cuts)

    def split(self, x: Tensor) -> Iterable[Tensor]:
        """[B, T, ...], or [1, tokens, ...] of each packed sequence."""
        return [x] if self.cuts is None else [x[:, a:b] for a, b in pairwise(self.cuts)]


class KimiDeltaAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, H, D = config.hidden_size, config.num_heads, config.head_dim
        self.config = config
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, H * D, bias=False) for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConvolution(H * D, config.conv_size) for _ in range(3))
        self.f_proj = nn.Sequential(nn.Linear(hidden, D, bias=False), nn.Linear(D, H * D, bias=False))
        self.b_proj = nn.Linear(hidden, H, bias=False)
        self.A_log = nn.Parameter(torch.zeros(H))
        dt = torch.exp(torch.rand(H * D) * math.log(100) + math.log(1e-3))  # log uniform, as in fla
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.g_proj = nn.Sequential(nn.Linear(hidden, D, bias=False), nn.Linear(D, H * D))
        self.o_norm = GatedRMSNorm(D, config.norm_eps)
        self.o_proj = nn.Linear(H * D, hidden, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, ...] | None, place: Place) -> tuple[Tensor, tuple[Tensor, ...]]:
        heads = (self.config.num_heads, self.config.head_dim)
        state, *before = past or (None,) * 4
        q, q_last = self.q_conv1d(self.q_proj(x), before[0], place)
        k, k_last = self.k_conv1d(self.k_proj(x), before[1], place)
        v, v_last = self.v_conv1d(self.v_proj(x), before[2], place)
        q, k, v, g = (y.unflatten(-1, heads) for y in (q, k, v, self.f_proj(x)))
        few = state is not None and place.longest <= FEW
        attend = fused_recurrent_kda if few and not torch.is_grad_enabled() else chunk_kda
        o, state = attend(
            q, k, v, g, self.b_proj(x), A_log=self.A_log.float(), dt_bias=self.dt_bias.float(), initial_state=state,
            output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, lower_bound=self.config.lower_bound, state_v_first=True,
            cu_seqlens=place.cu_seqlens,
        )  # fmt: skip
        o = self.o_norm(o, self.g_proj(x).unflatten(-1, heads))
        return self.o_proj(o.flatten(-2)), (state, q_last, k_last, v_last)


class Attention(nn.Module):
    """Causal, without positions: KDA, which forgets, tells the layers where they are."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, size = config, config.num_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, size, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, ...] | None, place: Place) -> tuple[Tensor, tuple[Tensor, ...]]:
        heads = (self.config.num_heads, self.config.head_dim)
        projected = (p(x).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        out, kept = [], []
        for n, parts in enumerate(zip(*map(place.split, projected), strict=True)):
            q_n, keys, values = (y.transpose(1, 2) for y in parts)
            if past is not None:
                keys, values = torch.cat([past[2 * n], keys], 2), torch.cat([past[2 * n + 1], values], 2)
            kept += [keys, values]
            tokens, seen = q_n.shape[2], keys.shape[2]
            how: dict[str, Any] = {}
            if tokens == seen:
                how = {"is_causal": True}
            elif tokens > 1:
                how = {"attn_mask": causal_lower_right(tokens, seen)}
            with sdpa_kernel(PLANLESS):
                out.append(F.scaled_dot_product_attention(q_n, keys, values, **how).transpose(1, 2))
        return self.o_proj(torch.cat(out, 1).flatten(-2)), tuple(kept)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.hidden_size, config.mlp_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        is_attention = (layer + 1) % config.attention_every == 0
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config) if is_attention else KimiDeltaAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: tuple[Tensor, ...] | None, place: Place) -> tuple[Tensor, tuple[Tensor, ...]]:
        attended, kept = self.attn(self.attn_norm(x), past, place)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kept


class KimiLinear(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab_size]. A cache is read, if it has something, and updated."""
        place, x = Place.of(tokens, cu_seqlens), self.embeddings(tokens)
        for i, layer in enumerate(self.layers):
            x, kept = layer(x, cache.layers.get(i) if cache else None, place)
            if cache is not None:
                cache.layers[i] = kept
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: Cache, chunk: int | None = None) -> Tensor:
        """Logits behind the last token, [B, vocab_size], so many tokens at a time: 32768, and 2048 on the CPU, where
        attention makes a mask of chunk times all tokens."""
        for piece in tokens.split(chunk or (1 << 15 if tokens.is_cuda else 1 << 11), 1):
            logits = self(piece, cache)[:, -1]
        return logits

    def save(self, path: Path) -> None:
        weights = {name: x.cpu() for name, x in self.state_dict().items()}
        torch.save({"config": asdict(self.config), "weights": weights}, path)

    @staticmethod
    def load(path: Path, device: torch.device | str = "cpu") -> KimiLinear:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = KimiLinear(Config(**saved["config"])).to(device=device, dtype=torch.bfloat16).eval()
        model.load_state_dict(saved["weights"])
        return model
