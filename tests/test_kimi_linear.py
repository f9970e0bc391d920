"""The example model: one forward pass for prefill, chunks, decoding and packed batches; fla's names and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kda_cute.examples.kimi_linear import model, recall


@pytest.fixture
def small() -> Any:
    torch.manual_seed(0)
    return model.KimiLinear(model.Config(recall.VOCAB, hidden_size=32, num_heads=2, head_dim=16, mlp_size=48)).eval()


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(0, 30, 60), (0, 1, 2, 40, 57, 58, 59, 60), (0, 50, *range(51, 61))])
def test_goes_on_from_a_cache(cuts: tuple[int, ...], small: Any) -> None:
    tokens = torch.randint(recall.VOCAB, (2, 60))
    cache = model.Cache()
    parts = [small(tokens[:, a:b], cache) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), small(tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_sequences_are_the_single_ones(small: Any) -> None:
    cuts, more = [0, 1, 20, 50], [0, 3, 4, 9]
    tokens, later = torch.randint(recall.VOCAB, (1, 50)), torch.randint(recall.VOCAB, (1, 9))
    cache = model.Cache()
    packed = small(tokens, cache, torch.tensor(cuts)), small(later, cache, torch.tensor(more))
    for n in range(3):
        own = model.Cache()
        for x, at, got in ((tokens, cuts, packed[0]), (later, more, packed[1])):
            piece = slice(at[n], at[n + 1])
            torch.testing.assert_close(got[:, piece], small(x[:, piece], own), rtol=1e-4, atol=1e-4)


def test_only_attention_remembers_more_of_more_tokens(small: Any) -> None:
    sizes = []
    for length in (20, 40):
        cache = model.Cache()
        with torch.no_grad():
            small(torch.zeros(1, length, dtype=torch.long), cache)
        sizes.append([sum(x.numel() for x in cache.layers[i]) for i in range(4)])
    assert sizes[0][:3] == sizes[1][:3] and sizes[1][3] == 2 * sizes[0][3]


def test_parameters_are_named_as_in_fla() -> None:
    ours = {name: tuple(x.shape) for name, x in model.KimiDeltaAttention(model.Config(8)).state_dict().items()}
    theirs = {
        "A_log": (1,), "dt_bias": (128,), "q_proj.weight": (128, 128), "k_proj.weight": (128, 128),
        "v_proj.weight": (128, 128), "q_conv1d.weight": (128, 1, 4), "k_conv1d.weight": (128, 1, 4),
        "v_conv1d.weight": (128, 1, 4), "f_proj.0.weight": (128, 128), "f_proj.1.weight": (128, 128),
        "b_proj.weight": (1, 128), "g_proj.0.weight": (128, 128), "g_proj.1.weight": (128, 128),
        "g_proj.1.bias": (128,), "o_norm.weight": (128,), "o_proj.weight": (128, 128),
    }  # fmt: skip
    assert ours == theirs
    try:
        from fla.layers import KimiDeltaAttention
    except ImportError:
        return
    layer = KimiDeltaAttention(128, num_heads=1, head_dim=128, safe_gate=True, lower_bound=-5.0, layer_idx=0)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == theirs


def test_streams_hold_what_they_ask_for() -> None:
    stream = recall.sample(5, 200, torch.Generator().manual_seed(0))
    body = stream.tokens[:, : stream.context]
    for b in range(5):
        for q, answer in zip(stream.asked, stream.answers[b], strict=True):
            key = stream.tokens[b, q]
            places = (body[b] == key).nonzero().flatten()
            assert len(places) == 1 and body[b, places[0] + 1] == answer == stream.tokens[b, q + 1]
    with pytest.raises(ValueError, match="length is 50: must be at least 56"):
        recall.sample(1, 50, torch.Generator())


def test_learns(small: Any) -> None:
    """Gradients go through all layers: a few steps on one batch bring the loss down."""
    stream = recall.sample(4, 56, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        logits = small(stream.tokens)[:, stream.asked]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream.answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
