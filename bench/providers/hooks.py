"""The loop everybody writes: plain transformers, a hook on every output projection, one forward a row.

It takes the logits of all tokens, as everybody's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.hooks import patched_logits
from bench.providers.provider import Prompt, Provider, mean_of

# change(layer, z) of z [batch, tokens, heads, head_dim], in place.
Change = Callable[[int, Tensor], None]


class Hooks(Provider):
    name = "hooks"

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        heads, values = heads.to(prompt.device), values.to(prompt.device, self.hf.dtype)
        return torch.stack([patched_logits(self.hf, projections(self.hf), prompt, mask, values) for mask in heads])

    def means(self, prompts: Tensor) -> Tensor:
        return mean_of([z for ids in prompts for z in last_z(self.hf, ids[None])])

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        return torch.cat([generate(self.hf, ids, mask[None], values, new_tokens) for mask in heads])


def projections(hf: Any) -> list[Any]:
    return [layer.self_attn.o_proj for layer in hf.model.layers]


def last_z(hf: Any, ids: Tensor) -> Tensor:
    """Z of the last token of each prompt: [batch, layers, heads, head_dim]."""
    zs: list[Tensor] = []
    with hooked(hf, lambda _, z: zs.append(z[:, -1])):
        hf(input_ids=ids)
    return torch.stack(zs, dim=1)


def generate(hf: Any, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
    """`hf.generate` of all rows at once: with its cache, the last token of every forward is the one to patch."""
    heads, values = heads.to(ids.device), values.to(ids.device, hf.dtype)

    def change(layer: int, z: Tensor) -> None:
        z[:, -1] = torch.where(heads[:, layer, :, None], values[layer], z[:, -1])

    prompts = ids.expand(len(heads), -1)
    with hooked(hf, change):
        out = hf.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
    return out[:, len(ids) :]


@contextmanager
def hooked(hf: Any, change: Change) -> Iterator[None]:
    """Within: `change` sees a copy of every layer's z, and the model goes on with it."""

    def hook(layer: int) -> Any:
        def pre(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone().unflatten(-1, (hf.config.num_attention_heads, -1))
            change(layer, z)
            return (z.flatten(-2), *args[1:])

        return pre

    handles = [p.register_forward_pre_hook(hook(layer)) for layer, p in enumerate(projections(hf))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
