"""What tests of effects share: some made at random."""

import torch

from engine.questions.effects import Effects

N, P, L, H = 7, 2, 3, 4


def made(n=N, dtype=torch.float32, seed=0, **fields):
    random = torch.Generator().manual_seed(seed)
    patched = torch.randn(n, L, H, generator=random, dtype=dtype)
    return Effects(patched, torch.randn(n, generator=random, dtype=dtype), **fields)
