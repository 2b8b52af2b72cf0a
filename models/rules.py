"""What is exact on a model by all that is known of it before anything runs. General rules, no list of names.

The net under them is `engine.core.checking`, which compares with plain forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.anatomy import Anatomy
from models.interface import Capabilities
from models.packed import why_not_known

# Layers that see every earlier token by its place and nothing else.
KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

NOT_CAUSAL = "its tokens see those that follow them"


def rules(hf: nn.Module, config: Any, decoder: nn.Module, body: Anatomy, accepts: Any) -> Capabilities:
    """Refuses what is not known to be right."""
    if any("quantized.dynamic" in type(module).__module__ for module in body.modules):
        why = "its layers scale all that goes through them at once by the largest of it"
        return Capabilities(layered=why, packed=why, expanded=why, batch=why)
    if why := why_not_shared(decoder, config, body):
        return Capabilities(layered=why, packed=why, expanded=why)
    longest, longer = why_no_longer(body.modules)
    cached = why_not_cached(body.attentions)
    return Capabilities(why_not_layered(body), why_not_packed(hf, config, accepts), cached, "", longest, longer)


def why_not_shared(decoder: nn.Module, config: Any, body: Anatomy) -> str:
    """Why no prefix is independent of what follows it, or is more than keys and values; empty if neither."""
    for module in decoder.modules():
        if hasattr(module, "cross_attn"):
            return "it has cross-attention layers, whose keys and values are not those of its tokens"
        if getattr(module, "is_causal", True) is False:
            return NOT_CAUSAL
    if getattr(config, "num_hidden_layers", 0) != len(body.projections):
        return f"of its {config.num_hidden_layers} layers {len(body.projections)} attend, the others pass on a state"
    return ""


def why_not_packed(hf: nn.Module, config: Any, accepts: Any) -> str:
    if not getattr(hf, "_supports_attention_backend", False):
        return f"{type(hf).__name__} does not go through transformers' attention interface"
    if "position_ids" not in accepts:
        return f"{type(hf).__name__} is not told the places of its tokens"
    kinds = set(getattr(config, "layer_types", None) or []) - KINDS
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}, which packed rows do not follow"
    return why_not_known(config)


def why_not_cached(attentions: Sequence[nn.Module]) -> str:
    """Transformers' cache keeps keys by the number that an attention bears, not by its place."""
    numbers = [getattr(attention, "layer_idx", None) for attention in attentions]
    if all(isinstance(number, int) for number in numbers) and numbers != list(range(len(numbers))):
        return f"its layers are in the order {numbers}, by which a cache would mix them up"
    return ""


def why_not_layered(body: Anatomy) -> str:
    if not body.blocks or not body.whole or len(set(body.blocks)) < len(body.blocks):
        return "its blocks are not a list that its projections lie in, one in each"
    return ""


def why_no_longer(modules: Sequence[nn.Module]) -> tuple[int, str]:
    """The longest prompt of which anything can be shared: rotary tables may depend on the length of the whole."""
    longest = Capabilities().longest
    for module in modules:
        kinds: Any = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            rope: Any = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
            rope = rope.get(layer, rope) if layer else rope
            if kind == "longrope":
                longest = min(longest, rope.get("original_max_position_embeddings") or longest)
            elif kind and "dynamic" in kind:
                longest = min(longest, int(module.original_max_seq_len))  # type: ignore[arg-type]
    return longest, f"its rotary positions depend on the whole length of prompts of more than {longest} tokens"
