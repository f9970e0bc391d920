"""The task: facts scattered in a long stream of noise, asked for at its end.

    noise noise KEY value noise ... KEY value noise ... ASK KEY value ASK KEY value

Tokens: 64 keys, 64 values, 64 kinds of noise, ASK. Every key stands for one value at most, drawn anew for each stream:
nothing can be learned by heart. The answer to a KEY behind ASK is the value that followed it in the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = 64
ASK = 3 * KINDS
VOCAB = ASK + 1
FACTS, QUESTIONS = 16, 8


@dataclass
class Stream:
    tokens: Tensor  # [B, T]
    asked: Tensor  # [QUESTIONS]: places of the keys behind ASK, at which the answers are to be predicted
    answers: Tensor  # [B, QUESTIONS]

    @property
    def context(self) -> int:
        """Tokens before the first question."""
        return int(self.asked[0]) - 1


def sample(batch: int, length: int, generator: torch.Generator, facts: int = FACTS) -> Stream:
    """Streams of `length` tokens with so many facts, on the device of the generator."""
    device, body = generator.device, length - 3 * QUESTIONS
    if body < 2 * facts or facts < QUESTIONS:
        raise ValueError(f"length is {length}: must be at least {2 * facts + 3 * QUESTIONS} for {facts} facts")

    def order(n: int, k: int) -> Tensor:
        return torch.rand(batch, n, generator=generator, device=device).topk(k).indices

    tokens = torch.randint(2 * KINDS, 3 * KINDS, (batch, length), generator=generator, device=device)
    keys = order(KINDS, facts)
    values = torch.randint(KINDS, 2 * KINDS, (batch, facts), generator=generator, device=device)
    at = 2 * order(body // 2, facts)  # pairs never overlap
    tokens.scatter_(1, at, keys)
    tokens.scatter_(1, at + 1, values)
    of = order(facts, QUESTIONS)
    asked = torch.arange(QUESTIONS, device=device) * 3 + body + 1
    answers = values.gather(1, of)
    tokens[:, asked - 1], tokens[:, asked], tokens[:, asked + 1] = ASK, keys.gather(1, of), answers
    return Stream(tokens, asked, answers)
