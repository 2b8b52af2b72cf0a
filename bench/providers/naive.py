"""The oracle: `engine.naive`, one hooked forward of ours a row (same fast linear layers, logits of the last token)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import engine
from bench.providers.provider import Prompt, Provider, mean_of
from models import Model


class Naive(Provider):
    name = "naive"
    all_logits = False

    def __init__(self, hf: Any, model: Model):
        super().__init__(hf, model)
        self.counted = model.projections  # type: ignore[attr-defined]  # of the backend that is measured

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        return engine.naive.patch(self.model, prompt, heads=heads, values=values)

    def means(self, prompts: Tensor) -> Tensor:
        zs = []
        for ids in prompts:
            seen: list[Tensor] = []

            def keep(z: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(z[0, -1])
                return z

            self.model.forward(ids[None], {"z": dict.fromkeys(range(self.model.shape.n_layers), keep)})
            zs.append(torch.stack(seen))
        return mean_of(zs)

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        return generate(self.model, ids, heads, values, new_tokens, "naive")


def generate(model: Model, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int, strategy: Any) -> Tensor:
    """`engine.generate`, its texts (numbers) read back as ids."""
    options: dict[str, Any] = dict(heads=heads, values=values, max_new_tokens=new_tokens, strategy=strategy)
    answers = engine.generate(model, ids, patched="all", **options)
    texts: Any = [answers] if isinstance(answers, str) else answers  # of one prompt: a text, or one a row
    return torch.tensor([[int(token) for token in text.split()] for text in texts], device=ids.device)
