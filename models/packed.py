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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Rule, causal_attention, plain_attention, rows_attention
from models.calls import current
from models.interface import Edit, KeyValues, Site, UnsupportedModelError
from models.layout import Layout, Sees, causal
from models.shapes import Float

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
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if call is not None:
        layer, call.attended = call.attended, call.attended + 1
        edits = {site: by_layer[layer] for site, by_layer in call.edits.items() if layer in by_layer}
        if call.layout is not None:
            if others.get("is_causal") is False:
                raise UnsupportedModelError("its tokens see those that follow them")
            _refuse_unknown(others)
            if attention_mask is None:
                attention_mask = causal(sliding_window)
            if not isinstance(attention_mask, Sees):
                raise UnsupportedModelError("its attention is given a mask of the model's own making")
            query = _rows_edited(edits, "q", query, call.layout)
            key = _rows_edited(edits, "k", key, call.layout)
            value = _rows_edited(edits, "v", value, call.layout)
            return _packed(layer, query, key, value, rule, attention_mask, call.layout, edits), None
        n_tokens = query.shape[2]
        query = _edited(edits, "q", query, n_tokens)
        key = _edited(edits, "k", key, n_tokens)
        value = _edited(edits, "v", value, n_tokens)
        if "scores" in edits or "pattern" in edits:
            _refuse_unknown(others)
            mask = _mask(module, attention_mask, sliding_window, n_tokens, key, others)
            z = plain_attention(query, key, value, rule, mask, edits)
            return z.transpose(1, 2), None
    given = dict(scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux)
    known = {name: x for name, x in given.items() if x is not None}
    return _own_attention(module)(module, query, key, value, attention_mask, **known, **others)


def _mask(
    module: nn.Module, given: Any, window: int | None, n_tokens: int, key: Tensor, others: Mapping[str, Any]
) -> Tensor | None:
    """What the tokens of a plain forward see, as the model's own attention would take it; None: everything."""
    if given is None:
        if others.get("is_causal", getattr(module, "is_causal", True)) is False:
            return None
        places = torch.arange(key.shape[2], device=key.device)
        return causal(window)(places[-n_tokens:], places)
    if not isinstance(given, Tensor) or given.ndim != 4:
        raise UnsupportedModelError("its attention is given a mask of a kind that is not known")
    return given


def _refuse_unknown(others: Mapping[str, Any]) -> None:
    if unknown := sorted(name for name, x in others.items() if x is not None and name not in HARMLESS):
        raise UnsupportedModelError(f"its attention is told {', '.join(unknown)}, which is not known here")


def _edited(edits: Mapping[Site, Edit], site: Site, x: Tensor, n_tokens: int) -> Tensor:
    """[batch, heads, keys, head_dim] of a plain forward, whose own tokens are the last."""
    if site not in edits:
        return x
    own = edits[site](x[:, :, x.shape[2] - n_tokens :].transpose(1, 2).clone()).transpose(1, 2)
    return torch.cat([x[:, :, : x.shape[2] - n_tokens], own], dim=2)


def _rows_edited(edits: Mapping[Site, Edit], site: Site, x: Tensor, layout: Layout) -> Tensor:
    """[1, heads, sequence, head_dim]: of the rows."""
    if site not in edits:
        return x
    rows = x[0, :, layout.first_row :].unflatten(1, (-1, layout.n_tokens)).permute(1, 2, 0, 3).clone()
    edited = edits[site](rows).flatten(0, 1).transpose(0, 1)[None]
    return torch.cat([x[:, :, : layout.first_row], edited], dim=2)


def _packed(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    sees: Sees,
    layout: Layout,
    edits: Mapping[Site, Edit],
) -> Float[Tensor, "batch sequence heads value_dim"]:
    n_rows, width = layout.rows_in(query.shape[2]), value.shape[-1]
    made: dict[Site, Edit] = {site: edit for site, edit in edits.items() if site in ("scores", "pattern")}
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
                    mask = layout.context_mask(segment.n_computed, sees, q.device)
                    z = causal_attention(q, k[None], v[None], rule, mask)
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
            layout.own[index].keys.append(own_k)
            layout.own[index].values.append(own_v)
        if segment.n_context or segment.past is not None or made:
            z = rows_attention(q, k, v, own_k, own_v, rule, layout.rows_mask(index, sees, q.device), made)
        else:
            z = causal_attention(q, own_k, own_v, rule, layout.context_mask(layout.n_tokens, sees, q.device))
        rows.append(z.transpose(1, 2).flatten(0, 1)[None])  # [1, R*K, H, D]
    return torch.cat([*contexts, *rows], dim=1)


def _own_attention(module: nn.Module) -> Callable[..., Any]:
    """What the module would have called, were NAME not standing there."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = implementation(module.config)
    files = [sys.modules[kind.__module__] for kind in type(module).__mro__ if kind.__module__ in sys.modules]
    eager = next((x for file in files if (x := getattr(file, "eager_attention_forward", None))), None)
    functions = [x for file in files if (x := getattr(file, "ALL_ATTENTION_FUNCTIONS", None)) is not None]
    return (functions or [ALL_ATTENTION_FUNCTIONS])[0].get_interface(name, eager)
