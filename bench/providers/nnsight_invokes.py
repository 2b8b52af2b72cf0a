"""nnsight with 32 invokes in one trace: the library batches them into one forward."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.providers.nnsight import NNsight
from bench.providers.provider import BATCH, Prompt, mean_of


class NNsightInvokes(NNsight):
    name = "nnsight-invokes"

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        import nnsight

        nn, size = self.nn, tuple(values.shape[1:])
        heads, values = heads.to(prompt.device), values.to(prompt.device, self.hf.dtype)
        logits = []
        for some in heads.split(BATCH):
            with nn.trace() as tracer:
                rows = nnsight.save([])
                for mask in some:
                    with tracer.invoke(prompt[None]):
                        for index, layer in enumerate(nn.model.layers):
                            z = layer.self_attn.o_proj.input.unflatten(-1, size)
                            z[0, -1, mask[index]] = values[index, mask[index]]
                        rows.append(nn.lm_head.output[0, -1].clone())
            logits += rows
        return torch.stack(logits)

    def means(self, prompts: Tensor) -> Tensor:
        import nnsight

        nn, n_heads = self.nn, self.hf.config.num_attention_heads
        zs = []
        for some in prompts.split(BATCH):
            with nn.trace() as tracer:
                found = nnsight.save([])
                for ids in some:
                    with tracer.invoke(ids[None]):
                        found.append(torch.stack([layer.self_attn.o_proj.input[0, -1] for layer in nn.model.layers]))
            zs += [z.unflatten(-1, (n_heads, -1)) for z in found]
        return mean_of(zs)

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        nn, size = self.nn, tuple(values.shape[1:])
        heads, values = heads.to(ids.device), values.to(ids.device, self.hf.dtype)
        answers = []
        for some in heads.split(BATCH):
            with nn.generate(max_new_tokens=new_tokens, do_sample=False) as tracer:
                for mask in some:
                    with tracer.invoke(ids[None]):
                        for _ in tracer.iter[0:new_tokens]:
                            for index, layer in enumerate(nn.model.layers):
                                z = layer.self_attn.o_proj.input.unflatten(-1, size)
                                z[0, -1, mask[index]] = values[index, mask[index]]
                with tracer.invoke():
                    out = tracer.result.save()
            answers.append(out[:, len(ids) :])
        return torch.cat(answers)

    def at_once(self, case: str, rows: int) -> int:
        return min(rows, BATCH)
