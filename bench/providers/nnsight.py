"""nnsight as its users write it: a trace a row, heads set at the input of every output projection. All logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.providers.provider import Prompt, Provider, mean_of, twin
from models import Model
from models.zoo import tiny_tokenizer


class NNsight(Provider):
    name = "nnsight"
    library = "nnsight"

    def __init__(self, hf: Any, model: Model):
        import nnsight

        super().__init__(twin(hf), model)
        # It asks for a tokenizer; ids are what it is given.
        self.nn = nnsight.TransformersModel(self.hf, tokenizer=tiny_tokenizer(), task="text-generation")

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        nn, size = self.nn, tuple(values.shape[1:])
        heads, values = heads.to(prompt.device), values.to(prompt.device, self.hf.dtype)
        rows = []
        for mask in heads:
            with nn.trace(prompt[None]):
                for index, layer in enumerate(nn.model.layers):
                    z = layer.self_attn.o_proj.input.unflatten(-1, size)  # a view [1, T, H, D]
                    z[0, -1, mask[index]] = values[index, mask[index]]
                logits = nn.lm_head.output[0, -1].clone().save()
            rows.append(logits)
        return torch.stack(rows)

    def means(self, prompts: Tensor) -> Tensor:
        import nnsight

        nn, n_heads = self.nn, self.hf.config.num_attention_heads
        zs = []
        for ids in prompts:
            with nn.trace(ids[None]):
                z = nnsight.save(torch.stack([layer.self_attn.o_proj.input[0, -1] for layer in nn.model.layers]))
            zs.append(z.unflatten(-1, (n_heads, -1)))
        return mean_of(zs)

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        nn, size = self.nn, tuple(values.shape[1:])
        heads, values = heads.to(ids.device), values.to(ids.device, self.hf.dtype)
        answers = []
        for mask in heads:
            with nn.generate(ids[None], max_new_tokens=new_tokens, do_sample=False) as tracer:
                for _ in tracer.iter[0:new_tokens]:
                    for index, layer in enumerate(nn.model.layers):
                        z = layer.self_attn.o_proj.input.unflatten(-1, size)
                        z[0, -1, mask[index]] = values[index, mask[index]]
                out = tracer.result.save()
            answers.append(out[0, len(ids) :])
        return torch.stack(answers)
