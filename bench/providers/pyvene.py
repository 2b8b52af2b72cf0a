"""pyvene as its users write it: an intervenable model with a function at every output projection, a forward a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.providers.provider import Prompt, Provider, mean_of, twin
from models import Model


class Pyvene(Provider):
    name = "pyvene"
    library = "pyvene"

    def __init__(self, hf: Any, model: Model):
        super().__init__(twin(hf), model)
        self._change: Any = None
        self.intervenable = self._intervenable()

    def _intervenable(self) -> Any:
        """Made once: its functions apply whatever change is asked for at the time."""
        import pyvene

        size = (self.hf.config.num_attention_heads, -1)

        def at(layer: int) -> Any:
            def intervention(base: Tensor, source: Any) -> Tensor:
                z = base.unflatten(-1, size).clone()  # [1, T, H, D]
                self._change(layer, z)
                return z.flatten(-2)

            return {"component": f"model.layers[{layer}].self_attn.o_proj.input", "intervention": intervention}

        return pyvene.IntervenableModel([at(layer) for layer in range(len(self.hf.model.layers))], model=self.hf)

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        rows = []
        for mask in heads.to(prompt.device):
            self._change = _set(mask, values.to(prompt.device, self.hf.dtype))
            _, out = self.intervenable({"input_ids": prompt[None]})
            rows.append(out.logits[0, -1].clone())
        return torch.stack(rows)

    def means(self, prompts: Tensor) -> Tensor:
        zs = []
        for ids in prompts:
            seen: list[Tensor] = []
            self._change = lambda layer, z, seen=seen: seen.append(z[0, -1])
            self.intervenable({"input_ids": ids[None]})
            zs.append(torch.stack(seen))
        return mean_of(zs)

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        answers = []
        for mask in heads.to(ids.device):
            self._change = _set(mask, values.to(ids.device, self.hf.dtype))
            _, out = self.intervenable.generate(
                {"input_ids": ids[None]}, intervene_on_prompt=True, max_new_tokens=new_tokens, do_sample=False
            )
            answers.append(out[0, len(ids) :])
        return torch.stack(answers)


def _set(mask: Tensor, values: Tensor) -> Any:
    def change(layer: int, z: Tensor) -> None:
        z[0, -1, mask[layer]] = values[layer, mask[layer]]

    return change
