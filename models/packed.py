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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.interface import KeyValues, Segment
from models.shapes import Float, Int

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
        starts = [s.n_context + s.n_past for s in self.segments]
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


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads sequence head_dim"],
    key: Float[Tensor, "1 kv_heads sequence head_dim"],
    value: Float[Tensor, "1 kv_heads sequence head_dim"],
    attention_mask: None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 sequence heads head_dim"], None]:
    layout = _layout.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
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
                contexts.append(_causal(query[:, :, here], k[None], v[None], scale).transpose(1, 2))
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
            z = _rows(q, k, v, own_k, own_v, scale)
        else:
            z = _causal(q, own_k, own_v, scale)
        rows.append(z.transpose(1, 2).flatten(0, 1)[None])  # [1, R*K, H, D]
    return torch.cat([*contexts, *rows], dim=1), None


def _causal(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens head_dim"],
    scale: float,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=grouped)


def _rows(
    q: Float[Tensor, "rows heads tokens head_dim"],
    k: Float[Tensor, "kv_heads context head_dim"],
    v: Float[Tensor, "kv_heads context head_dim"],
    own_k: Float[Tensor, "rows kv_heads seen head_dim"],
    own_v: Float[Tensor, "rows kv_heads seen head_dim"],
    scale: float,
) -> Float[Tensor, "rows heads tokens head_dim"]:
    """softmax([q k^T | q own_k^T]) [v | own_v]: the context is one matrix for all rows and is never copied.

    Query heads that share a key/value head are folded into its rows: [Hkv, R*G*K, D] @ [Hkv, D, S].
    """
    n_rows, n_heads, n_tokens, _ = q.shape
    n_kv, n_context, n_seen = k.shape[0], k.shape[1], own_k.shape[2]
    group = n_heads // n_kv
    q = (q * scale).unflatten(1, (n_kv, group)).flatten(2, 3)  # [R, Hkv, G*K, D]
    folded = q.transpose(0, 1).flatten(1, 2)  # [Hkv, R*G*K, D]
    seen = folded @ k.transpose(1, 2)  # [Hkv, R*G*K, S]
    own = q @ own_k.transpose(2, 3)  # [R, Hkv, G*K, n_seen]
    if n_tokens > 1:  # token i of a row sees its own tokens up to i
        future = torch.ones(n_tokens, n_seen, dtype=torch.bool, device=q.device).triu(n_seen - n_tokens + 1)
        own = own.masked_fill(future.repeat(group, 1), float("-inf"))
    own = own.transpose(0, 1).flatten(1, 2)  # [Hkv, R*G*K, n_seen]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    weights = torch.cat([seen, own], dim=-1).softmax(dim=-1, dtype=accumulate).to(v.dtype)
    z = (weights[..., :n_context] @ v).unflatten(1, (n_rows, -1)).transpose(0, 1)  # [R, Hkv, G*K, D]
    own = weights[..., n_context:].unflatten(1, (n_rows, -1)).transpose(0, 1)  # [R, Hkv, G*K, n_seen]
    return (z + own @ own_v).unflatten(2, (group, n_tokens)).flatten(1, 2)
