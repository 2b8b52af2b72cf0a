"""Decoders written out from their modules, a receiver at a time: the oracle of edges, which knows no engine.

A run is given a function of (receiver, what it would be given, what all senders before it gave); what it returns is
what the receiver is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as rotate_part
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate

from tests import plain

Given = Callable[[str, Tensor, dict[str, Tensor]], Tensor]


def unchanged(receiver: str, x: Tensor, senders: dict[str, Tensor]) -> Tensor:
    return x


class Hand:
    """A tiny llama, gpt2 or gpt_neox in float64, of which heads are computed alone."""

    def __init__(self, family: str):
        self.hf = plain.made(family, torch.float64)
        self.family, self.config = family, self.hf.config
        self.layers = self.config.num_hidden_layers
        self.heads = self.config.num_attention_heads
        self.kv_heads = getattr(self.config, "num_key_value_heads", None) or self.heads
        body = {"llama": "model", "gpt2": "transformer", "gpt_neox": "gpt_neox"}[family]
        self.body: Any = self.hf.get_submodule(body)
        self.blocks: Any = self.body.h if family == "gpt2" else self.body.layers
        self.parallel = family == "gpt_neox"

    def embedding(self, ids: Tensor) -> Tensor:
        if self.family == "gpt2":
            return self.body.wte(ids) + self.body.wpe(torch.arange(len(ids)))
        return (self.body.embed_in if self.family == "gpt_neox" else self.body.embed_tokens)(ids)

    def made(self, site: str, layer: int, head: int, x: Tensor) -> Tensor:
        """Query, key or value of one head, [tokens, head_dim], of what it is given."""
        block, at = self.blocks[layer], "qkv".index(site)
        if self.family == "llama":
            attention = block.self_attn
            x = (attention.q_proj, attention.k_proj, attention.v_proj)[at](block.input_layernorm(x))
            x = x.unflatten(-1, (-1, attention.head_dim))
        elif self.family == "gpt2":
            x = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)[at].unflatten(-1, (self.heads, -1))
        else:
            x = block.attention.query_key_value(block.input_layernorm(x)).unflatten(-1, (self.heads, -1))
            x = x.chunk(3, dim=-1)[at]
        x = x[:, head]
        if site == "v" or self.family == "gpt2":
            return x
        cos, sin = self.body.rotary_emb(x[None], torch.arange(len(x))[None])
        return (rotate if self.family == "llama" else rotate_part)(x[None, None], x[None, None], cos, sin)[0][0, 0]

    def attended(self, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the head adds to the residual stream, [tokens, d_model], without the bias."""
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~torch.ones(len(q), len(q)).tril().bool(), -torch.inf)
        z, own = scores.softmax(dim=-1) @ v, slice(head * q.shape[-1], (head + 1) * q.shape[-1])
        w_o = self.w_o(layer)
        return z @ (w_o.weight[own] if self.family == "gpt2" else w_o.weight[:, own].T)

    def w_o(self, layer: int) -> Any:
        return self.blocks[layer].get_submodule(plain.LAYOUTS[self.family].w_o)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.blocks[layer]
        return block.mlp((block.ln_2 if self.family == "gpt2" else block.post_attention_layernorm)(x))

    def logits(self, x: Tensor) -> Tensor:
        """Of the last token."""
        norm = {"llama": "norm", "gpt2": "ln_f", "gpt_neox": "final_layer_norm"}[self.family]
        return self.hf.get_output_embeddings()(self.body.get_submodule(norm)(x[-1]))

    def run(self, ids: Any, given: Given = unchanged) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [vocab], and what each sender gave [tokens, d_model]. ids: of tokens, or their embedding."""
        ids = torch.as_tensor(ids)
        senders: dict[str, Tensor] = {"input": ids if ids.is_floating_point() else self.embedding(ids)}
        bias = torch.zeros_like(senders["input"])  # of the W_O so far

        def to(receiver: str) -> Tensor:
            return given(receiver, sum(senders.values()) + bias, dict(senders))

        for layer in range(self.layers):
            group = self.heads // self.kv_heads
            k, v = (
                [self.made(site, layer, h, to(f"a{layer}.h{h}<{site}>")) for h in range(self.kv_heads)] for site in "kv"
            )
            q = [self.made("q", layer, h, to(f"a{layer}.h{h}<q>")) for h in range(self.heads)]
            new = {
                f"a{layer}.h{h}": self.attended(layer, h, q[h], k[h // group], v[h // group]) for h in range(self.heads)
            }
            b = self.w_o(layer).bias
            if self.parallel:
                new[f"m{layer}"] = self.mlp(layer, to(f"m{layer}"))
                senders |= new
                bias = bias if b is None else bias + b
            else:
                senders |= new
                bias = bias if b is None else bias + b
                senders[f"m{layer}"] = self.mlp(layer, to(f"m{layer}"))
        return self.logits(to("logits")), senders


def circuit(hand: Hand, ids: Any, source: Any, removed: set[str]) -> Tensor:
    """Logits where these edges carry what they carry in the source."""
    there = hand.run(source)[1]

    def given(receiver: str, x: Tensor, senders: dict[str, Tensor]) -> Tensor:
        return x + sum(
            (there[u] - out for u, out in senders.items() if f"{u}->{receiver}" in removed), torch.zeros_like(x)
        )

    return hand.run(ids, given)[0]
