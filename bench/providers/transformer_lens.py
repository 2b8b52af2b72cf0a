"""TransformerLens as its users write it: a `TransformerBridge`, `run_with_hooks` at hook_z, one forward a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.providers.provider import Prompt, Provider, mean_of, twin
from models import Model


class TransformerLens(Provider):
    name = "transformer_lens"
    library = "transformer_lens"
    eager = True

    def __init__(self, hf: Any, model: Model):
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        own = twin(hf)
        super().__init__(own, model)  # the counted layer is found before the bridge rewires the modules
        self.bridge = build_bridge_from_module(own, type(own).__name__, hf_config=own.config, tokenizer=None)

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        heads, values = heads.to(prompt.device), values.to(prompt.device, self.bridge.cfg.dtype)
        rows = []
        for mask in heads:
            logits = self.bridge.run_with_hooks(prompt[None], fwd_hooks=_hooks(mask, values))
            rows.append(logits[0, -1].clone())  # a view would keep the logits of all tokens
        return torch.stack(rows)

    def means(self, prompts: Tensor) -> Tensor:
        zs = []
        for ids in prompts:
            _, cache = self.bridge.run_with_cache(ids[None], names_filter=lambda name: name.endswith("hook_z"))
            zs.append(torch.stack([z[0, -1] for z in cache.values()]))
        return mean_of(zs)

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        heads, values = heads.to(ids.device), values.to(ids.device, self.bridge.cfg.dtype)
        options: dict[str, Any] = dict(max_new_tokens=new_tokens, do_sample=False, stop_at_eos=False)
        answers = []
        for mask in heads:
            with self.bridge.hooks(fwd_hooks=_hooks(mask, values)):
                out = self.bridge.generate(ids[None], return_type="tokens", prepend_bos=False, verbose=False, **options)
            answers.append(out[0, len(ids) :])
        return torch.stack(answers)


def _hooks(mask: Tensor, values: Tensor) -> list[tuple[str, Any]]:
    def patch(z: Tensor, hook: Any) -> Tensor:
        layer = hook.layer()
        z[0, -1, mask[layer]] = values[layer, mask[layer]]  # z [1, T, H, D]
        return z

    return [(f"blocks.{layer}.attn.hook_z", patch) for layer in range(len(mask))]
