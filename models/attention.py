"""What attention computes: of causal sequences, of rows behind a shared context, by whole matrices of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.interface import Edit, Site
from models.shapes import Bool, Float


@dataclass(frozen=True)
class Rule:
    """How a layer scores: scaled, then capped. Sinks: scores of a key that every query sees and that has no value."""

    scale: float
    softcap: float | None
    sinks: Float[Tensor, " heads"] | None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.capped((q * self.scale) @ k.mT)

    def capped(self, scores: Tensor) -> Tensor:
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def weights(self, scores: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Softmax at least in float32, as fused attention accumulates; float64 stays float64."""
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores).expand(*scores.shape[:-1], 1)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)
        return weights if sinks is None else weights[..., :-1]


def causal_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    rule: Rule,
    mask: Bool[Tensor, "tokens tokens"] | None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention of sequences that see nothing before them; without a mask all tokens up to their own."""
    n_tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    if rule.softcap is not None or rule.sinks is not None:  # fused attention knows of neither
        scores = rule.scores(q, k.repeat_interleave(group, dim=1))
        if mask is None:
            mask = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        sinks = None if rule.sinks is None else rule.sinks[:, None, None]
        return rule.weights(scores, sinks, v.dtype) @ v.repeat_interleave(group, dim=1)
    plain = mask is None and n_tokens > 1
    return scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=rule.scale, enable_gqa=group > 1)


def rows_attention(
    q: Float[Tensor, "rows heads tokens head_dim"],
    k: Float[Tensor, "kv_heads context head_dim"],
    v: Float[Tensor, "kv_heads context value_dim"],
    own_k: Float[Tensor, "rows kv_heads seen head_dim"],
    own_v: Float[Tensor, "rows kv_heads seen value_dim"],
    rule: Rule,
    mask: Bool[Tensor, "tokens keys"] | None,
    edits: Mapping[Site, Edit],
) -> Float[Tensor, "rows heads tokens value_dim"]:
    """softmax([q k^T | q own_k^T]) [v | own_v]: the context is one matrix for all rows and is never copied.

    Query heads that share a key/value head are folded into its rows: [Hkv, R*G*K, D] @ [Hkv, D, S].
    edits: of "scores" and "pattern", [rows, tokens, heads, keys].
    """
    n_context, n_tokens = k.shape[1], q.shape[2]
    alone = own_k.shape[2] == 1  # one token a row, the common case: products of single vectors are sums
    q = rearrange(q, "r (kv g) k d -> kv r (g k) d", kv=len(k))
    own_k, own_v = own_k.transpose(0, 1), own_v.transpose(0, 1)  # [Hkv, R, n_seen, D]
    seen = rule.scores(q.flatten(1, 2), k)  # [Hkv, R*G*K, S]
    own = rule.capped((q * own_k).sum(dim=-1, keepdim=True) * rule.scale) if alone else rule.scores(q, own_k)
    scores = torch.cat([seen, own.flatten(1, 2)], dim=-1)
    if mask is not None:
        scores = scores.unflatten(1, (-1, n_tokens)).masked_fill(~mask, float("-inf")).flatten(1, 2)
    by_token, folded = "kv (r g k) s -> r k (kv g) s", "r k (kv g) s -> kv (r g k) s"
    sizes = dict(kv=len(k), k=n_tokens, r=q.shape[1])
    if "scores" in edits:
        scores = rearrange(
            edited_scores(edits["scores"], rearrange(scores, by_token, **sizes), rule.sinks), folded, **sizes
        )
    sinks = None
    if rule.sinks is not None:  # [H] -> [Hkv, R*G*K, 1]
        sinks = rule.sinks.view(len(k), 1, -1, 1).expand(-1, q.shape[1], -1, n_tokens).flatten(1)[..., None]
    weights = rule.weights(scores, sinks, v.dtype)
    if "pattern" in edits:
        weights = rearrange(edits["pattern"](rearrange(weights, by_token, **sizes)), folded, **sizes)
    by_context = torch.bmm(weights[..., :n_context], v).unflatten(1, q.shape[1:3])  # [Hkv, R, G*K, D]
    by_own = weights[..., n_context:].unflatten(1, q.shape[1:3])
    z = by_context + (by_own * own_v if alone else by_own @ own_v)
    return rearrange(z, "kv r (g k) d -> r (kv g) k d", k=n_tokens)


def plain_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    rule: Rule,
    mask: Tensor | None,
    edits: Mapping[Site, Edit],
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """By whole matrices of scores [batch, heads, tokens, keys]; mask: what is seen, or what is added to the scores."""
    group = q.shape[1] // k.shape[1]
    scores = rule.scores(q, k.repeat_interleave(group, dim=1))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if "scores" in edits:
        scores = edited_scores(edits["scores"], scores.transpose(1, 2), rule.sinks).transpose(1, 2)
    weights = rule.weights(scores, None if rule.sinks is None else rule.sinks[:, None, None], v.dtype)
    if "pattern" in edits:
        weights = edits["pattern"](weights.transpose(1, 2).clone()).transpose(1, 2)
    return weights @ v.repeat_interleave(group, dim=1)


def edited_scores(
    edit: Edit, scores: Float[Tensor, "rows tokens heads keys"], sinks: Any
) -> Float[Tensor, "rows tokens heads keys"]:
    """What is not seen stays so, whatever an edit makes of it; eager masks add the least number, not -inf."""
    unseen = scores <= torch.finfo(scores.dtype).min / 2
    found = edit(scores.clone()).masked_fill(unseen, float("-inf"))
    if sinks is None and (found == float("-inf")).all(dim=-1).any():
        raise ValueError("a knockout leaves a token nothing to attend to, in a layer that sees no further back")
    return found
