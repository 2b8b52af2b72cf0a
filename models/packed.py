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

    def __init__(self, segments: Sequence[Segment], keep: bool, last_layer: int | None = None):
        self.segments = segments
        self.keep = keep
        self.last_layer = last_layer  # after it, nothing reads the contexts
        self.n_rows, self.n_tokens = segments[0].rows.shape
        self.first_row = sum(segment.n_computed for segment in segments)
        self.entry = segments[0].entry
        self.contexts = [s.context if isinstance(s.context, KeyValues) else KeyValues() for s in segments]
        self.rows = [KeyValues() for _ in segments]
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def tokens(self) -> Int[Tensor, "1 sequence"]:
        contexts = [s.context for s in self.segments if isinstance(s.context, Tensor)]
        return torch.cat([*contexts, *(s.rows.flatten() for s in self.segments)])[None]

    def positions(self, device: torch.device) -> Int[Tensor, "1 sequence"]:
        """Rows continue their context: all rows of a segment stand at the same positions."""
        contexts = [torch.arange(s.n_computed, device=device) for s in self.segments]
        starts = [s.position for s in self.segments]
        rows = [(start + torch.arange(self.n_tokens, device=device)).repeat(self.n_rows) for start in starts]
        return torch.cat([*contexts, *rows])[None]

    def last_tokens(self, device: torch.device) -> Int[Tensor, " rows"]:
        """Index in the sequence of the last token of every row."""
        count = len(self.segments) * self.n_rows
        return self.first_row + self.n_tokens * torch.arange(1, count + 1, device=device) - 1

    def mask(self, index: int, window: int | None, device: torch.device) -> Bool[Tensor, "tokens keys"] | None:
        """Which of the keys [context | own] each token of a row of this segment sees; None: all of them."""
        if (index, window) not in self._masks:
            segment = self.segments[index]
            n_seen = segment.n_past + self.n_tokens
            short = window is None or segment.n_context + n_seen <= window
            if self.n_tokens == 1 and segment.length is None and short:
                self._masks[index, window] = None
            else:
                self._masks[index, window] = rows_mask(segment, n_seen, self.n_tokens, window, device)
        return self._masks[index, window]


def rows_mask(
    segment: Segment, n_seen: int, n_tokens: int, window: int | None, device: torch.device
) -> Bool[Tensor, "tokens keys"]:
    """A row's tokens, the last of the `n_seen` that are its own, see the context and themselves, never ahead, and no
    further back than the window.
    """
    length = segment.n_context if segment.length is None else segment.length
    context = torch.arange(segment.n_context, device=device)
    own = length + torch.arange(n_seen, device=device)
    back = own[n_seen - n_tokens :, None] - torch.cat([context, own])  # [K, S + n_seen]
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    if segment.length is not None:
        seen[:, : segment.n_context] &= context < length
    return seen


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


@contextmanager
def entering(blocks: Sequence[nn.Module], layout: Layout) -> Iterator[None]:
    """Within: rows of a segment with `entry` stay out of the blocks before theirs; `layout.n_rows` counts those in.

    The embedding and what follows the last block see all of them. What else a block is given token by token (positions,
    rotary tables) is cut to the rows that are in.
    """
    whole = layout.first_row + layout.n_rows * layout.n_tokens
    first = slice(layout.first_row, layout.first_row + layout.n_tokens)

    def cut(x: Any, length: int) -> Any:
        if isinstance(x, tuple):
            return tuple(cut(part, length) for part in x)
        if not isinstance(x, Tensor) or 1 not in x.shape[:-1]:
            return x
        dim = x.shape.index(1) + 1  # [.., 1, tokens, ..]: tokens follow the batch
        return x.narrow(dim, 0, length) if x.shape[dim] == whole else x

    def enter(n_rows: int) -> Any:
        length = layout.first_row + n_rows * layout.n_tokens

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            layout.n_rows = n_rows
            hidden = args[0] if args else kwargs["hidden_states"]  # [1, tokens, d_model]
            new = (length - hidden.shape[1]) // layout.n_tokens
            if new > 0:
                hidden = torch.cat([hidden, hidden[:, first].repeat(1, new, 1)], dim=1)
            hidden = hidden[:, :length]
            others = {key: cut(x, length) for key, x in kwargs.items() if key != "hidden_states"}
            if not args:
                return (), {"hidden_states": hidden, **others}
            return (hidden, *(cut(x, length) for x in args[1:])), others

        return hook

    handles = []
    try:
        for layer, block in enumerate(blocks if layout.entry else ()):
            n_in = sum(entry <= layer for entry in layout.entry)
            handles.append(block.register_forward_pre_hook(enter(n_in), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Rule:
    """How a layer scores: query i sees keys j <= i and i - j < window; scores are scaled, then capped."""

    scale: float
    window: int | None
    softcap: float | None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.capped((q * self.scale) @ k.mT)

    def capped(self, scores: Tensor) -> Tensor:
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
                q = query[:, :, here]
                z = torch.zeros_like(q) if layer == layout.last_layer else _causal(q, k[None], v[None], rule)
                contexts.append(z.transpose(1, 2))
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
            z = _rows(q, k, v, own_k, own_v, rule, layout.mask(index, rule.window, q.device))
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
    mask: Bool[Tensor, "tokens keys"] | None,
) -> Float[Tensor, "rows heads tokens head_dim"]:
    """softmax([q k^T | q own_k^T]) [v | own_v]: the context is one matrix for all rows and is never copied.

    Query heads that share a key/value head are folded into its rows: [Hkv, R*G*K, D] @ [Hkv, D, S].
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
    weights = _softmax(scores, v.dtype)
    by_context = torch.bmm(weights[..., :n_context], v).view(q.shape)  # [Hkv, R, G*K, D]
    by_own = weights[..., n_context:].unflatten(1, q.shape[1:3])
    z = by_context + (by_own * own_v if alone else by_own @ own_v)
    return rearrange(z, "kv r (g k) d -> r (kv g) k d", k=n_tokens)


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """At least in float32, as fused attention accumulates; float64 stays float64."""
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)
