"""Packed rows by a dense mask, for models that compute attention themselves but honour a 4-D mask and a cache.

The sequence is that of `models.packed`, [contexts to compute | rows]. Before it, in transformers' cache, stand the keys
[contexts at hand | the rows' own earlier tokens]. One mask says who sees whom; nothing is computed twice, but every
query is scored against every key: meant for sequences of hundreds or a few thousand tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.interface import KeyValues
from models.layout import Layout
from models.shapes import Bool, Float, Int

CONTEXT = -1  # in the place of a row
# Attentions that are their own: a mask would not say all that they do.
UNKNOWN = ("attention_types", "attention_layers", "attention_chunk_size", "local_attention", "attn_layer_period")


@dataclass(frozen=True)
class Where:
    """Of each token: its segment, its row (-1 in the context), and how many tokens its row has before it."""

    segment: Int[Tensor, " tokens"]
    row: Int[Tensor, " tokens"]
    place: Int[Tensor, " tokens"]

    def __add__(self, other: Where) -> Where:
        """First these, then those."""
        parts = ((self.segment, other.segment), (self.row, other.row), (self.place, other.place))
        return Where(*(torch.cat(part) for part in parts))


def find(layout: Layout, device: torch.device) -> tuple[Where, Where]:
    """The tokens of the sequence, and those whose keys stand in the cache before it."""
    queries, cached = nowhere(device), nowhere(device)
    for index, segment in enumerate(layout.segments):
        context = block(index, 1, CONTEXT, 0, segment.n_context, device)
        if segment.n_computed:
            queries += context
        else:
            cached += context
    for index, segment in enumerate(layout.segments):
        cached += block(index, layout.n_rows, 0, segment.n_context, segment.n_past, device)
        queries += block(index, layout.n_rows, 0, segment.n_context + segment.n_past, layout.n_tokens, device)
    return queries, cached


def nowhere(device: torch.device) -> Where:
    return block(0, 0, 0, 0, 0, device)


def block(segment: int, n_rows: int, row: int, place: int, n_tokens: int, device: torch.device) -> Where:
    """`n_rows` rows of a segment, from `row` on, each of `n_tokens` tokens from `place` on."""
    rows = torch.arange(row, row + n_rows, device=device).repeat_interleave(n_tokens)
    places = torch.arange(place, place + n_tokens, device=device).repeat(n_rows)
    return Where(torch.full_like(rows, segment), rows, places)


def sees(queries: Where, keys: Where, window: int | None = None) -> Bool[Tensor, "queries keys"]:
    """Same segment; key in the context or in the same row; not ahead; and no further back than the window."""
    mine = (keys.row == CONTEXT) | (queries.row[:, None] == keys.row)
    back = queries.place[:, None] - keys.place
    seen = (queries.segment[:, None] == keys.segment) & mine & (back >= 0)
    return seen if window is None else seen & (back < window)


def additive(seen: Bool[Tensor, "queries keys"], dtype: torch.dtype) -> Float[Tensor, "1 1 queries keys"]:
    """As transformers adds it to the scores."""
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return hidden.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def masks(layout: Layout, config: Any, dtype: torch.dtype, device: torch.device) -> Tensor | dict[str, Tensor]:
    """One mask, or one for each kind of layer, as transformers takes them where kinds differ."""
    queries, cached = find(layout, device)
    keys = cached + queries
    each = {kind: additive(sees(queries, keys, window), dtype) for kind, window in windows(config).items()}
    return each if len(each) > 1 else next(iter(each.values()))


def windows(config: Any) -> dict[str, int | None]:
    """How far back each kind of layer sees; None: to the beginning."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def why_not_dense(config: Any) -> str:
    """Why a mask would not make packed rows exact; empty if it does."""
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}, which packed rows do not follow"
    if own := [name for name in UNKNOWN if getattr(config, name, None)]:
        return f"its config sets {own[0]}, which packed rows do not follow"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its attention counts distances (ALiBi) by the place in the sequence, where packed rows stand apart"
    return ""


def fill(layout: Layout) -> Any:
    """Transformers' cache of what stands before the sequence; without a config it keeps every token of every layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    parts = list(_before(layout))
    for layer in range(len(parts[0].keys) if parts else 0):
        keys = torch.cat([part.keys[layer] for part in parts], dim=1)
        values = torch.cat([part.values[layer] for part in parts], dim=1)
        cache.update(keys[None], values[None], layer)
    return cache


def _before(layout: Layout) -> Iterator[KeyValues]:
    """What `find` calls cached, in the same order, each [kv_heads, tokens, head_dim]."""
    yield from (s.context for s in layout.segments if isinstance(s.context, KeyValues) and len(s.context))
    for segment in layout.segments:
        if segment.past is not None and len(segment.past):
            flat = [[x.transpose(0, 1).flatten(1, 2) for x in xs] for xs in (segment.past.keys, segment.past.values)]
            yield KeyValues(flat[0], flat[1])


def keep(layout: Layout, cache: Any) -> None:
    """Read the computed contexts and the rows off the cache into the layout; copies, which free the sequence."""
    n_computed = layout.first_row + len(layout.segments) * layout.n_rows * layout.n_tokens
    for layer in cache.layers:
        k, v = (x[0, :, x.shape[2] - n_computed :] for x in (layer.keys, layer.values))
        start, row = 0, layout.first_row
        for index, segment in enumerate(layout.segments):
            if segment.n_computed:
                here = slice(start, start + segment.n_computed)
                start = here.stop
                layout.contexts[index].keys.append(k[:, here].clone())
                layout.contexts[index].values.append(v[:, here].clone())
            if layout.n_rows:
                here = slice(row, row + layout.n_rows * layout.n_tokens)
                row = here.stop
                split = (layout.n_rows, layout.n_tokens)
                own = [x[:, here].unflatten(1, split).transpose(0, 1) for x in (k, v)]
                if segment.past is not None:
                    at = len(layout.own[index].keys)
                    before = (segment.past.keys[at], segment.past.values[at])
                    own = [torch.cat(pair, dim=2) for pair in zip(before, own, strict=True)]
                layout.own[index].keys.append(own[0].contiguous())
                layout.own[index].values.append(own[1].contiguous())
