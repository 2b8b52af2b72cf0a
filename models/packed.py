"""Attention of packed rows: many variants of a prompt's end in one sequence, the prompt itself computed once.

The sequence is [contexts of all segments | rows of all segments], one batch entry. Linear layers do not notice;
attention is where the tokens are kept apart:

    context token i of a segment sees context tokens j <= i                      (plain causal attention)
    token i of row r             sees the whole context and tokens j <= i of r   (one softmax over both parts)

The function below is registered with transformers' attention interface, so that the model's own code computes
queries, keys and values (with its rotary positions, biases, norms) and the output projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.interface import KeyValues, Segment
from models.shapes import Bool, Float, Int

NAME = "headpatch_packed"


class Layout:
    """Where each token of a packed sequence lies, and the keys and values kept on the way."""

    def __init__(self, segments: Sequence[Segment], keep: bool):
        self.segments = segments
        self.keep = keep
        self.n_rows, self.n_tokens = segments[0].rows.shape
        self.first_row = sum(segment.n_computed for segment in segments)
        self.contexts = [s.context if isinstance(s.context, KeyValues) else KeyValues() for s in segments]
        self.rows = [KeyValues() for _ in segments]

    def tokens(self) -> Int[Tensor, "1 sequence"]:
        contexts = [s.context for s in self.segments if isinstance(s.context, Tensor)]
        return torch.cat([*contexts, *(s.rows.flatten() for s in self.segments)])[None]

    def positions(self, device: torch.device) -> Int[Tensor, "1 sequence"]:
        """Rows continue their context: all rows of a segment stand at the same positions."""
        contexts = [torch.arange(s.n_computed, device=device) for s in self.segments]
        starts = [s.position for s in self.segments]
        rows = [torch.arange(i, i + self.n_tokens, device=device).repeat(self.n_rows) for i in starts]
        return torch.cat([*contexts, *rows])[None]

    def last_tokens(self, device: torch.device) -> Int[Tensor, " rows"]:
        """Index in the sequence of the last token of every row."""
        count = len(self.segments) * self.n_rows
        return self.first_row + self.n_tokens * torch.arange(1, count + 1, device=device) - 1


_layout: ContextVar[Layout] = ContextVar("headpatch_layout")


@contextmanager
def packed_attention(config: Any, layout: Layout) -> Iterator[None]:
    """Within: the modules that read `config` attend by `layout`. After: the config is as it was."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    token, before = _layout.set(layout), config._attn_implementation_internal
    try:
        # The internal name: the public setter would also reach the configs of other towers.
        config._attn_implementation_internal = NAME
        yield
    finally:
        config._attn_implementation_internal = before
        _layout.reset(token)


@dataclass(frozen=True)
class Rule:
    """How a layer scores: query i sees keys j <= i and i - j < window; scores are scaled, then capped."""

    scale: float
    window: int | None
    softcap: float | None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = (q * self.scale) @ k.mT
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def sees(self, n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
        """Of the last `n_queries` of `n_keys` tokens."""
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)
        return mask if self.window is None else mask.triu(n_keys - n_queries + 1 - self.window)


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads sequence head_dim"],
    key: Float[Tensor, "1 kv_heads sequence head_dim"],
    value: Float[Tensor, "1 kv_heads sequence head_dim"],
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 sequence heads head_dim"], None]:
    layout = _layout.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    contexts, rows = [], []
    start, row = 0, layout.first_row
    for index, segment in enumerate(layout.segments):
        if isinstance(segment.context, KeyValues):
            k, v = segment.context.keys[layer], segment.context.values[layer]
        else:
            here = slice(start, start + segment.n_computed)
            start = here.stop
            k, v = key[0, :, here], value[0, :, here]
            if segment.n_computed:
                contexts.append(_causal(query[:, :, here], k[None], v[None], rule).transpose(1, 2))
            if layout.keep:
                # Copies: a slice of the packed sequence would keep all of it, the rows too, in memory.
                layout.contexts[index].keys.append(k.clone())
                layout.contexts[index].values.append(v.clone())
        if not layout.n_rows:
            continue

        here = slice(row, row + layout.n_rows * layout.n_tokens)
        row = here.stop
        split = (layout.n_rows, layout.n_tokens)
        q = query[0, :, here].unflatten(1, split).transpose(0, 1)  # [R, H, K, D]
        own_k = key[0, :, here].unflatten(1, split).transpose(0, 1)  # [R, Hkv, K, D]
        own_v = value[0, :, here].unflatten(1, split).transpose(0, 1)
        if segment.past is not None:
            own_k = torch.cat([segment.past.keys[layer], own_k], dim=2)
            own_v = torch.cat([segment.past.values[layer], own_v], dim=2)
        if layout.keep:
            layout.rows[index].keys.append(own_k)
            layout.rows[index].values.append(own_v)
        if segment.n_context or segment.past is not None:
            z = _rows(q, k, v, own_k, own_v, rule)
        else:
            z = _causal(q, own_k, own_v, rule)
        rows.append(z.transpose(1, 2).flatten(0, 1)[None])  # [1, R*K, H, D]
    return torch.cat([*contexts, *rows], dim=1), None


