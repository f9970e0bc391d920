"""Trains the small Kimi Linear on recall and keeps it in bf16:  python -m kda_cute.examples.kimi_linear.train

Lengths grow during the first half of all steps; a step has the same number of tokens at any length. On a GPU fla-core
makes the gradients fast. The log has a line every 50 steps; figures at the end are of fresh streams, of the last length
and of four times that.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from .model import Config, KimiLinear
from .recall import VOCAB, Stream, sample

HERE = Path(__file__).parent
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def loss_of(model: KimiLinear, stream: Stream) -> tuple[torch.Tensor, float]:
    logits = model(stream.tokens)[:, stream.asked].float()
    right = (logits.argmax(-1) == stream.answers).float().mean().item()
    return F.cross_entropy(logits.flatten(0, 1), stream.answers.flatten()), right


@torch.no_grad()
def accuracy(model: KimiLinear, length: int, generator: torch.Generator, batches: int = 16, streams: int = 16) -> float:
    return sum(loss_of(model, sample(streams, length, generator))[1] for _ in range(batches)) / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=1 << 17, help="of a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    model = KimiLinear(Config(VOCAB, trained_tokens=options.lengths[-1])).to(options.device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    warm, steps = min(100, options.steps // 10), options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / max(warm, 1), 1) * (1 - max(i - 0.5 * steps, 0) / (0.5 * steps) * 0.9)
    )
    lines, begin, lengths = [], time.monotonic(), options.lengths
    for step in range(steps):
        length = lengths[min(step * 2 * len(lengths) // steps, len(lengths) - 1)]
        with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16):
            loss, right = loss_of(model, sample(options.tokens // length, length, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            seconds = round(time.monotonic() - begin, 1)
            lines.append(dict(step=step + 1, length=length, loss=round(loss.item(), 4), recall=right, seconds=seconds))
            print(json.dumps(lines[-1]), flush=True)
    model.bfloat16().eval()
    for length in (lengths[-1], 4 * lengths[-1]):
        lines.append(dict(tokens=length, answers=2048, recall=accuracy(model, length, generator)))
        print(json.dumps(lines[-1]), flush=True)
    model.save(options.out / "recall.pt")
    settings = {name: x for name, x in vars(options).items() if name != "out"}
    versions = dict(
        torch=torch.__version__, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    )
    log = [json.dumps({**settings, **versions}), *map(json.dumps, lines)]
    (options.out / "train.jsonl").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
