"""Attention of packed rows: many variants of a prompt's end in one sequence, the prompt itself computed once.

The sequence is [contexts of all segments | rows of all segments], one batch entry. Linear layers do not notice;
attention is where the tokens are kept apart:

    context token i of a segment sees context tokens j <= i                      (plain causal attention)
    token i of row r             sees the whole context and tokens j <= i of r   (one softmax over both parts)

The function below is registered with transformers' attention interface, so that the model's own code computes
queries, keys and values (with its rotary positions, biases, norms) and the output projection. Which keys a query may
see at all (windows, chunks) is what the model tells transformers' mask interface, asked for the places that tokens have
in their texts. What a model tells its attention and is not known here is refused. Forwards of others that come this way
meanwhile attend as the model did before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.calls import current
from models.interface import KeyValues, UnsupportedModelError
from models.layout import Layout, Sees, causal
from models.shapes import Bool, Float

NAME = "headpatch_packed"
# Arguments of attention functions that say nothing of what attention computes.
HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "logits_to_keep",
        "return_dict",
    }
)
_stands_for: dict[int, str] = {}  # by config, the attention implementation that NAME stands in for


def implementation(config: Any) -> str | None:
    """The attention of the model itself, also while a call of ours stands in for it."""
    name = config._attn_implementation
    return _stands_for.get(id(config)) if name == NAME else name


def why_not_known(config: Any) -> str:
    """Why what the model's attention computes is not known; empty if it is one of transformers' own."""
    from transformers import AttentionInterface

    name = implementation(config)
    function = AttentionInterface._global_mapping.get(name) if name is not None else None
    if function is None and name in (None, "eager"):
        return ""
    if function is None or not str(getattr(function, "__module__", "")).startswith("transformers."):
        return f"its attention {name!r} is not one of transformers' own"
    return ""


@contextmanager
def packed_attention(config: Any) -> Iterator[None]:
    """Within: the modules that read `config` attend by the layout of the call. After: the config is as it was."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, seeing)
    before = config._attn_implementation_internal
    if before != NAME:
        _stands_for[id(config)] = before
    try:
        # The internal name: the public setter would also reach the configs of other towers.
        config._attn_implementation_internal = NAME
        yield
    finally:
        config._attn_implementation_internal = before


def seeing(*, mask_function: Any, config: Any, use_vmap: bool = False, allow_is_causal_skip: bool = True, **given: Any):  # type: ignore[no-untyped-def]
    """In place of transformers' masks: what they would say."""
    call = current()
    if call is None or call.layout is None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        own = ALL_MASK_ATTENTION_FUNCTIONS[implementation(config)]
        given |= dict(mask_function=mask_function, config=config, use_vmap=use_vmap)
        return own(**given, allow_is_causal_skip=allow_is_causal_skip)
    if use_vmap or not allow_is_causal_skip:
        raise UnsupportedModelError("it lays a mask of its own over the causal one")
    from transformers.masking_utils import causal_mask_function

    return causal(None) if mask_function is causal_mask_function else Sees(mask_function)


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


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads sequence head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "batch sequence heads value_dim"], Any]:
    call = current()
    if call is None or call.layout is None:
        given = dict(scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux)
        known = {name: x for name, x in given.items() if x is not None}
        return _own_attention(module)(module, query, key, value, attention_mask, **known, **others)
    layout: Layout = call.layout
    if others.get("is_causal") is False:
        raise UnsupportedModelError("its tokens see those that follow them")
    if unknown := sorted(name for name, x in others.items() if x is not None and name not in HARMLESS):
        raise UnsupportedModelError(f"its attention is told {', '.join(unknown)}, which packed rows do not follow")
    if attention_mask is None:
        attention_mask = causal(sliding_window)
    if not isinstance(attention_mask, Sees):
        raise UnsupportedModelError("its attention is given a mask of the model's own making")
    layer, layout.attended = layout.attended, layout.attended + 1
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    n_rows, width = layout.rows_in(query.shape[2]), value.shape[-1]
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
                if layer == layout.n_layers - 1:
                    z = q.new_zeros(*q.shape[:-1], width)
                else:
                    mask = layout.context_mask(segment.n_computed, attention_mask, q.device)
                    z = _causal(q, k[None], v[None], rule, mask)
                contexts.append(z.transpose(1, 2))
            if layout.keep:
                # Copies: a slice of the packed sequence would keep all of it, the rows too, in memory.
                layout.contexts[index].keys.append(k.clone())
                layout.contexts[index].values.append(v.clone())
        if not layout.n_rows:
            continue

        here = slice(row, row + n_rows * layout.n_tokens)
        row = here.stop
        split = (n_rows, layout.n_tokens)
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
            z = _rows(q, k, v, own_k, own_v, rule, layout.rows_mask(index, attention_mask, q.device))
        else:
            z = _causal(q, own_k, own_v, rule, layout.context_mask(layout.n_tokens, attention_mask, q.device))
        rows.append(z.transpose(1, 2).flatten(0, 1)[None])  # [1, R*K, H, D]
    return torch.cat([*contexts, *rows], dim=1), None


def _own_attention(module: nn.Module) -> Callable[..., Any]:
    """What the module would have called, were NAME not standing there."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = implementation(module.config)
    files = [sys.modules[kind.__module__] for kind in type(module).__mro__ if kind.__module__ in sys.modules]
    eager = next((x for file in files if (x := getattr(file, "eager_attention_forward", None))), None)
    functions = [x for file in files if (x := getattr(file, "ALL_ATTENTION_FUNCTIONS", None)) is not None]
    return (functions or [ALL_ATTENTION_FUNCTIONS])[0].get_interface(name, eager)


def _causal(
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


def _rows(
    q: Float[Tensor, "rows heads tokens head_dim"],
    k: Float[Tensor, "kv_heads context head_dim"],
    v: Float[Tensor, "kv_heads context value_dim"],
    own_k: Float[Tensor, "rows kv_heads seen head_dim"],
    own_v: Float[Tensor, "rows kv_heads seen value_dim"],
    rule: Rule,
    mask: Bool[Tensor, "tokens keys"] | None,
) -> Float[Tensor, "rows heads tokens value_dim"]:
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
    sinks = None
    if rule.sinks is not None:  # [H] -> [Hkv, R*G*K, 1]
        sinks = rule.sinks.view(len(k), 1, -1, 1).expand(-1, q.shape[1], -1, n_tokens).flatten(1)[..., None]
    weights = rule.weights(scores, sinks, v.dtype)
    by_context = torch.bmm(weights[..., :n_context], v).unflatten(1, q.shape[1:3])  # [Hkv, R, G*K, D]
    by_own = weights[..., n_context:].unflatten(1, q.shape[1:3])
    z = by_context + (by_own * own_v if alone else by_own @ own_v)
    return rearrange(z, "kv r (g k) d -> r (kv g) k d", k=n_tokens)