def _causal(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens head_dim"],
    rule: Rule,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Plain causal attention of sequences that see nothing before them."""
    n_tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    if rule.softcap is not None:  # no fused attention caps scores
        scores = rule.scores(q, k.repeat_interleave(group, dim=1))
        scores = scores.masked_fill(~rule.sees(n_tokens, n_tokens, q.device), float("-inf"))
        return _softmax(scores, v.dtype) @ v.repeat_interleave(group, dim=1)
    short = rule.window is None or n_tokens <= rule.window
    mask = None if short else rule.sees(n_tokens, n_tokens, q.device)
    causal = short and n_tokens > 1
    return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=rule.scale, enable_gqa=group > 1)


def _rows(
    q: Float[Tensor, "rows heads tokens head_dim"],
    k: Float[Tensor, "kv_heads context head_dim"],
    v: Float[Tensor, "kv_heads context head_dim"],
    own_k: Float[Tensor, "rows kv_heads seen head_dim"],
    own_v: Float[Tensor, "rows kv_heads seen head_dim"],
    rule: Rule,
) -> Float[Tensor, "rows heads tokens head_dim"]:
    """softmax([q k^T | q own_k^T]) [v | own_v]: the context is one matrix for all rows and is never copied.

    Query heads that share a key/value head are folded into its rows: [Hkv, R*G*K, D] @ [Hkv, D, S].
    """
    n_tokens, n_seen = q.shape[2], own_k.shape[2]
    if rule.window is not None:  # what the first of the tokens no longer sees, none does
        out_of_sight = max(0, k.shape[1] + n_seen - n_tokens + 1 - rule.window)
        k, v = k[:, out_of_sight:], v[:, out_of_sight:]
    n_context = k.shape[1]
    sizes = {"kv": k.shape[0], "k": n_tokens}
    q = rearrange(q, "r (kv g) k d -> r kv (g k) d", **sizes)
    seen = rule.scores(rearrange(q, "r kv gk d -> kv (r gk) d"), k)  # [Hkv, R*G*K, S]
    own = rule.scores(q, own_k)  # [R, Hkv, G*K, n_seen]
    scores = torch.cat([seen, rearrange(own, "r kv gk s -> kv (r gk) s")], dim=-1)
    # Token i of a row sees its own tokens up to i, and no further back than the window.
    if n_tokens > 1 or (rule.window is not None and n_seen > rule.window):
        hidden = ~rule.sees(n_tokens, n_context + n_seen, q.device)
        scores = scores.masked_fill(hidden.repeat(scores.shape[1] // n_tokens, 1), float("-inf"))
    weights = _softmax(scores, v.dtype)
    by_context, by_own = weights[..., :n_context], weights[..., n_context:]
    z = rearrange(by_context @ v, "kv (r gk) d -> r kv gk d", r=len(q))
    z = z + rearrange(by_own, "kv (r gk) s -> r kv gk s", r=len(q)) @ own_v
    return rearrange(z, "r kv (g k) d -> r (kv g) k d", **sizes)


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """At least in float32, as fused attention accumulates; float64 stays float64."""
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)
