"""The same hooks on a batch: 32 copies of the prompt, each with its own heads, in one forward. All logits, too."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.providers.hooks import generate, hooked, last_z
from bench.providers.provider import BATCH, Prompt, Provider, mean_of


class HooksBatch(Provider):
    name = "hooks-batch"

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        heads, values = heads.to(prompt.device), values.to(prompt.device, self.hf.dtype)
        return torch.cat([self._patch(prompt, some, values) for some in heads.split(BATCH)])

    def _patch(self, ids: Tensor, heads: Tensor, values: Tensor) -> Tensor:
        def change(layer: int, z: Tensor) -> None:
            z[:, -1] = torch.where(heads[:, layer, :, None], values[layer], z[:, -1])

        with hooked(self.hf, change):
            return self.hf(input_ids=ids.expand(len(heads), -1)).logits[:, -1]

    def means(self, prompts: Tensor) -> Tensor:
        return mean_of([z for some in prompts.split(BATCH) for z in last_z(self.hf, some)])

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        return torch.cat([generate(self.hf, ids, some, values, new_tokens) for some in heads.split(BATCH)])

    def at_once(self, case: str, rows: int) -> int:
        return min(rows, BATCH)
